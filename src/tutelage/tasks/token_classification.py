"""One class a token: names, places, parts of speech."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from torch import Tensor
from torch.nn import functional

from tutelage.engine.types import Batch, Outputs, Term
from tutelage.functional.tokens import counted_tokens
from tutelage.tasks.language_model import IGNORED
from tutelage.tasks.metrics import RowMetric, Values, ratio
from tutelage.tasks.spans import SpanTags
from tutelage.tasks.task import RowNames, Task, wide


class TokenClassification(Task):
    """Cross-entropy of logits ``[rows, tokens, classes]`` with class ids ``[rows, tokens]``, the mean over the tokens
    that count: those of the mask whose class is not -100.

    Metrics: ``accuracy``, the share of tokens; ``f1`` of whole entities, exact in place and kind, over all rows
    together (where class names are tags: O, B-…, I-…; see `SpanTags`); ``loss``, without label smoothing;
    ``agreement``, the share of tokens that student and teacher answer alike.

    Args:
        outputs: classes.
        label_smoothing: share of each target that is spread evenly over all classes, in training.
        class_names: in the order of the ids.
    """

    name = "token-classification"
    items = "tokens"
    higher_is_better: ClassVar[dict[str, bool]] = {
        "accuracy": True,
        "f1": True,
        "loss": False,
        "agreement": True,
    }

    def __init__(
        self, outputs: int, label_smoothing: float = 0.0, class_names: Sequence[str] | None = None
    ) -> None:
        super().__init__(outputs)
        self.label_smoothing = label_smoothing
        self.tags = SpanTags.of(class_names) if class_names else None

    @property
    def known_metrics(self) -> tuple[str, ...]:
        return tuple(name for name in super().known_metrics if name != "f1" or self.tags is not None)

    def label_loss(self, outputs: Outputs, batch: Batch) -> Term:
        """Mean over the tokens that count; zero with a graph where none does.

        Raises:
            ValueError: the batch has no target.
        """
        logits, target, counted = self._counted(outputs, batch)
        losses = self._losses(logits, target, self.label_smoothing)
        return Term(losses.sum() / counted.sum().clamp(min=1), self.items)

    def row_losses(self, logits: Tensor, target: Tensor) -> Tensor:
        """Sum over each row's tokens, ``[rows]``."""
        return self._losses(wide(logits), target, self.label_smoothing).sum(1)

    def check_target(self, target: Tensor, rows: RowNames) -> None:
        if target.is_floating_point() or target.dim() != 2:
            raise ValueError(
                "token-classification takes class ids [rows, tokens]; got "
                f"{str(target.dtype).removeprefix('torch.')} of shape {list(target.shape)}"
            )
        wrong = (target != IGNORED) & ((target < 0) | (target >= self.outputs))
        position = rows.first(wrong)
        if position is not None:
            token = int(wrong[position].nonzero()[0])
            raise ValueError(
                f"the label of token {token} of {rows.name(position)} is {int(target[position, token])}; allowed: 0 to "
                f"{self.outputs - 1} ({self.outputs} classes), or {IGNORED} where the token does not count"
            )

    def make_metric(self, name: str) -> RowMetric:
        if name == "accuracy":
            return RowMetric(self._hits, ratio)
        if name == "f1":
            return RowMetric(self._entities, _f1)
        if name == "loss":
            return RowMetric(self._plain_losses, ratio)
        return RowMetric(self._agreements, ratio, teacher=True)

    def _counted(self, outputs: Outputs, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """Logits (float32 or better), target and which tokens count. Where one does not, its logits are 0 and its
        target is -100: whatever stands there, loss and gradient are finite."""
        if batch.target is None:
            raise ValueError(f"{self.name} needs a target; these rows have none (see data.target)")
        counted = counted_tokens(batch.target.shape, batch.mask, batch.target, IGNORED)
        assert counted is not None
        logits = wide(outputs.logits).masked_fill(~counted[..., None], 0)
        return logits, batch.target.masked_fill(~counted, IGNORED), counted

    def _losses(self, logits: Tensor, target: Tensor, smoothing: float) -> Tensor:
        """Of each token, ``[rows, tokens]``; 0 where it does not count."""
        return functional.cross_entropy(
            logits.transpose(1, 2),
            target.long(),
            ignore_index=IGNORED,
            reduction="none",
            label_smoothing=smoothing,
        )

    def _entities(self, outputs: Outputs, batch: Batch, teacher: Outputs | None) -> Values:
        assert self.tags is not None
        logits, target, counted = self._counted(outputs, batch)
        return self.tags.counts(logits.argmax(2), target, counted)

    def _hits(self, outputs: Outputs, batch: Batch, teacher: Outputs | None) -> Values:
        logits, target, counted = self._counted(outputs, batch)
        return ((logits.argmax(2) == target) & counted).sum(1), counted.sum(1)

    def _plain_losses(self, outputs: Outputs, batch: Batch, teacher: Outputs | None) -> Values:
        logits, target, counted = self._counted(outputs, batch)
        return self._losses(logits, target, 0.0).double().sum(1), counted.sum(1)

    def _agreements(self, outputs: Outputs, batch: Batch, teacher: Outputs | None) -> Values:
        if teacher is None:
            raise ValueError("agreement needs a teacher's outputs")
        logits, _, counted = self._counted(outputs, batch)
        return ((logits.argmax(2) == teacher.logits.argmax(2)) & counted).sum(1), counted.sum(1)


def _f1(right: Tensor, answered: Tensor, wanted: Tensor) -> Tensor:
    """Of all rows' entities; not defined where there are none on either side."""
    return 2 * right.sum() / (answered.sum() + wanted.sum())
