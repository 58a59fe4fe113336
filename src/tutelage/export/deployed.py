"""What is deployed: the student alone, with its input normalisation inside."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from tutelage.engine.calling import call_model, named_outputs
from tutelage.engine.types import Inputs
from tutelage.models import BuiltModel

INPUT, OUTPUT = "inputs", "logits"


def without_place(name: str) -> str:
    """A model's or data set's name; where it is a path of this machine, the last part of it."""
    family, rest = re.fullmatch(r"(hf:|hub:)?(.*)", name, re.DOTALL).groups(default="")  # type: ignore[union-attr]
    return family + Path(rest).name if Path(rest).is_absolute() else name


class Deployed(nn.Module):
    """Rows as the data gives them (images: float32 in [0, 1]; texts: keyword tensors) to logits: nobody has to remember
    mean and std.

    Args:
        model: gives logits from normalised rows.
        mean, std: by channel, or one value for all; none: rows are taken as they are.
        dimensions: axes of a batch of rows.
    """

    mean: Tensor | None
    std: Tensor | None

    def __init__(
        self, model: nn.Module, mean: Sequence[float] | None, std: Sequence[float] | None, dimensions: int
    ) -> None:
        super().__init__()
        self.model = model
        shape = (-1, *[1] * (dimensions - 2))
        for name, values in {"mean": mean, "std": std}.items():
            tensor = None if values is None else torch.tensor(values, dtype=torch.float32).view(shape)
            self.register_buffer(name, tensor)

    def forward(self, inputs: Inputs) -> Tensor:
        if isinstance(inputs, Tensor) and self.mean is not None and self.std is not None:
            inputs = (inputs - self.mean) / self.std
        return named_outputs(call_model(self.model, inputs))["logits"]


def deployed(built: BuiltModel, model: nn.Module | None = None) -> Deployed:
    """The built model (or ``model`` in its place), in eval mode."""
    dimensions = 1 + len(built.description["input_shape"])
    return Deployed(model or built.module, built.mean, built.std, dimensions).eval()
