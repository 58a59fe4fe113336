"""Accuracy, loss and conditional mutual information of a model over whole data, from sums of its parts."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from tutelage.engine.types import Batch, Outputs
from tutelage.functional.classes import ClassSums, class_sums
from tutelage.functional.reductions import keep_rows

Sum = Callable[[Tensor], Tensor]
"""Over ranks."""


class Figures(NamedTuple):
    """Sums over rows, in float64: of cross-entropy, of the answers' entropy, of right answers, of answers by class."""

    loss: Tensor
    entropy: Tensor
    hits: Tensor
    answers: ClassSums

    @classmethod
    def of(cls, logits: Tensor, target: Tensor) -> Figures:
        log_probs = logits.double().log_softmax(1)
        return cls(
            -log_probs.gather(1, target[:, None]).sum(),
            torch.special.entr(log_probs.exp()).sum(),
            (logits.argmax(1) == target).sum().double(),
            class_sums(log_probs.exp(), target, logits.shape[1]),
        )

    def plus(self, other: Figures) -> Figures:
        return Figures(
            self.loss + other.loss,
            self.entropy + other.entropy,
            self.hits + other.hits,
            self.answers.plus(other.answers),
        )

    def over(self, ranks: Sum) -> Figures:
        parts = (self.loss, self.entropy, self.hits, *self.answers)
        loss, entropy, hits, sums, counts = map(ranks, parts)
        return Figures(loss, entropy, hits, ClassSums(sums, counts))

    def values(self) -> dict[str, float]:
        """``accuracy``; ``loss`` and ``cmi`` in nats. The CMI is what the class means' entropy has more than the
        answers' own: the mean divergence of the answers from their class's mean."""
        rows = self.answers.counts.sum()
        within = self.answers.counts @ torch.special.entr(self.answers.means).sum(1)
        cmi = ((within - self.entropy) / rows).clamp(min=0)
        return {
            "cmi": float(cmi),
            "accuracy": float(self.hits / rows),
            "loss": float(self.loss / rows),
        }


@torch.no_grad()
def figures(predict: Callable[[Batch], Outputs], batches: Iterable[Batch], ranks: Sum) -> Figures:
    """Figures of a model's outputs over all batches of all ranks.

    Raises:
        ValueError: there are no batches.
    """
    found: Figures | None = None
    for batch in batches:
        assert batch.target is not None
        logits, target = keep_rows(batch.mask, predict(batch).logits, batch.target)
        part = Figures.of(logits, target.long())
        found = part if found is None else found.plus(part)
    if found is None:
        raise ValueError("there are no rows to measure")
    return found.over(ranks)
