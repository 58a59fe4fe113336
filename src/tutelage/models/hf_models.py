"""Architectures and weights of transformers, for images and for text. Weights come as safetensors alone."""

from __future__ import annotations

import warnings
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from tutelage.models.adapters import add_lora
from tutelage.models.built import Channels, channels
from tutelage.models.flash import prepare_flash
from tutelage.models.hf_config import (
    auto_class,
    fit_settings,
    hushed,
    model_class,
    named_settings,
    typed_settings,
)
from tutelage.models.names import ModelError
from tutelage.models.vocabulary import Vocabulary, settle, text_of
from tutelage.models.weights import Weights, check_fit, find_weights
from tutelage.recipe.schema import ModelConfig

Parts = tuple[nn.Module, Channels, Channels]


class RemoteCodeWarning(UserWarning):
    """Code that comes with a model is about to be run, as the recipe allows."""


def build_hf(
    config: ModelConfig,
    name: str,
    outputs: int | None,
    input_shape: tuple[int, ...],
    task: str,
    vocabulary: Vocabulary | None,
) -> Parts:
    """A model of transformers for a task, with the input normalisation of its weights (none where they are random).

    Args:
        name: a name on the hub, or a local folder; of a `config:` model its type.
        outputs: classes, or the tokeniser's tokens; none: those of the configuration.
        vocabulary: of the tokeniser, where there is one.

    Raises:
        ModelError: no such model, none for this task, wrong options, or weights that do not fit.
    """
    library = _transformers()
    if config.trust_remote_code:
        _name_code(name if config.weights is None else f"{name}, weights {config.weights}")
    where: dict[str, Any] = {"revision": config.revision, "trust_remote_code": config.trust_remote_code}
    settings = _settings(library, config, name, where)
    auto = auto_class(library, config.model, settings, task)
    weights = _file(config)
    if weights is not None and "vocab_size" in weights.config and "vocab_size" not in config.options:
        text_of(settings).vocab_size = weights.config["vocab_size"]
    fit_settings(settings, config, outputs, input_shape, task, vocabulary)
    kind = model_class(auto, settings, config)
    dtype = getattr(torch, config.dtype)
    mean = std = None
    if config.weights is None:
        module = auto.from_config(settings, dtype=dtype, trust_remote_code=config.trust_remote_code)
    elif weights is None:
        source = name if config.weights == "pretrained" else config.weights.removeprefix("hub:")
        module, mean, std = _pretrained(library, auto, source, settings, where | {"dtype": dtype}, task)
    else:
        module = _strictly(library, kind, settings, weights, dtype)
        mean, std = channels(weights.card.get("mean")), channels(weights.card.get("std"))
    _finish(module, config)
    if task == "language-model":
        settle(module, vocabulary, new=config.weights is None)
    if config.lora is not None:
        add_lora(module, config.lora, task)
    return module, mean, std


def _settings(library: ModuleType, config: ModelConfig, name: str, where: dict[str, Any]) -> Any:
    if not config.model.startswith("config:"):
        # With weights from elsewhere the revision is theirs, not the configuration's.
        own = where if config.weights in (None, "pretrained") else where | {"revision": None}
        return named_settings(library, name, config, own)
    if config.weights == "pretrained":
        raise ModelError(
            f"{config.model} has no published weights; give hub:NAME, a safetensors file or a run's student folder"
        )
    return typed_settings(library, name, config)


def _file(config: ModelConfig) -> Weights | None:
    """Weights that lie in a file here; none where they are random or transformers finds them by name."""
    if config.weights in (None, "pretrained") or str(config.weights).startswith("hub:"):
        return None
    return find_weights(str(config.weights), config.revision)


def _finish(module: Any, config: ModelConfig) -> None:
    """Attention by name, and no cache of keys and values but in `generate`: with one, transformers no longer keeps the
    documents of a packed row apart.

    Raises:
        ModelError: half precision for what is no text model.
    """
    if config.dtype != "float32" and module.main_input_name != "input_ids":
        raise ModelError(
            f"{config.model} reads {module.main_input_name}, which come in float32; leave dtype out, and set "
            "train.precision"
        )
    if config.attention is not None:
        module.set_attn_implementation(config.attention)
    prepare_flash(module)
    if getattr(module.config, "use_cache", None):
        if module.can_generate():
            module.generation_config.use_cache = True
        module.config.use_cache = False


