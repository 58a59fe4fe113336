"""From a name, a module or a factory to a model with weights drawn from one seed."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from torch import nn

from tutelage.engine.rng import seeded
from tutelage.models.built import BuiltModel, Channels, channels
from tutelage.models.cifar import cifar_net
from tutelage.models.digits import digits_net
from tutelage.models.names import ModelError, parse_name
from tutelage.models.vocabulary import Vocabulary, text_of
from tutelage.models.weights import Weights, find_weights, load_strict
from tutelage.recipe.schema import ModelConfig

PYTHON = "python"
"""What the description of a module from Python says: it cannot be built again from its name."""

TEXT_TASKS = ("language-model", "token-classification")
Parts = tuple[nn.Module, Channels, Channels]


def build_model(
    model: ModelConfig | str | nn.Module | Callable[[], nn.Module],
    *,
    outputs: int | None,
    input_shape: tuple[int, ...],
    seed: int = 0,
    task: str = "classification",
    vocabulary: Vocabulary | None = None,
) -> BuiltModel:
    """Build a model. Random weights depend on ``seed`` alone, and the global generators are left as they were.

    Args:
        model: a configuration or a name (`tutelage.models.names`), a module, or a function that makes one.
        outputs: classes, values of a regression, or tokens of a language model's tokeniser; none: as the weights have.
        input_shape: of one row: ``(channels, height, width)``, ``(features,)`` or ``(tokens,)``.
        task: the recipe's; it decides which head a model of transformers gets.
        vocabulary: of the tokeniser, whose special tokens the configuration is to name.

    Raises:
        ModelError: no such model, option or weights, or they do not fit one another.
    """
    if isinstance(model, nn.Module):
        return BuiltModel(model, None, None, {"model": PYTHON})
    if not isinstance(model, (str, ModelConfig)):
        with seeded(seed):
            made = model()
        if not isinstance(made, nn.Module):
            raise ModelError(f"the model factory returned a {type(made).__name__}, not a torch module")
        return BuiltModel(made, None, None, {"model": PYTHON})
    config = ModelConfig(model=model) if isinstance(model, str) else model
    family, name = parse_name(config.model)
    with seeded(seed):
        module, mean, std = _build(config, family, name, outputs, input_shape, task, vocabulary)
    description = config.model_dump(mode="json") | {
        "outputs": outputs if outputs is not None else _outputs(module, task),
        "input_shape": list(input_shape),
        "task": task,
    }
    return BuiltModel(module, config.mean or mean, config.std or std, description)


def _build(
    config: ModelConfig,
    family: str,
    name: str,
    outputs: int | None,
    input_shape: tuple[int, ...],
    task: str,
    vocabulary: Vocabulary | None,
) -> Parts:
    if family in ("hf", "config"):
        from tutelage.models.hf_models import build_hf

        return build_hf(config, name, outputs, input_shape, task, vocabulary)
    if task in TEXT_TASKS:
        raise ModelError(f"{config.model} reads no tokens; {task} takes an `hf:` or `config:` model")
    if family == "timm":
        from tutelage.models.timm_models import build_timm

        return build_timm(config, name, outputs, input_shape)
    return _build_own(config, family, name, outputs, input_shape)


def _build_own(
    config: ModelConfig, family: str, name: str, outputs: int | None, input_shape: tuple[int, ...]
) -> Parts:
    weights = _own_weights(config)
    classes = outputs if outputs is not None else weights and weights.rows("head.weight")
    if not classes:
        raise ModelError(f"{config.model} needs the number of classes, or weights that say it")
    if family == "cifar":
        _check_options(config, ())
        if len(input_shape) != 3:
            raise ModelError(
                f"{config.model} takes images [channels, height, width]; got {list(input_shape)}"
            )
        module = cifar_net(name, classes, input_shape[0])
    else:
        _check_options(config, ("head_bias", "confidence"))
        bias, confidence = (config.options.get(*each) for each in (("head_bias", True), ("confidence", 1.0)))
        if isinstance(confidence, bool | str) or not 0 < confidence < math.inf:
            raise ModelError(f"{config.model}: confidence is {confidence!r}; allowed: numbers above 0")
        module = digits_net(name, classes, input_shape, head_bias=bool(bias), confidence=confidence)
    if weights is None:
        return module, None, None
    load_strict(module, weights)
    return module, channels(weights.card.get("mean")), channels(weights.card.get("std"))


def _own_weights(config: ModelConfig) -> Weights | None:
    if config.weights == "pretrained":
        raise ModelError(
            f"{config.model} has no published weights; give a safetensors file or a run's student folder"
        )
    return None if config.weights is None else find_weights(config.weights, config.revision)


def _check_options(config: ModelConfig, allowed: tuple[str, ...]) -> None:
    for option in config.options:
        if option not in allowed:
            raise ModelError(
                f"{config.model} has no option {option!r}; it has {', '.join(allowed) or 'none'}"
            )


def _outputs(module: nn.Module, task: str) -> Any:
    """Classes (tokens) of a model that was built with those of its weights."""
    settings = getattr(module, "config", None)
    if settings is not None:
        return text_of(settings).vocab_size if task == "language-model" else settings.num_labels
    head: Any = module.get_submodule("head") if not hasattr(module, "num_classes") else None
    return module.num_classes if head is None else head.out_features
