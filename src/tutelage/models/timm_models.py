"""Architectures and weights of timm. Weights come as safetensors alone."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from torch import nn

from tutelage.models.built import Channels, channels
from tutelage.models.names import ModelError
from tutelage.models.weights import Weights, find_weights, from_hub, load_strict
from tutelage.recipe.schema import ModelConfig

_LOADING = {"cache_dir", "checkpoint_path", "pretrained", "pretrained_cfg", "pretrained_cfg_overlay"}
"""Arguments of timm that read or fetch files past `tutelage.models.weights`, and may unpickle them."""

Parts = tuple[nn.Module, Channels, Channels]


def build_timm(config: ModelConfig, name: str, outputs: int | None, input_shape: tuple[int, ...]) -> Parts:
    """A timm model with its input normalisation (none where its weights are random).

    Args:
        outputs: classes; none: those of the weights.

    Raises:
        ModelError: wrong options, images that the architecture cannot take, or weights that cannot be had.
    """
    from timm.models import get_pretrained_cfg

    if len(input_shape) != 3:
        raise ModelError(
            f"timm:{name} takes images [channels, height, width]; this data gives {list(input_shape)}"
        )
    for option in sorted(config.options.keys() & _LOADING):
        raise ModelError(f"timm:{name} has no option {option!r} here: `weights` alone says what is loaded")
    card = get_pretrained_cfg(name, allow_unregistered=False)
    arguments: dict[str, Any] = {"in_chans": input_shape[0]} | _image_size(card, input_shape) | config.options
    if config.weights is None:
        if config.revision is not None:
            raise ModelError(f"revision {config.revision!r} is of weights, but timm:{name} has weights: null")
        return _create(name, arguments, classes=outputs), None, None
    if config.weights == "pretrained" or config.weights.startswith("hub:"):
        return _from_hub(config, name, arguments, card, outputs)
    weights = find_weights(config.weights, config.revision)
    module = _create(name, arguments, classes=outputs or _classes(card, weights))
    load_strict(module, weights)
    return module, channels(weights.card.get("mean")), channels(weights.card.get("std"))


def save_timm(
    module: nn.Module, folder: Path, description: dict[str, Any], mean: Channels, std: Channels
) -> None:
    """``config.json`` and ``model.safetensors``: ``timm.create_model("local-dir:<folder>")`` loads them."""
    from timm.models import save_for_hf

    own: dict[str, Any] = dict(module.pretrained_cfg)  # type: ignore[arg-type]
    shape = tuple(description["input_shape"])
    arguments = {"in_chans": shape[0]} | _image_size(own, shape) | description["options"]
    shown = {"input_size": shape} | ({"mean": mean, "std": std} if mean and std else {})
    module.pretrained_cfg = own | shown  # type: ignore[assignment]
    try:
        save_for_hf(module, str(folder), model_args=arguments, safe_serialization=True)
    finally:
        module.pretrained_cfg = own  # type: ignore[assignment]


def default_input(name: str) -> tuple[int, ...]:
    """Channels, height and width that the architecture was made for."""
    from timm.models import get_pretrained_cfg

    card: Any = get_pretrained_cfg(name, allow_unregistered=False)
    return tuple(card.input_size or ())


def _from_hub(
    config: ModelConfig, name: str, arguments: dict[str, Any], card: Any, outputs: int | None
) -> Parts:
    """timm adapts hub weights to other classes, channels and image sizes; it is handed the file, so that no pickled one
    is ever looked at."""
    if config.weights == "pretrained":
        if not card.hf_hub_id:
            raise ModelError(
                f"timm:{name} has no pretrained weights on the hub; take another, or weights: null"
            )
        weights, norm = from_hub(card.hf_hub_id, config.revision), {}
    else:
        weights = find_weights(str(config.weights), config.revision)
        norm = weights.config.get("pretrained_cfg", {})
    overlay: dict[str, Any] = {"file": str(weights.file), "custom_load": False}
    overlay |= {key: norm[key] for key in ("mean", "std", "input_size") if key in norm}
    overlay["num_classes"] = _classes(card, weights) or card.num_classes
    try:
        module = _create(
            name,
            arguments,
            classes=outputs or overlay["num_classes"],
            pretrained=True,
            pretrained_cfg_overlay=overlay,
        )
    except (RuntimeError, KeyError) as error:
        raise ModelError(f"{weights.source} does not fit timm:{name}: {error}") from None
    used = dict(module.pretrained_cfg)  # type: ignore[arg-type]
    return module, channels(used.get("mean")), channels(used.get("std"))


def _create(name: str, arguments: dict[str, Any], *, classes: int | None, **loading: Any) -> nn.Module:
    import timm

    if classes is not None:
        arguments = {"num_classes": classes} | arguments
    try:
        return timm.create_model(name, **arguments, **loading)  # type: ignore[no-any-return]
    except TypeError as error:
        unknown = re.search(r"unexpected keyword argument '(\w+)'", str(error))
        if unknown is None:
            raise
        if unknown[1] == "img_size":
            size = default_input(name)[1:]
            raise ModelError(
                f"timm:{name} takes images of {size[0]} × {size[1]} only; set data.image_size"
            ) from None
        raise ModelError(f"timm:{name} has no option {unknown[1]!r}") from None
    except (AssertionError, ValueError) as error:
        raise ModelError(f"timm:{name} cannot be built with {arguments}: {error}") from None


def _image_size(card: Any, input_shape: tuple[int, ...]) -> dict[str, Any]:
    """``img_size``, for architectures whose weights depend on it."""
    read = card.get if isinstance(card, dict) else lambda key: getattr(card, key)
    if not read("fixed_input_size") or tuple(read("input_size") or ())[1:] == input_shape[1:]:
        return {}
    return {"img_size": tuple(input_shape[1:])}


def _classes(card: Any, weights: Weights) -> int | None:
    names = (card.classifier,) if isinstance(card.classifier, str) else card.classifier or ()
    return next((rows for name in names if (rows := weights.rows(f"{name}.weight"))), None)
