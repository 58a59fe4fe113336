"""The next token, at every position that counts."""

from __future__ import annotations

import weakref
from typing import Any, ClassVar

from torch import Tensor
from torch.nn import functional

from tutelage.engine.types import Batch, Outputs, Term
from tutelage.functional.fused_statistics import TokenStatistics, token_statistics
from tutelage.functional.heads import Head
from tutelage.functional.tokens import counted_tokens
from tutelage.tasks.fused_losses import fused_loss
from tutelage.tasks.metrics import RowMetric, Values, ratio
from tutelage.tasks.task import RowNames, Task, wide

IGNORED = -100
"""Target of a position that does not count."""
_OF_A_TEACHER = ("divergence", "agreement", "acceptance")


class LanguageModel(Task):
    """Cross-entropy with the next token, the mean over the tokens that count. Where a model gives hidden states and its
    head, logits of all tokens are never made whole.

    Metrics, all over tokens that count: ``perplexity``, the exponential of ``loss``, the mean negative log-likelihood
    in nats; ``divergence``, the mean ``KL(p || q)`` of the student's distribution from the teacher's; ``agreement``,
    the share at which both name the same token; ``acceptance``, the expected share of the student's drafts that
    speculative sampling with this teacher accepts (Leviathan et al. 2023: ``Σ min(p, q)``).

    Args:
        outputs: tokens of the vocabulary.
    """

    name = "language-model"
    items = "tokens"
    higher_is_better: ClassVar[dict[str, bool]] = {
        "perplexity": False,
        "loss": False,
        "divergence": False,
        "agreement": True,
        "acceptance": True,
    }

    def __init__(self, outputs: int) -> None:
        super().__init__(outputs)
        self._seen: tuple[tuple[Any, Any], TokenStatistics] | None = None

    def label_loss(self, outputs: Outputs, batch: Batch) -> Term:
        """Mean over the tokens that count; zero with a graph where none does.

        Raises:
            ValueError: the batch has no target.
        """
        target = _target(batch)
        if outputs.hidden is None or outputs.head is None:
            counted = _counted(batch)
            losses = self.row_losses(outputs.logits, target.masked_fill(~counted, IGNORED))
            return Term(losses.sum() / counted.sum().clamp(min=1), "tokens")
        return Term(fused_loss(outputs, None, batch, label_weight=1.0).loss, "tokens")

    def row_losses(self, logits: Tensor, target: Tensor) -> Tensor:
        losses = functional.cross_entropy(
            wide(logits).flatten(0, -2), target.flatten().long(), ignore_index=IGNORED, reduction="none"
        )
        return losses.view(target.shape).sum(1)

    def check_target(self, target: Tensor, rows: RowNames) -> None:
        if target.is_floating_point() or target.dim() != 2:
            raise ValueError(
                f"a language model's target is token ids [rows, tokens]; got "
                f"{str(target.dtype).removeprefix('torch.')} of shape {list(target.shape)}"
            )
        wrong = (target != IGNORED) & ((target < 0) | (target >= self.outputs))
        position = rows.first(wrong)
        if position is not None:
            token = int(target[position][wrong[position]][0])
            raise ValueError(
                f"{rows.name(position)} has the token {token}; allowed: 0 to {self.outputs - 1}, or {IGNORED} where "
                "none counts"
            )

    def make_metric(self, name: str) -> RowMetric:
        def values(outputs: Outputs, batch: Batch, teacher: Outputs | None) -> Values:
            found = self._statistics(outputs, batch, teacher)
            chosen = getattr(found, name) if name in _OF_A_TEACHER else found.nll
            if chosen is None:
                raise ValueError(f"{name} needs a teacher's outputs")
            return chosen.double().sum(1), _counted(batch).sum(1)

        reduce = _perplexity if name == "perplexity" else ratio
        return RowMetric(values, reduce, teacher=name in _OF_A_TEACHER)

    def _statistics(self, outputs: Outputs, batch: Batch, teacher: Outputs | None) -> TokenStatistics:
        """Of every token ``[rows, tokens]``; one pass over the vocabulary serves all metrics of a batch. The
        outputs are known again by weak references, so that the last batch's are not kept until the next evaluation."""
        of = (weakref.ref(outputs), None if teacher is None else weakref.ref(teacher))
        if self._seen is None or self._seen[0] != of:
            self._seen = (of, _measure(outputs, batch, teacher))
        return self._seen[1]


def _measure(outputs: Outputs, batch: Batch, teacher: Outputs | None) -> TokenStatistics:
    if outputs.hidden is None or outputs.head is None:
        raise ValueError(
            "a language model is measured from its hidden states and its head; this one gives logits"
        )
    theirs: Tensor | tuple[Tensor, Head] | None = None
    if teacher is not None and teacher.hidden is not None and teacher.head is not None:
        theirs = teacher.hidden, teacher.head
    elif teacher is not None:
        theirs = teacher.logits
    return token_statistics(outputs.hidden, outputs.head, _target(batch), theirs, batch.mask)


def _target(batch: Batch) -> Tensor:
    if batch.target is None:
        raise ValueError("a language model needs the next tokens as target; these rows have none")
    return batch.target


def _counted(batch: Batch) -> Tensor:
    target = _target(batch)
    counted = counted_tokens(target.shape, batch.mask, target, IGNORED)
    assert counted is not None
    return counted


def _perplexity(total: Tensor, tokens: Tensor) -> Tensor:
    return ratio(total, tokens).exp()
