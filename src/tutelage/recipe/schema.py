"""The recipe: one validated object that says a whole run. Field names here are the YAML's."""

from __future__ import annotations

import json
from collections.abc import Mapping
from itertools import pairwise
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Discriminator, Field, SerializeAsAny, Tag, field_validator
from pydantic_core import PydanticCustomError

from tutelage import catalogue
from tutelage.recipe.comparison import CompareConfig
from tutelage.recipe.config import Config, MethodConfig, Scalar

Positive = Annotated[float, Field(gt=0)]
Share = Annotated[float, Field(gt=0, lt=1)]
Rows = Annotated[int, Field(ge=1)]
Text = Annotated[str, Field(min_length=1)]
Channels = Annotated[tuple[float, ...], Field(min_length=1)]
Deviations = Annotated[tuple[Positive, ...], Field(min_length=1)]
TeacherName = Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")]


def _unequal_channels(values: Mapping[str, Any]) -> list[str]:
    mean, std = values["mean"], values["std"]
    if isinstance(mean, tuple) and isinstance(std, tuple) and len(mean) != len(std):
        return [f"mean has {len(mean)} channels, std has {len(std)}; give as many"]
    return []


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


class ViewConfig(Config):
    """One random change of an image, drawn anew for every (view, row) and reproducible from the seed alone."""

    name: Literal["crop", "flip", "noise", "resized_crop", "color_jitter", "erase"] = Field(
        description="The change."
    )
    padding: int = Field(4, ge=0, le=256, description="crop: pixels of reflected border before the crop.")
    probability: float = Field(0.5, ge=0, le=1, description="flip, erase: how often.")
    strength: float = Field(
        0.1,
        ge=0,
        le=1,
        description="noise: standard deviation; color_jitter: largest change; both in units of the pixel range.",
    )
    scale: tuple[Positive, Positive] = Field(
        (0.35, 1.0), description="resized_crop, erase: share of the image's area, lowest and highest."
    )

    @classmethod
    def conflicts(cls, values: Mapping[str, Any]) -> list[str]:
        scale = values["scale"]
        is_range = isinstance(scale, tuple) and len(scale) == 2 and all(map(_is_number, scale))
        if is_range and not scale[0] <= scale[1] <= 1:
            return [f"scale is lowest and highest share, at most 1; got {scale[0]} and {scale[1]}"]
        return []


class DataConfig(Config):
    """Where rows come from and how they are split."""

    path: Text = Field(
        description="`digits`, a hub name, a folder of parquet files, a CSV file, or a folder of images by class."
    )
    config: str | None = Field(None, description="Configuration name on the hub; a local folder has none.")
    revision: str | None = Field(None, description="Revision on the hub.")
    image: str | None = Field(None, description="Column with the image; found by its type where left out.")
    features: tuple[Text, ...] = Field((), description="Columns with numbers, where rows are no images.")
    target: str | tuple[Text, ...] | None = Field(
        None, description="Column with the label; several 0/1 columns for several labels a row."
    )
    columns: tuple[Text, ...] = Field((), description="Further columns that travel with the batch, by name.")
    train: Text = Field("train", description="Name of the training split.")
    validation: str | Share | Rows | None = Field(
        0.1, description="A split's name, or the share or number of training rows to hold out."
    )
    test: str | Share | Rows | None = Field(
        None,
        description="A split's name, or the share or number of rows to hold out; left out: `test` where it exists.",
    )
    limit: Rows | None = Field(
        None, description="Keep this many training rows (the first of a seeded permutation)."
    )
    evaluation_limit: Rows | None = Field(None, description="Keep this many rows of each evaluation split.")
    noise: float = Field(
        0.0,
        ge=0,
        le=10,
        description="Standard deviation of fixed Gaussian noise on the inputs, in units of their range.",
    )
    seed: int = Field(0, ge=0, description="Seed of splits, limits and noise.")
    views: tuple[ViewConfig, ...] = Field((), description="Random changes of training rows, in order.")
    image_size: int | None = Field(
        None,
        ge=1,
        le=4096,
        description="Side that images are resized to; left out: as they are, and all alike.",
    )
    workers: int = Field(0, ge=0, le=64, description="Loader processes.")

    @classmethod
    def conflicts(cls, values: Mapping[str, Any]) -> list[str]:
        if values["image"] is not None and values["features"]:
            return ["give `image` or `features`, not both: a row is an image or a list of numbers"]
        return []


