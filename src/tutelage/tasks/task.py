"""`Task`: what is learnt. The label loss, the first batch's check, and the metrics."""

from __future__ import annotations

import difflib
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
from torch import Tensor

from tutelage.engine.types import Batch, Inputs, Outputs, Term
from tutelage.tasks.metrics import RowMetric, valid_rows


class Task(ABC):
    """Base of every task.

    Args:
        outputs: width of the model's last layer: classes, labels or target columns.
    """

    name: ClassVar[str]
    higher_is_better: ClassVar[dict[str, bool]]
    """Every metric, the one that picks the best checkpoint first."""
    items: ClassVar[str] = "rows"
    """What its losses are means over: rows, or tokens of them."""
    on_demand: ClassVar[frozenset[str]] = frozenset()
    """Those of them that are given only where they are asked for."""

    def __init__(self, outputs: int) -> None:
        self.outputs = outputs

    @property
    def known_metrics(self) -> tuple[str, ...]:
        """All that are defined for this many outputs."""
        return tuple(self.higher_is_better)

    @property
    def default_metrics(self) -> tuple[str, ...]:
        return tuple(name for name in self.known_metrics if name not in self.on_demand)

    @abstractmethod
    def row_losses(self, logits: Tensor, target: Tensor) -> Tensor:
        """Loss of each row, ``[rows]``, in float32 or better, from logits ``[rows, outputs]``."""

    @abstractmethod
    def check_target(self, target: Tensor, rows: RowNames) -> None:
        """Raises ValueError for a target that this task cannot learn."""

    @abstractmethod
    def make_metric(self, name: str) -> RowMetric:
        """An empty metric by a name in ``higher_is_better``."""

    def label_loss(self, outputs: Outputs, batch: Batch) -> Term:
        """Mean of ``row_losses`` over the rows that the batch's mask (one axis) leaves; zero with a graph where it
        leaves none.

        Raises:
            ValueError: the batch has no target.
        """
        logits, target = self.masked(outputs, batch)
        losses = self.row_losses(logits, target)
        if batch.mask is None:
            return Term(losses.sum() / max(len(losses), 1))
        valid = valid_rows(batch)
        return Term(torch.where(valid, losses, 0.0).sum() / valid.sum().clamp(min=1))

    def masked(self, outputs: Outputs, batch: Batch) -> tuple[Tensor, Tensor]:
        """Logits (float32 or better) and target, both 0 in rows that do not count: whatever stands there, its loss and
        gradient are finite."""
        if batch.target is None:
            raise ValueError(f"{self.name} needs a target; these rows have none (see data.target)")
        logits, target = wide(outputs.logits), batch.target
        if batch.mask is None or batch.mask.dim() != 1:
            return logits, target
        ignored = ~batch.mask.bool()
        return logits.masked_fill(_beside(ignored, logits), 0), target.masked_fill(
            _beside(ignored, target), 0
        )

    def metrics(self, names: Sequence[str] = ()) -> dict[str, RowMetric]:
        """Empty metrics by name; no names: the task's own.

        Raises:
            ValueError: a name that this task does not have.
        """
        for name in names:
            if name not in self.known_metrics:
                raise ValueError(self._unknown(name))
        return {name: self.make_metric(name) for name in names or self.default_metrics}

    def _unknown(self, name: str) -> str:
        allowed = self.known_metrics
        if name in self.higher_is_better:
            return f"the metric {name!r} is not defined for {self.outputs} outputs; allowed: {', '.join(allowed)}"
        near = difflib.get_close_matches(name, allowed, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        return f"{self.name} has no metric {name!r}; allowed: {', '.join(allowed)}{hint}"

    def check(self, batch: Batch, outputs: Outputs | None = None) -> None:
        """Look at a first batch, and at a model's outputs for it, before anything is spent on them.

        Raises:
            ValueError: inputs or targets that are not finite, targets that this task cannot learn, or logits of another
                width than ``outputs``. It names the value and the row.
        """
        rows = RowNames(batch)
        _check_finite(batch.inputs, "inputs", rows)
        width = None if outputs is None else outputs.width
        if width is not None and width != self.outputs:
            raise ValueError(
                f"the model gives {width} outputs, the task {self.name} has {self.outputs}; "
                "build the model for this data"
            )
        if batch.target is not None:
            target = batch.target
            if target.is_floating_point():
                _check_finite(target, "target", rows)
            self.check_target(target, rows)


class RowNames:
    """Names rows of a batch for messages, and knows which of them count."""

    def __init__(self, batch: Batch) -> None:
        self.index = batch.index
        self.valid = valid_rows(batch)

    def first(self, wrong: Tensor) -> int | None:
        """Position of the first valid row with a true entry in ``wrong`` (``[rows, ...]``)."""
        found = torch.nonzero(wrong.reshape(len(wrong), -1).any(1) & self.valid)
        return int(found[0]) if len(found) else None

    def name(self, position: int) -> str:
        return f"row {position if self.index is None else int(self.index[position])}"


def wide(logits: Tensor) -> Tensor:
    """Logits in float32 or better."""
    return logits if logits.dtype == torch.float64 else logits.float()


def _beside(rows: Tensor, tensor: Tensor) -> Tensor:
    return rows.view(-1, *[1] * (tensor.dim() - 1))


def _check_finite(value: Inputs, what: str, rows: RowNames) -> None:
    named: Mapping[str, Tensor] = value if isinstance(value, dict) else {what: value}
    for name, tensor in named.items():
        if not tensor.is_floating_point():
            continue
        wrong = ~torch.isfinite(tensor)
        position = rows.first(wrong)
        if position is not None:
            entry = float(tensor[position][wrong[position]].flatten()[0])
            raise ValueError(f"{name} of {rows.name(position)} holds {entry}; allowed: finite numbers")
