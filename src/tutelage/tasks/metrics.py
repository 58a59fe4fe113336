"""A metric as it is collected row by row: exact over any cut into batches and ranks, and for any choice of rows."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from tutelage.engine.types import Batch, Outputs

Values = tuple[Tensor, ...]
RowValues = Callable[[Outputs, Batch, Outputs | None], Values]
Reduction = Callable[..., Tensor]


class RowMetric:
    """A metric made from a few values a row, kept on the model's device until they are asked for.

    torchmetrics' own classes sync their states through collectives that fail where a rank has seen no row, and give one
    figure only; kept by row, one pass serves the whole split and every group of it.

    Args:
        values: from outputs, batch and the teacher's outputs: tensors ``[rows, ...]``. It must stand masked rows,
            whatever their target is.
        reduction: from those, of all valid rows in float64 on the CPU: the metric.
        teacher: whether ``values`` reads the teacher's outputs.
    """

    def __init__(self, values: RowValues, reduction: Reduction, *, teacher: bool = False) -> None:
        self.values, self.reduction, self.teacher = values, reduction, teacher
        self._collected: list[Values] = []

    def update(self, outputs: Outputs, batch: Batch, teacher_outputs: Outputs | None = None) -> None:
        """Collect a batch; nothing is copied to the host."""
        values = self.values(outputs, batch, teacher_outputs)
        self._collected.append((valid_rows(batch), *(value.detach() for value in values)))

    def state(self) -> list[Tensor]:
        """What was collected, on the CPU: the rows that count (bool), then each value; empty where nothing was."""
        if not self._collected:
            return []
        merged = tuple(
            torch.cat([part.cpu() for part in parts]) for parts in zip(*self._collected, strict=True)
        )
        self._collected = [merged]
        return list(merged)

    def load_state(self, states: Sequence[list[Tensor]]) -> None:
        """Go on from what several ranks collected, in their order."""
        self._collected = [tuple(state) for state in states if state]

    def compute(self, rows: Tensor | None = None) -> float | None:
        """The metric over all valid rows, or over those of them that ``rows`` (``[rows]`` bool) chooses.

        Gives None where it is not defined: no valid row, or too few of them (r2 of one row).
        """
        state = self.state()
        if not state:
            return None
        valid, *values = state
        chosen = valid if rows is None else valid & rows
        if not bool(chosen.any()):
            return None
        wide = (value[chosen] for value in values)
        result = float(
            self.reduction(*(value.double() if value.is_floating_point() else value for value in wide))
        )
        return None if math.isnan(result) else result


def mean(values: Tensor) -> Tensor:
    return values.double().mean()


def ratio(total: Tensor, count: Tensor) -> Tensor:
    """Of the sums over all rows: a mean over what the rows hold, such as tokens."""
    return total.sum() / count.sum()


def valid_rows(batch: Batch) -> Tensor:
    """Which rows count, ``[rows]`` bool: those of a mask with one axis, else all."""
    if batch.mask is not None and batch.mask.dim() == 1:
        return batch.mask.bool()
    return torch.ones(len(batch), dtype=torch.bool, device=batch.device)
