"""A model on disk: weights as safetensors, beside them what it is. Written whole or not at all."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field
from safetensors.torch import save_model as save_safetensors
from torch import nn
from torch.distributed.tensor import DTensor

from tutelage.models.adapters import has_lora
from tutelage.models.build import PYTHON, build_model
from tutelage.models.built import BuiltModel, channels
from tutelage.models.names import ModelError, parse_name
from tutelage.models.weights import CARD, FILE, Weights, find_weights, load_strict
from tutelage.recipe import validate
from tutelage.recipe.config import Config
from tutelage.recipe.models import Attention, DType
from tutelage.recipe.schema import ModelConfig

FORMAT = 1


def save_model(built: BuiltModel, folder: Path, *, beside: Callable[[Path], object] | None = None) -> None:
    """Write the model as its own library would, and ``tutelage.json`` with its description and normalisation.

    timm models can be loaded by ``timm.create_model("local-dir:<folder>")``, transformers' by ``from_pretrained``;
    others are one safetensors file. A folder that exists is replaced once the new one is complete. A model that is no
    longer of the library that its description names (a method wrapped it) is kept as weights alone, as one from Python
    is: nothing trained is lost.

    Args:
        beside: writes what belongs to the model (a tokeniser's files) into the folder that it is given; all appear at
            once.

    Raises:
        ModelError: the model is sharded, so that no process holds it whole, or has adapters that are not merged.
    """
    sharded = [name for name, parameter in built.module.named_parameters() if isinstance(parameter, DTensor)]
    if sharded:
        raise ModelError(
            f"{sharded[0]} and {len(sharded) - 1} more are sharded; gather the model before it is saved"
        )
    if has_lora(built.module):
        raise ModelError(
            "the model has adapters that are not merged; call tutelage.models.merge_lora on it first"
        )
    folder = Path(folder)
    if not _is_described(built):
        built = built._replace(description={"model": PYTHON})
    folder.parent.mkdir(parents=True, exist_ok=True)
    draft = folder.with_name(f".tmp-{folder.name}")
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir()
    card = {"format": FORMAT, "description": built.description, "mean": built.mean, "std": built.std}
    try:
        _write(built, draft)
        if beside is not None:
            beside(draft)
        (draft / CARD).write_text(json.dumps(card, indent=2) + "\n")
    except BaseException:  # a full disk, or a wish to stop
        shutil.rmtree(draft, ignore_errors=True)
        raise
    if folder.exists():
        shutil.rmtree(folder)
    draft.rename(folder)


class _Card(Config):
    """``tutelage.json``."""

    format: Literal[1]
    description: dict[str, Any]
    mean: tuple[float, ...] | None
    std: tuple[float, ...] | None


class _Description(ModelConfig):
    """What a model was built from, and for what."""

    outputs: int = Field(ge=1)
    input_shape: tuple[Annotated[int, Field(ge=1)], ...]
    task: str = "classification"

    @classmethod
    def conflicts(cls, values: Mapping[str, Any]) -> list[str]:
        reasons = super().conflicts(values)
        family = str(values.get("model", "")).partition(":")[0]
        if values.get("input_shape") == () and family not in ("hf", "config"):
            reasons.append("input_shape is empty; only transformers' models read rows of unequal lengths")
        return reasons


def load_model(
    folder: Path,
    *,
    trust_remote_code: bool = False,
    attention: Attention | None = None,
    dtype: DType | None = None,
) -> BuiltModel:
    """The model that `save_model` wrote.

    Args:
        attention, dtype: of a model of transformers, as in a recipe; left out: as transformers chooses, and as it was.
        trust_remote_code: let a transformers model run code that lies in the folder. That the folder says so itself is
            not enough: it may come from anyone.

    Raises:
        ModelError: there is none, it is of a later version, its weights do not fit, it came from Python, or it needs
            code that is not trusted.
        RecipeError: its description is no model's.
    """
    weights = find_weights(str(folder), None)
    if not weights.card:
        raise ModelError(f"the folder {folder} holds no {CARD}; give a run's student folder")
    if weights.card.get("format") != FORMAT:
        raise ModelError(f"{folder} has format {weights.card.get('format')}; this version reads {FORMAT}")
    card = validate(_Card, weights.card, str(Path(folder) / CARD))
    if card.description.get("model") == PYTHON:
        raise ModelError(
            f"{folder} holds the weights of a module from Python, which cannot be built from a name; build it, then "
            f"safetensors.torch.load_model(module, {str(Path(folder) / FILE)!r})"
        )
    description = validate(_Description, card.description, str(Path(folder) / CARD))
    if description.trust_remote_code and not trust_remote_code:
        raise ModelError(
            f"the model in {folder} needs code of its own ({description.model}, trust_remote_code), which nobody here "
            "trusted; read that code, then set trust_remote_code: true where the recipe names this model"
        )
    held = {
        "trust_remote_code": trust_remote_code,
        "attention": attention,
        "dtype": dtype or description.dtype,
    }
    module = _rebuild(description.model_copy(update=held), weights)
    return BuiltModel(module, channels(card.mean), channels(card.std), weights.card["description"])


def _write(built: BuiltModel, folder: Path) -> None:
    family = built.description["model"].partition(":")[0]
    if family == "timm":
        from tutelage.models.timm_models import save_timm

        save_timm(built.module, folder, built.description, built.mean, built.std)
    elif family in ("hf", "config"):
        from tutelage.models.hf_models import save_hf

        save_hf(built.module, folder)
    else:
        save_safetensors(built.module, str(folder / FILE))


def _is_described(built: BuiltModel) -> bool:
    mark = {"timm": "pretrained_cfg", "hf": "save_pretrained", "config": "save_pretrained"}.get(
        built.description["model"].partition(":")[0]
    )
    return mark is None or hasattr(built.module, mark)


def _rebuild(description: _Description, weights: Weights) -> nn.Module:
    family, _ = parse_name(description.model)
    if family in ("hf", "config"):
        from tutelage.models.hf_models import load_hf

        return load_hf(weights, description, description.task)
    config = description.model_copy(update={"weights": None, "revision": None})
    module = build_model(config, outputs=description.outputs, input_shape=description.input_shape).module
    load_strict(module, weights)
    return module
