"""What can be tapped in a model, from its name alone."""

from __future__ import annotations

import torch

from tutelage.engine.taps import TapInfo, list_taps
from tutelage.models.build import build_model
from tutelage.models.names import ModelError, parse_name
from tutelage.recipe.schema import ModelConfig

ROWS = 2
TOKENS = 16


def tap_table(
    model: ModelConfig | str, outputs: int = 10, input_shape: tuple[int, ...] | None = None
) -> list[TapInfo]:
    """Every module of a model that gives a tensor, in firing order, with shape and depth; weights are random.

    Args:
        model: a name, or a configuration with options.
        input_shape: of one row; left out: the size that the architecture was made for.

    Raises:
        ModelError: no such model, or one that does not run on such rows.
    """
    config = (
        ModelConfig(model=model) if isinstance(model, str) else model.model_copy(update={"weights": None})
    )
    family, name = parse_name(config.model)
    shape = default_input(family, name) if input_shape is None else input_shape
    module = build_model(config, outputs=outputs, input_shape=shape).module
    settings = getattr(module, "config", None)
    text = (
        family in ("hf", "config")
        and not hasattr(settings, "image_size")
        and not hasattr(settings, "num_channels")
    )
    inputs = torch.zeros(ROWS, TOKENS, dtype=torch.long) if text else torch.zeros(ROWS, *shape)
    if text:
        assert settings is not None
        settings.pad_token_id = settings.pad_token_id or 0
    try:
        return list_taps(module, inputs)
    except (RuntimeError, ValueError, AssertionError) as error:
        raise ModelError(f"{config.model} does not run on rows of shape {list(shape)}: {error}") from error


def default_input(family: str, name: str) -> tuple[int, ...]:
    """Shape of the rows that an architecture was made for."""
    if family == "timm":
        from tutelage.models.timm_models import default_input as of_timm

        return of_timm(name)
    return {"cifar": (3, 32, 32), "digits": (1, 8, 8), "hf": (3, 224, 224), "config": (3, 224, 224)}[family]
