"""Architectures and weights of transformers, for images and for text. Weights come as safetensors alone."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any

from torch import nn

from tutelage.models.built import Channels
from tutelage.models.names import ModelError, nearest
from tutelage.models.weights import FILE, find_weights, load_strict
from tutelage.recipe.schema import ModelConfig

Parts = tuple[nn.Module, Channels, Channels]


def build_hf(config: ModelConfig, name: str, outputs: int | None, input_shape: tuple[int, ...]) -> Parts:
    """A classifier of transformers, with the input normalisation of its weights (none where they are random).

    Args:
        name: a name on the hub, or a local folder.
        outputs: classes; none: those of the configuration.

    Raises:
        ModelError: no such model, one that is no classifier, wrong options, or weights that do not fit.
    """
    library = _transformers()
    where: dict[str, Any] = {"revision": config.revision, "trust_remote_code": config.trust_remote_code}
    settings = _settings(library, name, config, outputs, input_shape, where)
    auto = _auto_class(library, name, settings)
    if config.weights is None:
        return auto.from_config(settings, trust_remote_code=config.trust_remote_code), None, None
    if config.weights == "pretrained" or config.weights.startswith("hub:"):
        source = name if config.weights == "pretrained" else config.weights.removeprefix("hub:")
        return _pretrained(library, auto, source, settings, where)
    weights = find_weights(config.weights, None)
    module = auto.from_config(settings, trust_remote_code=config.trust_remote_code)
    load_strict(module, weights)
    return module, weights.card.get("mean"), weights.card.get("std")


def load_hf(folder: Path, *, trust_remote_code: bool) -> nn.Module:
    """A model that `save_pretrained` wrote."""
    library = _transformers()
    settings = library.AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    auto = _auto_class(library, str(folder), settings)
    if not (folder / FILE).is_file() and not (folder / f"{FILE}.index.json").is_file():
        raise ModelError(f"the folder {folder} holds no {FILE}")
    module: nn.Module = auto.from_pretrained(
        folder, config=settings, use_safetensors=True, trust_remote_code=trust_remote_code
    )
    return module


def _transformers() -> ModuleType:
    try:
        import transformers
    except ImportError:
        raise ModelError("`hf:` models need transformers: pip install 'tutelage[llm]'") from None
    return transformers  # type: ignore[no-any-return]


def _settings(
    library: ModuleType,
    name: str,
    config: ModelConfig,
    outputs: int | None,
    input_shape: tuple[int, ...],
    where: dict[str, Any],
) -> Any:
    try:
        settings = library.AutoConfig.from_pretrained(name, **where)
    except (OSError, ValueError) as error:
        raise ModelError(f"hf:{name} cannot be had: {str(error).splitlines()[0]}") from None
    for key, value in config.options.items():
        if not hasattr(settings, key):
            near = nearest(key, list(settings.to_dict()))
            raise ModelError(f"hf:{name} has no option {key!r}; near: {', '.join(near) or 'none'}")
        setattr(settings, key, value)
    if outputs is not None:
        settings.num_labels = outputs
    if config.weights is None and len(input_shape) == 3:
        own: dict[str, Any] = {"num_channels": input_shape[0], "image_size": _side(input_shape)}
        for key in own.keys() - config.options.keys():
            if hasattr(settings, key):
                setattr(settings, key, own[key])
    return settings


def _auto_class(library: ModuleType, name: str, settings: Any) -> Any:
    from transformers.models.auto import modeling_auto

    custom = getattr(settings, "auto_map", None) or {}
    for auto, known in (
        ("AutoModelForImageClassification", modeling_auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES),
        ("AutoModelForSequenceClassification", modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES),
    ):
        if settings.model_type in known or auto in custom:
            return getattr(library, auto)
    raise ModelError(
        f"hf:{name} is a {settings.model_type}, which transformers has no image or text classifier for"
    )


def _pretrained(library: ModuleType, auto: Any, source: str, settings: Any, where: dict[str, Any]) -> Parts:
    try:
        # The head is made anew where the weights have other classes.
        module = auto.from_pretrained(
            source, config=settings, use_safetensors=True, ignore_mismatched_sizes=True, **where
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise ModelError(f"weights of hf:{source} cannot be loaded: {str(error).splitlines()[0]}") from None
    try:
        found, _ = library.ImageProcessingMixin.get_image_processor_dict(source, revision=where["revision"])
    except OSError:
        return module, None, None
    mean, std = found.get("image_mean"), found.get("image_std")
    return module, tuple(mean) if mean else None, tuple(std) if std else None


def _side(input_shape: tuple[int, ...]) -> int | list[int]:
    height, width = input_shape[1:]
    return height if height == width else [height, width]
