"""Several labels a row, each there or not."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from tutelage.engine.types import Batch, Outputs
from tutelage.tasks.metrics import RowMetric, Values, mean
from tutelage.tasks.task import RowNames, Task, wide


class Multilabel(Task):
    """Binary cross-entropy of logits ``[rows, labels]`` with targets ``[rows, labels]`` in [0, 1], mean over labels.

    Metrics: ``average_precision``, mean over the labels that occur; ``f1``, mean over labels, and ``accuracy``, the
    share of right labels, both at probability 0.5; ``loss``; ``agreement``, the share of labels on which student and
    teacher agree at probability 0.5.
    """

    name = "multilabel"
    higher_is_better: ClassVar[dict[str, bool]] = {
        "average_precision": True,
        "f1": True,
        "accuracy": True,
        "loss": False,
        "agreement": True,
    }

    def row_losses(self, logits: Tensor, target: Tensor) -> Tensor:
        losses = functional.binary_cross_entropy_with_logits(
            logits, target.to(logits.dtype), reduction="none"
        )
        return losses.mean(1)

    def check_target(self, target: Tensor, rows: RowNames) -> None:
        if target.dim() != 2 or target.shape[1] != self.outputs:
            raise ValueError(
                f"multilabel takes targets [rows, {self.outputs}]; got shape {list(target.shape)}"
            )
        wrong = (target < 0) | (target > 1)
        position = rows.first(wrong)
        if position is not None:
            label = int(torch.nonzero(wrong[position])[0])
            raise ValueError(
                f"label {label} of {rows.name(position)} is {float(target[position, label]):g}; allowed: 0 to 1"
            )

    def make_metric(self, name: str) -> RowMetric:
        if name == "loss":
            return RowMetric(
                lambda outputs, batch, teacher: (self.row_losses(*self.masked(outputs, batch)),), mean
            )
        if name == "agreement":
            return RowMetric(_agreements, mean, teacher=True)
        reductions = {
            "average_precision": self._average_precision,
            "f1": self._f1,
            "accuracy": self._accuracy,
        }
        return RowMetric(self._scores, reductions[name])

    def _scores(self, outputs: Outputs, batch: Batch, teacher: Outputs | None) -> Values:
        logits, target = self.masked(outputs, batch)
        return logits.sigmoid(), target > 0.5

    # torchmetrics takes seconds to import, so that waits until a metric is computed.
    def _average_precision(self, scores: Tensor, target: Tensor) -> Tensor:
        from torchmetrics.functional.classification import multilabel_average_precision

        occurs = target.any(0)
        if not bool(occurs.any()):
            return torch.tensor(torch.nan)
        scores, target = scores[:, occurs], target[:, occurs].long()
        return multilabel_average_precision(scores, target, target.shape[1], validate_args=False)

    def _f1(self, scores: Tensor, target: Tensor) -> Tensor:
        from torchmetrics.functional.classification import multilabel_f1_score

        return multilabel_f1_score(scores, target, self.outputs, validate_args=False)

    def _accuracy(self, scores: Tensor, target: Tensor) -> Tensor:
        from torchmetrics.functional.classification import multilabel_accuracy

        return multilabel_accuracy(scores, target, self.outputs, validate_args=False)


def _agreements(outputs: Outputs, batch: Batch, teacher: Outputs | None) -> Values:
    if teacher is None:
        raise ValueError("agreement needs a teacher's outputs")
    return (((wide(outputs.logits) > 0) == (wide(teacher.logits) > 0)).float().mean(1),)
