"""From a name, a module or a factory to a model with weights drawn from one seed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from tutelage.engine.rng import seeded
from tutelage.models.built import BuiltModel, Channels, channels
from tutelage.models.cifar import cifar_net
from tutelage.models.digits import digits_net
from tutelage.models.names import ModelError, parse_name
from tutelage.models.weights import Weights, find_weights, load_strict
from tutelage.recipe.schema import ModelConfig

PYTHON = "python"
"""What the description of a module from Python says: it cannot be built again from its name."""

Parts = tuple[nn.Module, Channels, Channels]


def build_model(
    model: ModelConfig | str | nn.Module | Callable[[], nn.Module],
    *,
    outputs: int | None,
    input_shape: tuple[int, ...],
    seed: int = 0,
) -> BuiltModel:
    """Build a model. Random weights depend on ``seed`` alone, and the global generators are left as they were.

    Args:
        model: a configuration or a name (`tutelage.models.names`), a module, or a function that makes one.
        outputs: classes (values of a regression); none: as the weights have them.
        input_shape: of one row: ``(channels, height, width)`` or ``(features,)``.

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
        module, mean, std = _build(config, family, name, outputs, input_shape)
    description = config.model_dump(mode="json") | {
        "outputs": outputs if outputs is not None else _outputs(module),
        "input_shape": list(input_shape),
    }
    return BuiltModel(module, config.mean or mean, config.std or std, description)


def _build(
    config: ModelConfig, family: str, name: str, outputs: int | None, input_shape: tuple[int, ...]
) -> Parts:
    if family == "timm":
        from tutelage.models.timm_models import build_timm

        return build_timm(config, name, outputs, input_shape)
    if family == "hf":
        from tutelage.models.hf_models import build_hf

        return build_hf(config, name, outputs, input_shape)
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
        _check_options(config, ("head_bias",))
        module = digits_net(name, classes, input_shape, head_bias=bool(config.options.get("head_bias", True)))
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


def _outputs(module: nn.Module) -> Any:
    """Classes of a model that was built with those of its weights."""
    settings = getattr(module, "config", None)
    if settings is not None:
        return settings.num_labels
    head: Any = module.get_submodule("head") if not hasattr(module, "num_classes") else None
    return module.num_classes if head is None else head.out_features
