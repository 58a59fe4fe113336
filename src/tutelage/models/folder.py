"""A model on disk: weights as safetensors, beside them what it is. Written whole or not at all."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from safetensors.torch import save_model as save_safetensors
from torch import nn
from torch.distributed.tensor import DTensor

from tutelage.models.build import PYTHON, build_model
from tutelage.models.built import BuiltModel, channels
from tutelage.models.names import ModelError, parse_name
from tutelage.models.weights import CARD, FILE, Weights, find_weights, load_strict
from tutelage.recipe.schema import ModelConfig

FORMAT = 1


def save_model(built: BuiltModel, folder: Path) -> None:
    """Write the model as its own library would, and ``tutelage.json`` with its description and normalisation.

    timm models can be loaded by ``timm.create_model("local-dir:<folder>")``, transformers' by ``from_pretrained``;
    others are one safetensors file. A folder that exists is replaced once the new one is complete. A model that is no
    longer of the library that its description names (a method wrapped it) is kept as weights alone, as one from Python
    is: nothing trained is lost.

    Raises:
        ModelError: the model is sharded, so that no process holds it whole.
    """
    sharded = [name for name, parameter in built.module.named_parameters() if isinstance(parameter, DTensor)]
    if sharded:
        raise ModelError(
            f"{sharded[0]} and {len(sharded) - 1} more are sharded; gather the model before it is saved"
        )
    folder = Path(folder)
    if not _is_described(built):
        built = built._replace(description={"model": PYTHON})
    folder.parent.mkdir(parents=True, exist_ok=True)
    draft = folder.with_name(f".tmp-{folder.name}")
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir()
    _write(built, draft)
    card = {"format": FORMAT, "description": built.description, "mean": built.mean, "std": built.std}
    (draft / CARD).write_text(json.dumps(card, indent=2) + "\n")
    if folder.exists():
        shutil.rmtree(folder)
    draft.rename(folder)


def load_model(folder: Path) -> BuiltModel:
    """The model that `save_model` wrote.

    Raises:
        ModelError: there is none, it is of a later version, its weights do not fit, or it came from Python.
    """
    weights = find_weights(str(folder), None)
    if not weights.card:
        raise ModelError(f"the folder {folder} holds no {CARD}; give a run's student folder")
    if weights.card.get("format") != FORMAT:
        raise ModelError(f"{folder} has format {weights.card.get('format')}; this version reads {FORMAT}")
    description: dict[str, Any] = weights.card["description"]
    if description["model"] == PYTHON:
        raise ModelError(
            f"{folder} holds the weights of a module from Python, which cannot be built from a name; build it, then "
            f"safetensors.torch.load_model(module, {str(Path(folder) / FILE)!r})"
        )
    return BuiltModel(
        _rebuild(description, weights),
        channels(weights.card["mean"]),
        channels(weights.card["std"]),
        description,
    )


def _write(built: BuiltModel, folder: Path) -> None:
    family = built.description["model"].partition(":")[0]
    if family == "timm":
        from tutelage.models.timm_models import save_timm

        save_timm(built.module, folder, built.description, built.mean, built.std)
    elif family == "hf":
        from tutelage.models.hf_models import save_hf

        save_hf(built.module, folder)
    else:
        save_safetensors(built.module, str(folder / FILE))


def _is_described(built: BuiltModel) -> bool:
    mark = {"timm": "pretrained_cfg", "hf": "save_pretrained"}.get(
        built.description["model"].partition(":")[0]
    )
    return mark is None or hasattr(built.module, mark)


def _rebuild(description: dict[str, Any], weights: Weights) -> nn.Module:
    known = {key: value for key, value in description.items() if key in ModelConfig.model_fields}
    config = ModelConfig.model_validate(known | {"weights": None, "revision": None})
    family, _ = parse_name(config.model)
    if family == "hf":
        from tutelage.models.hf_models import load_hf

        return load_hf(weights, trust_remote_code=config.trust_remote_code)
    shape = tuple(description["input_shape"])
    module = build_model(config, outputs=description["outputs"], input_shape=shape).module
    load_strict(module, weights)
    return module
