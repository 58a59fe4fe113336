"""What building a model gives."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import nn

Channels = tuple[float, ...] | None


def channels(values: Any) -> Channels:
    """Values by channel as they stand in a file; none where there are none."""
    return tuple(float(value) for value in values) if values else None


class BuiltModel(NamedTuple):
    """A model with its input normalisation.

    Attributes:
        module: the bare model.
        mean, std: by channel, as its weights or the recipe want them; none: the data's are to be used.
        description: JSON-able, enough to build it again: a `ModelConfig`'s fields, ``outputs`` and ``input_shape``.
    """

    module: nn.Module
    mean: Channels
    std: Channels
    description: dict[str, Any]