class ModelConfig(Config):
    """A model by name. `timm:`, `hf:`, `cifar:` and `digits:` say where the architecture comes from."""

    model: Text = Field(
        description="For example `timm:resnet18`, `hf:distilbert-base-uncased`, `cifar:resnet8x4`, `digits:cnn-4-8-16`."
    )
    weights: str | None = Field(
        None,
        description="Left out: random. `pretrained`: the library's. `hub:NAME`, a safetensors file, or a run's student folder.",
    )
    revision: str | None = Field(None, description="Revision of hub weights.")
    options: dict[str, Scalar] = Field({}, description="Further arguments of the architecture.")
    mean: Channels | None = Field(
        None, description="Input mean by channel; left out: the weights' own, else the data's."
    )
    std: Deviations | None = Field(None, description="Input standard deviation by channel; as `mean`.")
    trust_remote_code: bool = Field(False, description="Let `hf:` run code that comes with the weights.")

    @classmethod
    def conflicts(cls, values: Mapping[str, Any]) -> list[str]:
        return _unequal_channels(values)


class TeacherConfig(Config):
    """Where the teacher's knowledge comes from: exactly one of `model`, `run`, `recipe`, `store`, `endpoint`."""

    model: Text | None = Field(
        None, description="A model by name, as for the student; usually with `weights`."
    )
    weights: str | None = Field(
        None, description="As for the student: `pretrained`, `hub:NAME`, a file or a folder."
    )
    revision: str | None = Field(None, description="Revision of hub weights.")
    options: dict[str, Scalar] = Field({}, description="Further arguments of the architecture.")
    mean: Channels | None = Field(
        None, description="Input mean by channel; left out: the weights' own, else the data's."
    )
    std: Deviations | None = Field(None, description="Input standard deviation by channel; as `mean`.")
    trust_remote_code: bool = Field(False, description="Let `hf:` run code that comes with the weights.")
    run: Text | None = Field(None, description="Folder of an earlier run; its student becomes the teacher.")
    recipe: Text | None = Field(
        None,
        description="A recipe that is trained first and reused: a file, relative to this recipe's folder, or the name "
        "of a shipped recipe.",
    )
    overrides: tuple[Text, ...] = Field(
        (),
        exclude_if=lambda given: not given,
        description="Changes of that recipe, as on the command line: [train.epochs=30, data.limit=5000].",
    )
    store: Text | None = Field(None, description="Folder of stored outputs.")
    endpoint: Text | None = Field(None, description="Address of a server that writes text.")

    @classmethod
    def conflicts(cls, values: Mapping[str, Any]) -> list[str]:
        sources = ("model", "run", "recipe", "store", "endpoint")
        given = [name for name in sources if values[name] is not None]
        reasons = _unequal_channels(values)
        if len(given) != 1:
            reasons.append(
                f"give exactly one of {', '.join(sources)}; got {', '.join(given) or 'none'}"
                + (" (set the others to null)" if given else "")
            )
        extra = [name for name in ("weights", "revision", "options", "trust_remote_code") if values[name]]
        if values["model"] is None and extra:
            reasons.append(f"{', '.join(extra)} only together with `model`")
        if values["recipe"] is None and values["overrides"]:
            reasons.append("overrides only together with `recipe`")
        return reasons


class OptimizerConfig(Config):
    """An optimiser by the name that torch or timm gives it."""

    name: Text = Field("sgd", description="For example sgd (Nesterov only where asked), adamw, lamb.")
    lr: float = Field(0.05, gt=0, le=100, description="Largest learning rate.")
    weight_decay: float = Field(
        0.0, ge=0, le=10, description="Applied to biases and norms too, unless `decay_norms` is false."
    )
    decay_norms: bool = Field(
        True, description="Decay biases and normalisation weights too, as most CIFAR recipes do."
    )
    momentum: float | None = Field(
        None, ge=0, lt=1, description="Left out: 0.9 for sgd, else the optimiser's own."
    )
    layer_decay: float | None = Field(
        None, gt=0, le=1, description="Factor on the learning rate a layer, from the head down."
    )
    options: dict[str, Scalar | tuple[float, ...]] = Field(
        {}, description="Further arguments of the optimiser."
    )


