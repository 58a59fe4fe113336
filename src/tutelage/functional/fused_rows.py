"""What a fused loss does to a few rows of student logits: their losses, and the gradient in the logits' own place.

One class for each kind of teacher. All leave in the tile the gradient of ``divergence + label_share · label`` by the
student's logits, and return both parts a row.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from tutelage.functional.analytic import Divergence, OfLogits
from tutelage.functional.fused_products import Side
from tutelage.functional.fused_vocabulary import Vocabulary
from tutelage.functional.heads import Sampled, TopK

__all__: list[str] = []


class Found(NamedTuple):
    """Of each row; None where there is no such part. The last three are only measured."""

    label: Tensor | None = None
    divergence: Tensor | None = None
    teacher_label: Tensor | None = None
    agreement: Tensor | None = None
    acceptance: Tensor | None = None

    def reserved(self, rows: int) -> Found:
        """Room for so many rows of the same parts."""
        return Found(*(None if part is None else part.new_empty(rows) for part in self))

    def put(self, rows: slice, values: Found) -> None:
        """Copy what was found of some rows. Kept as they come, small results would lie between large buffers, and the
        C library could use none of these again."""
        for part, given in zip(self, values, strict=True):
            if part is not None and given is not None:
                part[rows] = given


Positions = Tensor | slice


@dataclass
class Rows:
    """Targets without a teacher, and what the kinds of teacher share.

    Attributes:
        vocabulary: how rows are summed.
        target: ids of all rows of the input, or none.
        label_share: weight of the label loss, where the divergence of the logits weighs 1.
    """

    vocabulary: Vocabulary
    target: Tensor | None
    label_share: float | int

    def reserve(self, tile: Tensor) -> None:
        """Make room for what a chunk needs of the teacher; ``tile`` holds the student's logits."""

    def prepare(self, rows: Positions) -> None:
        """Make what a chunk needs of the teacher, given its positions in the input."""

    def __call__(self, student: Tensor, rows: Positions, part: slice) -> Found:
        """Work on logits in place.

        Args:
            student: ``[rows, vocabulary]``.
            rows: their positions in the input.
            part: their positions in the chunk.
        """
        assert self.target is not None
        return Found(self.labels(student, self.target[rows], self.label_share))

    def labels(self, student: Tensor, target: Tensor, share: float | int) -> Tensor:
        """The label loss at temperature 1, and its gradient times ``share``."""
        log_q = self.vocabulary.log_softmax_(student)
        label = self.label_of(log_q, target)
        gradient = log_q.exp_() if share == 1 else log_q.exp_().mul_(share)
        self.pull(gradient, target, share)
        return label

    def label_of(self, log_q: Tensor, target: Tensor) -> Tensor:
        return -self.vocabulary.look_up(log_q, target[:, None])[:, 0]

    def pull(self, gradient: Tensor, target: Tensor, share: float | int) -> None:
        """Take ``share`` from the target's entry of each row."""
        if share:
            self.vocabulary.add_(gradient, target[:, None], gradient.new_full((len(target), 1), -share))


@dataclass
class SampledRows(Rows):
    """The teacher is a few weighted draws a row: the cross-entropy ``-Σ weight · log q`` has the whole teacher's as its
    mean."""

    teacher: Sampled

    def __call__(self, student: Tensor, rows: Positions, part: slice) -> Found:
        ids, weights = self.teacher.ids[rows], self.teacher.weights[rows].to(student.dtype)
        log_q = self.vocabulary.log_softmax_(student)
        divergence = -(weights * self.vocabulary.look_up(log_q, ids)).sum(-1)
        target = None if self.target is None else self.target[rows]
        label = None if target is None else self.label_of(log_q, target)
        share = 0.0 if target is None else self.label_share
        gradient = log_q.exp_().mul_(weights.sum(-1, keepdim=True) + share)
        self.vocabulary.add_(gradient, ids, -weights)
        if target is not None:
            self.pull(gradient, target, share)
        return Found(label, divergence)


