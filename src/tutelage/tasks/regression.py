"""Numbers a row."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from tutelage.engine.types import Batch, Outputs
from tutelage.tasks.metrics import RowMetric, Values, mean
from tutelage.tasks.task import RowNames, Task


class Regression(Task):
    """Squared error of outputs ``[rows, columns]`` against targets ``[rows, columns]`` (``[rows]`` where there is one
    column), mean over columns.

    Metrics: ``mae``, the mean absolute error; ``r2``, the share of variance explained, mean over columns (not defined
    for one row or a target that does not vary); ``loss``.

    Args:
        outputs: target columns.
    """

    name = "regression"
    higher_is_better: ClassVar[dict[str, bool]] = {"mae": False, "r2": True, "loss": False}

    def row_losses(self, logits: Tensor, target: Tensor) -> Tensor:
        target = target.reshape(logits.shape).to(logits.dtype)
        return (logits - target).square().mean(1)

    def check_target(self, target: Tensor, rows: RowNames) -> None:
        width = 1 if target.dim() == 1 else target.shape[1]
        if target.dim() > 2 or width != self.outputs:
            raise ValueError(
                f"regression takes targets [rows, {self.outputs}]; got shape {list(target.shape)}"
            )

    def make_metric(self, name: str) -> RowMetric:
        if name == "loss":
            return RowMetric(
                lambda outputs, batch, teacher: (self.row_losses(*self.masked(outputs, batch)),), mean
            )
        return RowMetric(self._pairs, _mae if name == "mae" else _r2)

    def _pairs(self, outputs: Outputs, batch: Batch, teacher: Outputs | None) -> Values:
        logits, target = self.masked(outputs, batch)
        return logits, target.reshape(logits.shape).to(logits.dtype)


def _mae(predicted: Tensor, target: Tensor) -> Tensor:
    return (predicted - target).abs().mean()


def _r2(predicted: Tensor, target: Tensor) -> Tensor:
    if len(target) < 2 or bool((target == target[0]).all(0).any()):
        return torch.tensor(torch.nan)
    from torchmetrics.functional.regression import r2_score  # seconds to import

    return r2_score(predicted, target)