class ScheduleConfig(Config):
    """Learning rate over the run. Steps of warm-up are steps of the optimiser."""

    name: Text = Field(
        "cosine",
        description="constant, cosine, linear, multistep, or a class name of torch.optim.lr_scheduler.",
    )
    warmup: float = Field(0.0, ge=0, lt=1, description="Share of the run that the rate rises linearly.")
    milestones: tuple[Share, ...] = Field(
        (), description="multistep: shares of the run after which the rate drops, rising."
    )
    gamma: float = Field(0.1, gt=0, le=1, description="multistep: factor at each drop.")
    final: float = Field(
        0.0, ge=0, le=1, description="cosine, linear: the last rate as a share of the first."
    )
    options: dict[str, Scalar | tuple[float, ...]] = Field(
        {}, description="Arguments of a class of torch.optim.lr_scheduler."
    )

    @classmethod
    def conflicts(cls, values: Mapping[str, Any]) -> list[str]:
        milestones = values["milestones"]
        if values["name"] == "multistep" and milestones == ():
            return ["`multistep` needs milestones, shares of the run such as [0.5, 0.75]"]
        if isinstance(milestones, tuple) and all(map(_is_number, milestones)):
            rising = all(a < b for a, b in pairwise(milestones))
            return [] if rising else [f"milestones must rise; got {', '.join(map(str, milestones))}"]
        return []


class CheckpointConfig(Config):
    """When the whole state of a run is written, so that it can go on from there."""

    every: int | None = Field(None, ge=1, description="Steps between checkpoints; left out: once an epoch.")
    keep: int = Field(2, ge=1, le=1000, description="Newest checkpoints kept; the best one is kept besides.")


class EarlyStopConfig(Config):
    """When a run ends before its time."""

    metric: Text = Field("loss", description="A validation metric.")
    patience: int = Field(5, ge=1, description="Evaluations without a better value before the run stops.")


class TrainConfig(Config):
    """How long, how fast, and on what the student is trained."""

    epochs: int | None = Field(None, ge=1, description="Passes over the data; give this or `steps`.")
    steps: int | None = Field(None, ge=1, description="Optimiser steps; give this or `epochs`.")
    batch_size: int = Field(
        64, ge=1, description="Rows an optimiser step sees, over all processes and micro-batches."
    )
    accumulate: int = Field(
        1, ge=1, description="Micro-batches that one process splits its share of a step into."
    )
    optimizer: OptimizerConfig = Field(OptimizerConfig(), description="The optimiser and its learning rate.")
    schedule: ScheduleConfig = Field(ScheduleConfig(), description="The learning rate over the run.")
    clip: float | None = Field(None, gt=0, description="Largest gradient norm.")
    precision: Literal["fp32", "bf16", "fp16"] = Field(
        "fp32", description="Number format of the forward passes."
    )
    compile: bool = Field(
        False, description="Compile student and teacher with torch.compile, in regions without taps inside."
    )
    device: Literal["auto", "cpu", "cuda", "mps", "xpu"] = Field(
        "auto", description="`auto`: the first accelerator, else the CPU. mps and xpu are untested."
    )
    threads: int | None = Field(None, ge=1, le=1024, description="CPU threads; left out: torch's own choice.")
    ema: float | None = Field(
        None,
        gt=0,
        lt=1,
        description="Decay of an exponential moving average of the student; it is what is evaluated and shipped.",
    )
    label_weight: float | None = Field(
        None,
        ge=0,
        description="Weight of the label loss where methods are combined; left out: the first method's.",
    )
    label_smoothing: float = Field(
        0.0, ge=0, lt=1, description="Share of a label's mass spread over all classes."
    )
    seed: int = Field(
        0,
        ge=0,
        le=2**31 - 1,
        description="Seed of weights, order of rows, views and all that a method draws.",
    )
    checkpoint: CheckpointConfig = Field(CheckpointConfig(), description="When the run's state is written.")
    early_stop: EarlyStopConfig | None = Field(None, description="Left out: the run takes its full length.")

    @classmethod
    def conflicts(cls, values: Mapping[str, Any]) -> list[str]:
        reasons = []
        given = {name: values[name] for name in ("epochs", "steps") if values[name] is not None}
        if len(given) != 1:
            got = ", ".join(f"{name}={value}" for name, value in given.items())
            reasons.append(
                "give exactly one of epochs and steps; got "
                + (f"{got} (set the other to null)" if given else "neither")
            )
        rows, parts = values["batch_size"], values["accumulate"]
        if all(isinstance(value, int) and value > 0 for value in (rows, parts)) and rows % parts:
            reasons.append(f"batch_size={rows} does not divide into accumulate={parts} micro-batches")
        return reasons


