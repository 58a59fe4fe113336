"""Architectures and weights of transformers, for images and for text. Weights come as safetensors alone."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from tutelage.models.built import Channels, channels
from tutelage.models.names import ModelError, nearest
from tutelage.models.weights import Weights, check_fit, find_weights
from tutelage.recipe.schema import ModelConfig

Parts = tuple[nn.Module, Channels, Channels]


class RemoteCodeWarning(UserWarning):
    """Code that comes with a model is about to be run, as the recipe allows."""


def build_hf(config: ModelConfig, name: str, outputs: int | None, input_shape: tuple[int, ...]) -> Parts:
    """A classifier of transformers, with the input normalisation of its weights (none where they are random).

    Args:
        name: a name on the hub, or a local folder.
        outputs: classes; none: those of the configuration.

    Raises:
        ModelError: no such model, one that is no classifier, wrong options, or weights that do not fit.
    """
    library = _transformers()
    if config.trust_remote_code:
        _name_code(name if config.weights is None else f"{name}, weights {config.weights}")
    where: dict[str, Any] = {"revision": config.revision, "trust_remote_code": config.trust_remote_code}
    # With weights from elsewhere the revision is theirs, not the configuration's.
    own = where if config.weights in (None, "pretrained") else where | {"revision": None}
    settings = _settings(library, name, config, outputs, input_shape, own)
    auto = _auto_class(library, name, settings)
    if config.weights is None:
        return auto.from_config(settings, trust_remote_code=config.trust_remote_code), None, None
    if config.weights == "pretrained" or config.weights.startswith("hub:"):
        source = name if config.weights == "pretrained" else config.weights.removeprefix("hub:")
        return _pretrained(library, auto, source, settings, where)
    weights = find_weights(config.weights, config.revision)
    module = _strictly(library, auto, settings, weights, config.trust_remote_code)
    return module, channels(weights.card.get("mean")), channels(weights.card.get("std"))


def save_hf(module: Any, folder: Path) -> None:
    """``config.json`` and ``model.safetensors``, as `save_pretrained` writes them."""
    with hushed(_transformers()):
        module.save_pretrained(folder, max_shard_size="1TB")


def load_hf(weights: Weights, *, trust_remote_code: bool) -> nn.Module:
    """A model that `save_hf` wrote."""
    library, folder = _transformers(), weights.file.parent
    if trust_remote_code:
        _name_code(str(folder))
    settings = library.AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    return _strictly(
        library, _auto_class(library, str(folder), settings), settings, weights, trust_remote_code
    )


def _name_code(source: str) -> None:
    """Say it before anything is loaded."""
    warnings.warn(
        f"hf:{source}: code that comes with this model may run now, with your rights (trust_remote_code is true)",
        RemoteCodeWarning,
        stacklevel=3,
    )


def _strictly(
    library: ModuleType, auto: Any, settings: Any, weights: Weights, trust_remote_code: bool
) -> nn.Module:
    """The weights of a file, every tensor in its place. transformers loads them: the names on disk may be older than
    those of the modules."""
    weights.shapes()
    kind: Any = type(auto.from_config(settings, trust_remote_code=trust_remote_code))
    with hushed(library):
        module, found = kind.from_pretrained(
            None,
            config=settings,
            state_dict=load_file(weights.file),
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        )
    wrong = [
        f"{name} is {list(there)} there and {list(here)} here"
        for name, there, here in found["mismatched_keys"]
    ]
    check_fit(weights.source, module, wrong, found["missing_keys"], found["unexpected_keys"])
    return module  # type: ignore[no-any-return]


@contextlib.contextmanager
def hushed(library: ModuleType) -> Iterator[None]:
    """Run the block without transformers' progress bars and loading reports: what does not fit is an error here."""
    logging = library.utils.logging
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


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
        if "trust_remote_code" in str(error):
            raise ModelError(
                f"hf:{name} comes with code of its own, which runs only if you say so: read it, then set "
                "trust_remote_code: true beside the model"
            ) from None
        raise ModelError(f"hf:{name} cannot be had: {str(error).splitlines()[0]}") from None
    for key, value in config.options.items():
        known = [own for own in settings.to_dict() if not own.startswith("_")]
        if key not in known:
            near = nearest(key, known)
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
        with hushed(library):
            # The head is made anew where the weights have other classes, or none.
            module, found = auto.from_pretrained(
                source,
                config=settings,
                use_safetensors=True,
                ignore_mismatched_sizes=True,
                output_loading_info=True,
                **where,
            )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise ModelError(f"weights of hf:{source} cannot be loaded: {str(error).splitlines()[0]}") from None
    if len(found["missing_keys"]) > len(module.state_dict()) / 2:
        check_fit(f"hf:{source}", module, [], found["missing_keys"], found["unexpected_keys"])
    try:
        images, _ = library.ImageProcessingMixin.get_image_processor_dict(source, revision=where["revision"])
    except OSError:
        return module, None, None
    return module, channels(images.get("image_mean")), channels(images.get("image_std"))


def _side(input_shape: tuple[int, ...]) -> int | list[int]:
    height, width = input_shape[1:]
    return height if height == width else [height, width]