def save_hf(module: Any, folder: Path) -> None:
    """``config.json`` and ``model.safetensors``, as `save_pretrained` writes them."""
    caching = module.can_generate() and module.generation_config.use_cache
    own = getattr(module.config, "use_cache", None)
    try:
        if caching and own is False:
            module.config.use_cache = True  # off in training alone
        with hushed():
            module.save_pretrained(folder, max_shard_size="1TB")
    finally:
        if own is not None:
            module.config.use_cache = own


def load_hf(weights: Weights, config: ModelConfig, task: str) -> nn.Module:
    """A model that `save_hf` wrote, from the ``config.json`` beside its weights.

    Args:
        config: its ``model`` is what messages say; its ``attention``, ``dtype`` and ``trust_remote_code`` hold.
    """
    library, folder = _transformers(), weights.file.parent
    if config.trust_remote_code:
        _name_code(str(folder))
    settings = library.AutoConfig.from_pretrained(folder, trust_remote_code=config.trust_remote_code)
    kind = model_class(auto_class(library, str(folder), settings, task), settings, config)
    module = _strictly(library, kind, settings, weights, getattr(torch, config.dtype))
    _finish(module, config)
    if task == "language-model":
        settle(module, None, new=False)
    return module


def _name_code(source: str) -> None:
    """Say it before anything is loaded."""
    warnings.warn(
        f"hf:{source}: code that comes with this model may run now, with your rights (trust_remote_code is true)",
        RemoteCodeWarning,
        stacklevel=3,
    )


def _strictly(
    library: ModuleType, kind: Any, settings: Any, weights: Weights, dtype: torch.dtype
) -> nn.Module:
    """The weights of a file, every tensor in its place. transformers loads them: the names on disk may be older than
    those of the modules."""
    weights.shapes()
    with hushed():
        module, found = kind.from_pretrained(
            None,
            config=settings,
            state_dict=load_file(weights.file),
            dtype=dtype,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        )
    check_fit(weights.source, module, _mismatched(found), found["missing_keys"], found["unexpected_keys"])
    beside = weights.file.parent / "generation_config.json"
    if module.can_generate() and beside.is_file():
        module.generation_config = library.GenerationConfig.from_pretrained(beside.parent)
    return module  # type: ignore[no-any-return]


def _mismatched(found: dict[str, Any]) -> list[str]:
    return [
        f"{name} is {list(there)} there and {list(here)} here"
        for name, there, here in found["mismatched_keys"]
    ]


def _transformers() -> ModuleType:
    try:
        import transformers
    except ImportError:
        raise ModelError(
            "`hf:` and `config:` models need transformers: pip install 'tutelage[llm]'"
        ) from None
    return transformers  # type: ignore[no-any-return]


def _pretrained(
    library: ModuleType, auto: Any, source: str, settings: Any, where: dict[str, Any], task: str
) -> Parts:
    try:
        with hushed():
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
    _check_body(f"hf:{source}", module, found, task)
    try:
        images, _ = library.ImageProcessingMixin.get_image_processor_dict(source, revision=where["revision"])
    except OSError:
        return module, None, None
    return module, channels(images.get("image_mean")), channels(images.get("image_std"))


def _check_body(source: str, module: Any, found: dict[str, Any], task: str) -> None:
    """What may be made anew: of a language model nothing; of a classifier its head, where the weights have other
    classes or none, and poolers, which weights of masked language models lack. Where the prefix of the body tells
    nothing (CLIP's names no tensor, timm's every one), as much as half of all tensors may be.

    Raises:
        ModelError: anything else is missing or has another shape.
    """
    wrong, missing = _mismatched(found), list(found["missing_keys"])
    if task != "language-model":
        names, body = module.state_dict(), f"{module.base_model_prefix}."
        if 0 < sum(name.startswith(body) for name in names) < len(names):
            wrong = [line for line in wrong if line.startswith(body)]
            missing = [name for name in missing if name.startswith(body) and ".pooler." not in name]
        elif len(wrong) + len(missing) <= len(names) / 2:
            return
    check_fit(source, module, wrong, missing, found["unexpected_keys"] if missing else ())