class EvaluationConfig(Config):
    """How the student is measured."""

    every: int = Field(1, ge=1, description="Epochs between evaluations on validation data.")
    batch_size: int = Field(256, ge=1, description="Rows a forward pass; no effect on the metrics.")
    metrics: tuple[Text, ...] = Field((), description="Metrics by name; left out: the task's own.")
    group_by: str | None = Field(None, description="Column by which every metric is given once more.")
    best: str | None = Field(
        None, description="Validation metric that says which checkpoint is best; left out: the task's first."
    )


class OutputConfig(Config):
    """What a run leaves behind."""

    dir: Text | None = Field(None, description="Run folder; left out: runs/<recipe>-<method>-<seed>.")
    trackers: tuple[Literal["tensorboard", "wandb", "trackio", "mlflow"], ...] = Field(
        (), description="Trackers that get every metric too."
    )
    report: bool = Field(True, description="Write report.html at the end.")


def _own_config(value: Any) -> MethodConfig:
    """A method's options, held against that method's own ``Config``. Imports the method, and so torch."""
    if isinstance(value, MethodConfig):
        return value
    options = {"name": value} if isinstance(value, str) else value
    if not isinstance(options, Mapping) or not isinstance(options.get("name"), str):
        raise PydanticCustomError(
            "method_name", "give a method's name, or a mapping such as {name: kd, weight: 1}"
        )
    try:
        method = catalogue.load(options["name"])
    except catalogue.UnknownMethodError as error:
        raise PydanticCustomError("unknown_method", "{reason}", {"reason": str(error)}) from error
    config: MethodConfig = method.Config.model_validate_json(json.dumps(options), strict=True)
    return config


def _teacher_form(value: Any) -> str:
    """A mapping of mappings is several teachers by name, everything else is one."""
    entries = value.values() if isinstance(value, Mapping) else ()
    return (
        "several"
        if entries and all(isinstance(entry, Mapping | TeacherConfig) for entry in entries)
        else "one"
    )


MethodEntry = Annotated[SerializeAsAny[MethodConfig], BeforeValidator(_own_config)]
Teachers = Annotated[
    Annotated[TeacherConfig, Tag("one")] | Annotated[dict[TeacherName, TeacherConfig], Tag("several")],
    Discriminator(_teacher_form),
]


class Recipe(Config):
    """A whole run: task, data, teacher, student, method, training, evaluation, output."""

    version: Literal[1] = Field(1, description="Version of this format.")
    task: Literal["classification", "multilabel", "regression"] = Field(
        "classification", description="What is learnt: it decides label loss, metrics and what a target is."
    )
    data: DataConfig = Field(description="Rows and their splits.")
    teacher: Teachers | None = Field(None, description="One teacher, or several by name.")
    student: ModelConfig = Field(description="The model that is trained and shipped.")
    method: tuple[MethodEntry, ...] = Field(
        min_length=1,
        description="A name, a mapping of a name and its options, or a list of those (methods combined).",
    )
    train: TrainConfig = Field(description="Length, optimiser, precision, device.")
    evaluation: EvaluationConfig = Field(EvaluationConfig(), description="Metrics, and how often.")
    output: OutputConfig = Field(OutputConfig(), description="Run folder, trackers, report.")
    compare: CompareConfig = Field(CompareConfig(), description="What `tutelage compare` compares.")

    @field_validator("method", mode="before")
    @classmethod
    def _one_or_many(cls, value: Any) -> Any:
        return value if isinstance(value, list | tuple) else (value,)