@dataclass
class TopKRows(Rows):
    """The teacher is its likeliest entries and the mass of all others, held against the student's of the same: k+1
    outcomes, exact, at one softmax. The logit of "all others" is the log-sum-exp of theirs, so its gradient reaches
    each by its share of them."""

    teacher: TopK
    divergence: Divergence

    def __call__(self, student: Tensor, rows: Positions, part: slice) -> Found:
        vocabulary, ids = self.vocabulary, self.teacher.ids[rows]
        log_p = TopK(ids, self.teacher.log_probs[rows], self.teacher.tail[rows]).outcomes(student.dtype)
        target = None if self.target is None else self.target[rows]
        aimed = None if target is None else self.label_of(student, target)
        kept = vocabulary.look_up(student, ids)
        vocabulary.add_(student, ids, torch.full_like(kept, -math.inf))
        sums, largest = vocabulary.exponentials_(student)
        outcomes = torch.cat([kept, (largest + sums.log())[:, None]], -1)
        normaliser = outcomes.logsumexp(-1)
        log_q = outcomes - normaliser[:, None]
        q, few = log_q.exp(), Vocabulary(outcomes.shape[-1])
        divergence, slope = self.divergence.values(log_q, log_p, q, few, finite=False)
        share = 0.0 if target is None else self.label_share
        gradient = slope.addcmul(q, slope.sum(-1, keepdim=True) - share, value=-1)
        student.mul_((gradient[:, -1] / sums.clamp(min=torch.finfo(sums.dtype).tiny))[:, None])
        vocabulary.add_(student, ids, gradient[:, :-1])
        if target is not None:
            self.pull(student, target, share)
        return Found(None if aimed is None else normaliser + aimed, divergence)


@dataclass
class DenseRows(Rows):
    """The teacher's logits are made, or copied, beside the student's.

    Attributes:
        teacher: hidden states with a head, or logits.
        divergence: with an analytic gradient, or a function of logits.
        temperature: softens both sides of the divergence, never the label loss.
        finite: no logit is -inf.
    """

    teacher: Side | Tensor
    divergence: Divergence | OfLogits
    temperature: float | int
    finite: bool
    tile: Tensor = field(init=False)

    def reserve(self, tile: Tensor) -> None:
        self.tile = torch.empty_like(tile)

    def prepare(self, rows: Positions) -> None:
        if isinstance(self.teacher, Side):
            self.teacher.logits(rows, self.tile)
        else:
            given = self.teacher[rows]
            self.tile[: len(given)].copy_(given)

    def __call__(self, student: Tensor, rows: Positions, part: slice) -> Found:
        teacher = self.tile[part]
        if isinstance(self.teacher, Side):
            self.teacher.bend_(teacher)
        return self.compared(student, teacher, None if self.target is None else self.target[rows])

    def compared(self, student: Tensor, teacher: Tensor, target: Tensor | None) -> Found:
        """Losses of rows whose logits are there; both sides' are overwritten, the student's by the gradient."""
        if self.temperature == 1 and isinstance(self.divergence, Divergence):
            return self._analytic(student, teacher, target, self.divergence)
        label = None
        beside = student.clone() if target is not None else student
        if self.temperature != 1:
            student.mul_(1 / self.temperature)
            teacher.mul_(1 / self.temperature)
        if isinstance(self.divergence, Divergence):
            divergence = self._analytic(student, teacher, None, self.divergence).divergence
        else:
            divergence = _by_autograd(student, teacher, self.divergence)
        if target is not None:
            label = self.labels(beside, target, self.label_share)
            student.add_(beside)
        return Found(label, divergence)

    def _analytic(
        self, student: Tensor, teacher: Tensor, target: Tensor | None, divergence: Divergence
    ) -> Found:
        """Both parts share the student's softmax."""
        log_q, log_p = self.vocabulary.log_softmax_(student), self.vocabulary.log_softmax_(teacher)
        label = None if target is None else self.label_of(log_q, target)
        share = 0.0 if target is None else self.label_share
        q = log_q.exp()
        value, slope = divergence.values(log_q, log_p, q, self.vocabulary, finite=self.finite)
        centre = self.vocabulary.total_of(slope).sub_(share)
        torch.addcmul(slope, q, centre[:, None], value=-1, out=student)
        if target is not None:
            self.pull(student, target, share)
        return Found(label, value)


def _by_autograd(student: Tensor, teacher: Tensor, divergence: OfLogits) -> Tensor:
    """The divergence of each row; its gradient in the place of the student's logits."""
    if not len(student):
        return student.new_empty(0)
    with torch.enable_grad():
        logits = student.clone().requires_grad_()
        value = divergence(logits, teacher)
        if value.shape != student.shape[:1]:
            raise ValueError(
                f"the divergence must give one value a row, [{len(student)}]; got {list(value.shape)}"
            )
        (gradient,) = torch.autograd.grad(value.sum(), logits)
    student.copy_(gradient)
    return value.detach()
