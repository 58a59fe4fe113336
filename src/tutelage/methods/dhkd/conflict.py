"""How far two losses pull a network's classifier, and the rest of it, in different directions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tutelage.engine.types import Plot, Table
from tutelage.methods.dhkd.functional import gradient_dot

PARTS = ("classifier", "trunk")


class GradientConflict(nn.Module):
    """Mean cosine, by epoch, of the gradients that two losses give the classifier, and the rest of the student.

    A part that only one of the losses reaches has none.
    """

    sums: Tensor
    steps: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("sums", torch.zeros(len(PARTS)))
        self.register_buffer("steps", torch.zeros(()))
        self.by_epoch: list[list[float | None]] = []

    @torch.no_grad()
    def add(
        self, primary: Sequence[Tensor | None], secondary: Sequence[Tensor | None], names: Sequence[str]
    ) -> None:
        """Count one step; ``names`` say which part an entry belongs to, and ``""`` that it is left out."""
        for part, wanted in enumerate(PARTS):
            one, two = (
                [g for g, name in zip(gs, names, strict=True) if name == wanted]
                for gs in (primary, secondary)
            )
            product = gradient_dot(one, one) * gradient_dot(two, two)
            cosine = gradient_dot(one, two) / product.sqrt()
            self.sums[part] += torch.where(product > 0, cosine, torch.nan)
        self.steps += 1

    def end_epoch(self) -> None:
        """Keep the epoch's means, and start anew."""
        means = (self.sums / self.steps).tolist()
        self.by_epoch.append([None if mean != mean else mean for mean in means])
        self.sums.zero_()
        self.steps.zero_()

    def table(self) -> Table:
        rows: list[list[Any]] = [[number, *cosines] for number, cosines in enumerate(self.by_epoch, start=1)]
        return Table(["epoch", *PARTS], rows, plots=(Plot("epoch", PARTS),))

    def get_extra_state(self) -> list[list[float | None]]:
        return self.by_epoch

    def set_extra_state(self, state: list[list[float | None]]) -> None:
        self.by_epoch = [list(row) for row in state]
