"""What losses over tokens share: which tokens count, and both sides' log-probabilities of those."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from tutelage.functional.checks import check_class_ids, check_positive, check_same_shape
from tutelage.functional.divergences import tempered
from tutelage.functional.reductions import upcast

__all__: list[str] = []

# Stands for the log-probability of an entry that is left out: its exponential is 0, and 0 times it is 0, not NaN.
_LEFT_OUT = -1e30


class Pair(NamedTuple):
    """Log-probabilities of both sides, row by row; entries that are left out have probability 0 in both. ``p`` is the
    teacher's distribution and ``q`` the student's."""

    student: Float[Tensor, "*rows vocabulary"]
    teacher: Float[Tensor, "*rows vocabulary"]

    def forward_kl(self, subtract_entropy: bool = True) -> Float[Tensor, "*rows"]:
        """``KL(p || q)`` of each row, or ``-Σ p log q``."""
        against = self.teacher - self.student if subtract_entropy else -self.student
        return (self.teacher.exp() * against).sum(-1)

    def reverse_kl(self) -> Float[Tensor, "*rows"]:
        """``KL(q || p)`` of each row."""
        return (self.student.exp() * (self.student - self.teacher)).sum(-1)

    def mixture(self, teacher_share: float | int) -> Float[Tensor, "*rows vocabulary"]:
        """``log(share · p + (1 - share) q)``, without leaving log space."""
        student, teacher = (
            math.log(share) if share > 0 else -math.inf for share in (1 - teacher_share, teacher_share)
        )
        return torch.logaddexp(self.student + student, self.teacher + teacher)


def counted_pair(
    student_logits: Tensor,
    teacher_logits: Tensor,
    mask: Tensor | None = None,
    target: Tensor | None = None,
    ignore_index: int = -100,
    temperature: float | int = 1.0,
) -> Pair:
    """Both sides' log-probabilities of the tokens that count, ``[tokens, vocabulary]``; without a mask and target of
    all, ``[..., vocabulary]`` as the logits. The teacher is detached; entries that are infinite on either side are left
    out of both.

    Raises:
        ValueError: shapes or vocabularies do not agree, or the temperature is not above 0.
    """
    check_positive("temperature", temperature)
    check_same_vocabulary(student_logits, teacher_logits)
    rows = counted_tokens(student_logits.shape[:-1], mask, target, ignore_index)
    teacher_logits = teacher_logits.detach()
    if rows is not None:
        # What does not count is not computed: it costs nothing, and padding that holds NaN does no harm.
        student_logits, teacher_logits = student_logits[rows], teacher_logits[rows]
    left_out = student_logits.isinf() | teacher_logits.isinf()
    return Pair(
        tempered(student_logits, temperature).log_softmax(-1).masked_fill(left_out, _LEFT_OUT),
        tempered(teacher_logits, temperature).log_softmax(-1).masked_fill(left_out, _LEFT_OUT),
    )


def counted_tokens(
    shape: torch.Size,
    mask: Tensor | None,
    target: Tensor | None,
    ignore_index: int = -100,
) -> Tensor | None:
    """Which tokens count, bool of ``shape``: those of the mask whose target is not ``ignore_index``; None for all.

    Raises:
        ValueError: mask or target have another shape.
    """
    for name, given in (("mask", mask), ("target", target)):
        if given is not None and given.shape != shape:
            raise ValueError(f"{name} must hold one value a token, {list(shape)}; got {list(given.shape)}")
    if mask is None:
        return None if target is None else target != ignore_index
    return mask != 0 if target is None else (mask != 0) & (target != ignore_index)


def token_nll(
    logits: Tensor,
    ids: Tensor,
    counts: Tensor | None = None,
) -> Tensor:
    """``-log softmax(logits)[id]`` of each token ``[...]``, in nats, at least float32; where ``counts`` is False 0 with
    a zero gradient, whatever the id.

    Raises:
        ValueError: shapes do not agree.
        IndexError: an id of a token that counts lies outside the vocabulary; on the CPU alone.
    """
    counts = torch.ones_like(ids, dtype=torch.bool) if counts is None else counts
    for name, given in (("ids", ids), ("mask", counts)):
        if given.shape != logits.shape[:-1]:
            raise ValueError(
                f"{name} must hold one value a token, {list(logits.shape[:-1])}; got {list(given.shape)}"
            )
    check_class_ids(torch.where(counts, ids, 0).flatten(), ids.numel(), logits.shape[-1])
    flat = torch.where(counts, ids, -100).flatten().long()
    nll = F.cross_entropy(upcast(logits).flatten(0, -2), flat, ignore_index=-100, reduction="none")
    return nll.view(ids.shape)


def check_same_vocabulary(student_logits: Tensor, teacher_logits: Tensor) -> None:
    """Raise ValueError unless both sides have the same shape, the last axis being the vocabulary."""
    student, teacher = student_logits.shape, teacher_logits.shape
    if student[:-1] == teacher[:-1] and student[-1:] != teacher[-1:]:
        raise ValueError(
            f"student and teacher have vocabularies of {student[-1]} and {teacher[-1]} entries; cut heads that are "
            "padded to the tokenizer's size, and use uld_loss for two tokenizers"
        )
    check_same_shape(student_logits=student_logits, teacher_logits=teacher_logits)
