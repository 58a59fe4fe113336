"""One class a row."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from tutelage.engine.types import Batch, Outputs
from tutelage.functional.calibration import calibration_error
from tutelage.tasks.metrics import RowMetric, Values, mean
from tutelage.tasks.task import RowNames, Task, wide

_TOLERANCE = 1e-4
"""How far a distribution's sum may be from 1."""


class Classification(Task):
    """Cross-entropy of logits ``[rows, classes]`` with class ids ``[rows]`` or distributions ``[rows, classes]``.

    Metrics: ``accuracy``; ``balanced_accuracy``, the mean of the classes' own (only where it is asked for); ``top5``,
    where there are more than five classes; ``calibration_error``, the expected calibration error of the most probable
    class in 15 bins of equal width (Guo et al. 2017); ``loss``, the cross-entropy without label smoothing, so that it
    compares between recipes; ``agreement``, the share of rows in which student and teacher name the same class. A
    distribution's class is its most probable one.

    Args:
        outputs: classes.
        label_smoothing: share of each target that is spread evenly over all classes, in training.
    """

    name = "classification"
    higher_is_better: ClassVar[dict[str, bool]] = {
        "accuracy": True,
        "balanced_accuracy": True,
        "top5": True,
        "calibration_error": False,
        "loss": False,
        "agreement": True,
    }
    on_demand = frozenset({"balanced_accuracy"})

    def __init__(self, outputs: int, label_smoothing: float = 0.0) -> None:
        super().__init__(outputs)
        self.label_smoothing = label_smoothing

    @property
    def known_metrics(self) -> tuple[str, ...]:
        return tuple(name for name in super().known_metrics if name != "top5" or self.outputs > 5)

    def row_losses(self, logits: Tensor, target: Tensor) -> Tensor:
        return _cross_entropy(logits, target, self.label_smoothing)

    def check_target(self, target: Tensor, rows: RowNames) -> None:
        if target.dim() == 2:
            self._check_distributions(target, rows)
        elif target.is_floating_point() or target.dim() != 1:
            raise ValueError(
                f"classification takes class ids [rows] (integers) or distributions [rows, {self.outputs}]; "
                f"got {str(target.dtype).removeprefix('torch.')} of shape {list(target.shape)}"
            )
        else:
            position = rows.first((target < 0) | (target >= self.outputs))
            if position is not None:
                raise ValueError(
                    f"the label of {rows.name(position)} is {int(target[position])}; "
                    f"allowed: 0 to {self.outputs - 1} ({self.outputs} classes)"
                )

    def _check_distributions(self, target: Tensor, rows: RowNames) -> None:
        if target.shape[1] != self.outputs:
            raise ValueError(
                f"targets are distributions over {target.shape[1]} classes, the task has {self.outputs}"
            )
        position = rows.first(target < 0)
        if position is not None:
            raise ValueError(
                f"the target of {rows.name(position)} has the negative share {float(target[position].min())}"
            )
        totals = target.double().sum(1)
        position = rows.first((totals - 1).abs() > _TOLERANCE)
        if position is not None:
            raise ValueError(
                f"the target of {rows.name(position)} sums to {float(totals[position]):g}; a distribution sums to 1"
            )

    def make_metric(self, name: str) -> RowMetric:
        if name == "accuracy":
            return RowMetric(_hits, mean)
        if name == "balanced_accuracy":
            return RowMetric(_hits_and_labels, _balanced)
        if name == "top5":
            return RowMetric(_top5_hits, mean)
        if name == "calibration_error":
            return RowMetric(_confidences, calibration_error)
        if name == "loss":
            return RowMetric(self._losses, mean)
        return RowMetric(_agreements, mean, teacher=True)

    def _losses(self, outputs: Outputs, batch: Batch, teacher: Outputs | None) -> Values:
        return (_cross_entropy(*self.masked(outputs, batch), 0.0),)


def _cross_entropy(logits: Tensor, target: Tensor, smoothing: float) -> Tensor:
    target = target.to(logits.dtype) if target.dim() == 2 else target.long()
    return functional.cross_entropy(logits, target, reduction="none", label_smoothing=smoothing)


def _labels(batch: Batch) -> Tensor:
    if batch.target is None:
        raise ValueError("a metric needs a target; these rows have none (see data.target)")
    return batch.target.argmax(1) if batch.target.dim() == 2 else batch.target


def _hits(outputs: Outputs, batch: Batch, teacher: Outputs | None) -> Values:
    return (outputs.logits.argmax(1) == _labels(batch),)


def _hits_and_labels(outputs: Outputs, batch: Batch, teacher: Outputs | None) -> Values:
    labels = _labels(batch)
    return outputs.logits.argmax(1) == labels, labels


def _balanced(hit: Tensor, label: Tensor) -> Tensor:
    """Mean over the classes that have rows."""
    rows = torch.bincount(label)
    right = torch.bincount(label, weights=hit.double())
    return (right / rows)[rows > 0].mean()


def _top5_hits(outputs: Outputs, batch: Batch, teacher: Outputs | None) -> Values:
    return ((outputs.logits.topk(5, dim=1).indices == _labels(batch)[:, None]).any(1),)


def _confidences(outputs: Outputs, batch: Batch, teacher: Outputs | None) -> Values:
    confidence, predicted = wide(outputs.logits).softmax(1).max(1)
    return confidence.clamp(max=1.0), predicted == _labels(batch)


def _agreements(outputs: Outputs, batch: Batch, teacher: Outputs | None) -> Values:
    if teacher is None:
        raise ValueError("agreement needs a teacher's outputs")
    return (outputs.logits.argmax(1) == teacher.logits.argmax(1),)
