"""Configurations of transformers: from a hub name, a folder or a model type, with options, sizes and a task's class."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import torch

from tutelage.models.names import ModelError, nearest
from tutelage.models.vocabulary import Vocabulary, fit_vocabulary, text_of
from tutelage.recipe.schema import ModelConfig

_CLASSES = {
    "language-model": (("AutoModelForCausalLM", "CAUSAL_LM"),),
    "token-classification": (("AutoModelForTokenClassification", "TOKEN_CLASSIFICATION"),),
}
_CLASSIFIERS = (
    ("AutoModelForImageClassification", "IMAGE_CLASSIFICATION"),
    ("AutoModelForSequenceClassification", "SEQUENCE_CLASSIFICATION"),
)
_MADE_FOR = {
    "language-model": "causal language model",
    "token-classification": "classifier of tokens",
}
_FIXED = frozenset({"architectures", "dtype", "model_type", "torch_dtype", "transformers_version"})
_SIZES = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
_FLASH = {"flash_attention_2": "is_flash_attn_2_available", "flash_attention_3": "is_flash_attn_3_available"}


def named_settings(library: ModuleType, name: str, config: ModelConfig, where: dict[str, Any]) -> Any:
    """The configuration of a hub name or a local folder, with the recipe's options.

    Raises:
        ModelError: it cannot be had, or an option is unknown or does not fit.
    """
    try:
        own = library.AutoConfig.from_pretrained(name, **where)
    except (OSError, ValueError) as error:
        if "trust_remote_code" in str(error):
            raise ModelError(
                f"hf:{name} comes with code of its own, which runs only if you say so: read it, then set "
                "trust_remote_code: true beside the model"
            ) from None
        raise ModelError(f"hf:{name} cannot be had: {str(error).splitlines()[0]}") from None
    if not config.options:
        return own
    _check_options(config, own)
    written = type(own).get_config_dict(name, revision=where["revision"])[0] | {"name_or_path": name}
    if "num_hidden_layers" in config.options:
        written.pop("layer_types", None)  # a list with an entry for each of the old layers
    return _made(config, lambda: type(own).from_dict(written | config.options))


def typed_settings(library: ModuleType, kind: str, config: ModelConfig) -> Any:
    """The configuration of an architecture, by its model type and the recipe's options alone.

    Raises:
        ModelError: no such type or option, or sizes that do not fit.
    """
    known = list(library.CONFIG_MAPPING)
    if kind not in known:
        raise ModelError(
            f"unknown model {config.model!r}: transformers has no model type {kind!r}; near: "
            f"{', '.join(nearest(kind, known)) or 'none'}"
        )
    _check_options(config, _made(config, lambda: library.AutoConfig.for_model(kind)))
    return _made(config, lambda: library.AutoConfig.for_model(kind, **config.options))


def fit_settings(
    settings: Any,
    config: ModelConfig,
    outputs: int | None,
    input_shape: tuple[int, ...],
    task: str,
    vocabulary: Vocabulary | None,
) -> None:
    """Set what follows from data and tokeniser, for a model with random weights all of it.

    Raises:
        ModelError: sizes that do not fit.
    """
    new = config.weights is None
    if task == "language-model" and getattr(settings, "is_decoder", None) is False:
        raise ModelError(
            f"{config.model} is an encoder, which sees the tokens that it should foretell; set options.is_decoder=true"
        )
    if outputs is not None and task != "language-model":
        settings.num_labels = outputs
    if new and len(input_shape) == 3:
        own: dict[str, Any] = {"num_channels": input_shape[0], "image_size": _side(input_shape)}
        for key in own.keys() - config.options.keys():
            if hasattr(settings, key):
                setattr(settings, key, own[key])
    if hasattr(text_of(settings), "vocab_size"):
        tokens = outputs if vocabulary is None and task == "language-model" else None
        fit_vocabulary(config, settings, Vocabulary(tokens) if tokens else vocabulary)
    if new and task == "language-model":
        text_of(settings).pad_token_id = None  # set once the weights are drawn; see `settle`
    _check_sizes(config.model, text_of(settings))


def auto_class(library: ModuleType, name: str, settings: Any, task: str) -> Any:
    """The class of transformers that makes models of this configuration for a task.

    Raises:
        ModelError: there is none.
    """
    from transformers.models.auto import modeling_auto

    custom = getattr(settings, "auto_map", None) or {}
    for auto, mapping in _CLASSES.get(task, _CLASSIFIERS):
        known = getattr(modeling_auto, f"MODEL_FOR_{mapping}_MAPPING_NAMES")
        if settings.model_type in known or auto in custom:
            return getattr(library, auto)
    wanted = _MADE_FOR.get(task, "image or text classifier")
    raise ModelError(f"{name} is a {settings.model_type}, which transformers has no {wanted} for")


def model_class(auto: Any, settings: Any, config: ModelConfig) -> type:
    """The class of the model itself; found by building it without memory, so that sizes that do not fit show before
    anything is loaded.

    Raises:
        ModelError: it cannot be built, or does not know the attention that the recipe names.
    """
    if config.trust_remote_code:  # such code may read its own weights while it is built
        kind = type(auto.from_config(settings, trust_remote_code=config.trust_remote_code))
    else:
        with torch.device("meta"):
            kind = type(_made(config, lambda: auto.from_config(settings, dtype=torch.float32)))
    check_attention(config.model, kind, config.attention)
    return kind


def check_attention(name: str, kind: Any, attention: str | None) -> None:
    """Raises:
    ModelError: the architecture does not know this attention, or its package is not installed.
    """
    flags = {
        "sdpa": "_supports_sdpa",
        "flash_attention_2": "_supports_flash_attn",
        "flash_attention_3": "_supports_flash_attn",
        "flex_attention": "_supports_flex_attn",
    }
    supported = ["eager", *(each for each, flag in flags.items() if getattr(kind, flag, False))]
    if attention is not None and attention not in supported:
        raise ModelError(
            f"{name}: {kind.__name__} has no attention {attention!r}; it has {', '.join(supported)}"
        )
    if attention in _FLASH:
        import transformers.utils as utils

        # Without the package transformers would fetch a kernel from the hub, and run it.
        if not getattr(utils, _FLASH[attention])():
            raise ModelError(
                f"{name}: {attention} needs the package flash-attn and a GPU; take sdpa, or install it"
            )


def _check_options(config: ModelConfig, settings: Any) -> None:
    names = (*settings.to_dict(), *settings.attribute_map)
    known = [name for name in names if not name.startswith("_") and name not in _FIXED]
    for option in config.options:
        if option not in known:
            near = ", ".join(nearest(option, known)) or "none"
            raise ModelError(f"{config.model} has no option {option!r}; near: {near}")


@contextlib.contextmanager
def hushed() -> Iterator[None]:
    """Run the block without transformers' progress bars, reports and warnings: what does not fit is an error here."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def _made(config: ModelConfig, make: Callable[[], Any]) -> Any:
    try:
        with hushed():
            return make()
    except Exception as error:  # an architecture raises what it likes
        reason = str(error).strip().splitlines() or [type(error).__name__]
        options = f" with options {config.options}" if config.options else ""
        raise ModelError(f"{config.model} cannot be built{options}: {reason[-1].strip()}") from error


def _check_sizes(name: str, text: Any) -> None:
    sizes = {size: value for size in _SIZES if isinstance(value := getattr(text, size, None), int)}
    for size, value in sizes.items():
        if value < 1:
            raise ModelError(f"{name}: {size} is {value}; it must be at least 1")
    heads, width = sizes.get("num_attention_heads"), sizes.get("hidden_size")
    if heads and width and not getattr(text, "head_dim", None) and width % heads:
        raise ModelError(f"{name}: hidden_size {width} does not divide into num_attention_heads {heads}")
    shared = getattr(text, "num_key_value_heads", None)
    if heads and isinstance(shared, int) and (shared < 1 or heads % shared):
        raise ModelError(
            f"{name}: num_attention_heads {heads} is no multiple of num_key_value_heads {shared}; set both in options"
        )


def _side(input_shape: tuple[int, ...]) -> int | list[int]:
    height, width = input_shape[1:]
    return height if height == width else [height, width]
