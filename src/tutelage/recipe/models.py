"""Student and teacher: models by name, and where a teacher's knowledge comes from."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field

from tutelage.recipe.config import Config, Scalar
from tutelage.recipe.parts import Positive, Text

Channels = Annotated[tuple[float, ...], Field(min_length=1)]
Deviations = Annotated[tuple[Positive, ...], Field(min_length=1)]
Attention = Literal["eager", "sdpa", "flash_attention_2", "flash_attention_3", "flex_attention"]
"""Names that transformers gives its attention implementations."""
DType = Literal["float32", "bfloat16", "float16"]

_SECRET = re.compile(
    r"(.*_)?(api_?key|password|passwd|secret|credentials?)|((hf|auth|access|api)_?)?token", re.IGNORECASE
)


def _secrets(values: Mapping[str, Any]) -> list[str]:
    """A recipe is written into every run's folder, and into its report."""
    options = values["options"] if isinstance(values["options"], Mapping) else {}
    return [
        f"options.{name} looks like a secret, and recipes are kept and shown; put it into the environment "
        "(HF_TOKEN for the hub)"
        for name in options
        if _SECRET.fullmatch(str(name))
    ]


def _unequal_channels(values: Mapping[str, Any]) -> list[str]:
    mean, std = values["mean"], values["std"]
    if isinstance(mean, tuple) and isinstance(std, tuple) and len(mean) != len(std):
        return [f"mean has {len(mean)} channels, std has {len(std)}; give as many"]
    return []


def _transformers_only(values: Mapping[str, Any], names: tuple[str, ...]) -> list[str]:
    """Fields that only models of transformers know."""
    model, given = values.get("model"), [name for name in names if values[name] not in (None, "float32")]
    if given and isinstance(model, str) and not model.startswith(("hf:", "config:")):
        return [f"{', '.join(given)} only with `hf:` and `config:` models; got {model!r}"]
    return []


class LoraConfig(Config):
    """Low-rank adapters beside linear layers (LoRA, arXiv 2106.09685): they alone are trained, and are merged into the
    weights at the end."""

    rank: int = Field(8, ge=1, le=4096, description="Width of the adapters.")
    alpha: float = Field(16.0, gt=0, le=100_000, description="An adapter's output is scaled by alpha / rank.")
    dropout: float = Field(0.0, ge=0, lt=1, description="On the adapters' inputs, in training.")
    targets: tuple[Text, ...] | None = Field(
        None,
        min_length=1,
        description="Linear layers by the end of their path, such as [q_proj, v_proj]; left out: peft's choice for the "
        "architecture, else all but the head.",
    )


class ModelConfig(Config):
    """A model by name. `timm:`, `hf:`, `config:`, `cifar:` and `digits:` say where the architecture comes from."""

    model: Text = Field(
        description="For example `timm:resnet18`, `hf:distilbert-base-uncased`, `cifar:resnet8x4`, `digits:cnn-4-8-16`; "
        "`config:llama`: an architecture of transformers, of the sizes that `options` say."
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
    attention: Attention | None = Field(
        None,
        description="How `hf:` and `config:` models compute attention; left out: as transformers chooses.",
    )
    dtype: DType = Field(
        "float32",
        description="Number format of the weights of `hf:` and `config:` text models. A student in half precision needs "
        "`lora`; for half-precision arithmetic alone set `train.precision`.",
    )
    lora: LoraConfig | None = Field(
        None, description="Train adapters instead of the weights; left out: all weights are trained."
    )

    @classmethod
    def conflicts(cls, values: Mapping[str, Any]) -> list[str]:
        own = _transformers_only(values, ("attention", "dtype", "lora"))
        return _unequal_channels(values) + _secrets(values) + own


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
    trust_remote_code: bool = Field(
        False, description="Let `hf:` run code that comes with the weights, also those of a `run`."
    )
    attention: Attention | None = Field(None, description="As for the student.")
    dtype: DType = Field(
        "float32",
        description="Number format of the weights of `hf:` and `config:` text models; bfloat16 halves a frozen teacher's "
        "memory.",
    )
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
    store: Text | None = Field(
        None, description="Folder of outputs that `tutelage cache` stored; no model is loaded."
    )
    endpoint: Text | None = Field(None, description="Address of a server that writes text.")

    @classmethod
    def conflicts(cls, values: Mapping[str, Any]) -> list[str]:
        sources = ("model", "run", "recipe", "store", "endpoint")
        given = [name for name in sources if values[name] is not None]
        reasons = _unequal_channels(values) + _secrets(values)
        if len(given) != 1:
            reasons.append(
                f"give exactly one of {', '.join(sources)}; got {', '.join(given) or 'none'}"
                + (" (set the others to null)" if given else "")
            )
        extra = [name for name in ("weights", "revision", "options") if values[name]]
        if values["model"] is None and extra:
            reasons.append(f"{', '.join(extra)} only together with `model`")
        if values["model"] is None and values["run"] is None and values["trust_remote_code"]:
            reasons.append("trust_remote_code only together with `model` or `run`")
        if values["model"] is None and (values["store"] is not None or values["endpoint"] is not None):
            held = [name for name in ("attention", "dtype") if values[name] not in (None, "float32")]
            reasons += [f"{', '.join(held)} only for a teacher that is a model here"] if held else []
        reasons += _transformers_only(values, ("attention", "dtype"))
        address = values["endpoint"]
        if isinstance(address, str) and "@" in address.partition("://")[2].partition("/")[0]:
            reasons.append("endpoint holds a user's name or password; put that into the environment")
        if values["recipe"] is None and values["overrides"]:
            reasons.append("overrides only together with `recipe`")
        return reasons
