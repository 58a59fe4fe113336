"""The recipe: one validated object that says a whole run. Field names here are the YAML's."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Discriminator, Field, SerializeAsAny, Tag, field_validator
from pydantic_core import PydanticCustomError

from tutelage import catalogue
from tutelage.recipe.caching import CacheConfig
from tutelage.recipe.comparison import CompareConfig
from tutelage.recipe.config import Config, MethodConfig
from tutelage.recipe.data import DataConfig, ImbalanceConfig, ViewConfig
from tutelage.recipe.models import ModelConfig, TeacherConfig
from tutelage.recipe.parts import Text
from tutelage.recipe.training import (
    CheckpointConfig,
    EarlyStopConfig,
    OptimizerConfig,
    ScheduleConfig,
    TrainConfig,
)

__all__ = [
    "CacheConfig",
    "CheckpointConfig",
    "CompareConfig",
    "DataConfig",
    "EarlyStopConfig",
    "EvaluationConfig",
    "ImbalanceConfig",
    "ModelConfig",
    "OptimizerConfig",
    "OutputConfig",
    "Recipe",
    "ScheduleConfig",
    "TeacherConfig",
    "TrainConfig",
    "ViewConfig",
]

TeacherName = Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")]


class EvaluationConfig(Config):
    """How the student is measured."""

    every: int = Field(1, ge=1, description="Epochs between evaluations on validation data.")
    batch_size: int = Field(256, ge=1, description="Rows a forward pass; no effect on the metrics.")
    metrics: tuple[Text, ...] = Field((), description="Metrics by name; left out: the task's own.")
    group_by: str | None = Field(None, description="Column by which every metric is given once more.")
    best: str | None = Field(
        None, description="Validation metric that says which checkpoint is best; left out: the task's first."
    )
    samples: int = Field(
        0,
        ge=0,
        le=100_000,
        description="language-model: held-out prompts that student and teacher go on from; 0: none.",
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


def _field(part: Any, name: str) -> Any:
    """A field of a part of the recipe, be that read already or not."""
    return part.get(name) if isinstance(part, Mapping) else getattr(part, name, None)


MethodEntry = Annotated[SerializeAsAny[MethodConfig], BeforeValidator(_own_config)]
Teachers = Annotated[
    Annotated[TeacherConfig, Tag("one")] | Annotated[dict[TeacherName, TeacherConfig], Tag("several")],
    Discriminator(_teacher_form),
]


class Recipe(Config):
    """A whole run: task, data, teacher, student, method, training, evaluation, output."""

    version: Literal[1] = Field(1, description="Version of this format.")
    task: Literal["classification", "multilabel", "regression", "language-model", "token-classification"] = (
        Field(
            "classification",
            description="What is learnt: it decides label loss, metrics and what a target is.",
        )
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
    cache: CacheConfig = Field(
        CacheConfig(), description="How `tutelage cache` stores the teacher's outputs."
    )

    @classmethod
    def conflicts(cls, values: Mapping[str, Any]) -> list[str]:
        reasons = []
        dtype, lora = (_field(values.get("student"), name) for name in ("dtype", "lora"))
        if dtype in ("bfloat16", "float16") and lora is None:
            reasons.append(
                f"student.dtype is {dtype}: weights so coarse lose small updates; leave it out and set train.precision, "
                "or train adapters beside them (student.lora)"
            )
        if lora is not None and _field(values.get("train"), "quantize") is not None:
            reasons.append(
                "train.quantize rounds the weights that ship, student.lora merges them only at the end"
            )
        return reasons

    @field_validator("method", mode="before")
    @classmethod
    def _one_or_many(cls, value: Any) -> Any:
        return value if isinstance(value, list | tuple) else (value,)
