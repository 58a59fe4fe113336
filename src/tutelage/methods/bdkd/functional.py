"""What two models that learn together take from each other, as pure functions of tensors."""

from __future__ import annotations

import math
from typing import Literal, NamedTuple, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from tutelage.functional.checks import check_positive, check_same_shape
from tutelage.functional.divergences import kd_loss, tempered

__all__ = ["BDKDTerms", "balance_weights", "bdkd_student_loss", "bdkd_teacher_loss"]

Weighting = Literal["switch", "sigmoid"]


class BDKDTerms(NamedTuple):
    """What a student learns from a teacher, and how often it is the more certain one.

    Attributes:
        total: ``forward + reverse``.
        forward, reverse: ``temperature² · mean`` of both divergences, each with its rows' weights.
        forward_share: share of the rows in which the student is more certain than the teacher; no gradient.
    """

    total: Tensor
    forward: Tensor
    reverse: Tensor
    forward_share: Tensor


def bdkd_student_loss(
    student_logits: Float[Tensor, "*rows classes"],
    teacher_logits: Float[Tensor, "*rows classes"],
    delta: float | int = 2.0,
    temperature: float | int = 1.0,
    weighting: Weighting = "switch",
    scale: float | int = 0.1,
) -> BDKDTerms:
    """Forward and reverse KL divergence of a student from a teacher, balanced row by row by who is more certain.

    ``temperature² · mean (w_f KL(p_t || p_s) + w_r KL(p_s || p_t))`` with the weights of `balance_weights`.

    Args:
        student_logits: ``[..., classes]``; they get the gradient.
        teacher_logits: ``[..., classes]``; detached.
        delta: weight of the divergence that a row's certainty calls for, at least 1; the other's is 1.
        temperature: softens both sides; above 0.
        weighting: ``switch`` or ``sigmoid``, see `balance_weights`.
        scale: of ``sigmoid``.

    Returns:
        `BDKDTerms` of scalars in nats, at least float32; without rows 0 with a zero gradient.

    Raises:
        ValueError: shapes do not agree, or an option is out of range.

    Source: Amara et al., "BD-KD: Balancing the Divergences for Online Knowledge Distillation" (arXiv 2212.12965); the
    weights' form is ours.
    """
    log_student, log_teacher = _log_probabilities(student_logits, teacher_logits, temperature)
    student, teacher = log_student.exp(), log_teacher.exp()
    gap = _gap(log_student, student, log_teacher, teacher)
    surer = (gap > 0).to(gap.dtype)
    # The factors of the mean are in the weights, which have no gradient: two operations less, there and back.
    mean = temperature**2 / max(gap.numel(), 1)
    to_forward, to_reverse = _weights(gap, surer, delta, weighting, scale, mean)
    apart = log_teacher - log_student
    forward = _total(to_forward, (teacher * apart).sum(-1))
    against = _total(to_reverse, (student * apart).sum(-1))
    share = surer.mean() if gap.numel() else surer.sum()
    return BDKDTerms(forward - against, forward, -against, share)


def balance_weights(
    student_logits: Float[Tensor, "*rows classes"],
    teacher_logits: Float[Tensor, "*rows classes"],
    delta: float | int = 2.0,
    temperature: float | int = 1.0,
    weighting: Weighting = "switch",
    scale: float | int = 0.1,
) -> tuple[Float[Tensor, "*rows"], Float[Tensor, "*rows"]]:
    """Weights of the forward and of the reverse divergence of each row, from the entropies of both models.

    Where the student is more certain than the teacher, the forward divergence, which spreads it, weighs ``delta`` and
    the reverse one 1; where it is not, the other way round. With ``sigmoid`` weights change smoothly with the
    gap of the entropies, ``1 + (delta - 1) sigmoid(± gap / scale)``.

    Args:
        student_logits, teacher_logits: ``[..., classes]``; detached.
        delta: at least 1; at 1 both weights are 1.
        temperature: softens both sides before entropies are taken; above 0.
        weighting: ``switch`` or ``sigmoid``.
        scale: of ``sigmoid``, in nats; above 0.

    Returns:
        (forward, reverse), each ``[...]``, between 1 and delta, detached.

    Raises:
        ValueError: shapes do not agree, or an option is out of range.

    Source: Amara et al., "BD-KD: Balancing the Divergences for Online Knowledge Distillation" (arXiv 2212.12965); the
    weights' form is ours.
    """
    logs = _log_probabilities(student_logits.detach(), teacher_logits, temperature)
    gap = _gap(logs[0], logs[0].exp(), logs[1], logs[1].exp())
    return _weights(gap, (gap > 0).to(gap.dtype), delta, weighting, scale)


def bdkd_teacher_loss(
    teacher_logits: Float[Tensor, "*rows classes"],
    student_logits: Float[Tensor, "*rows classes"],
    temperature: float | int = 1.0,
) -> Float[Tensor, ""]:
    """Divergence of a teacher that learns too from its student, ``temperature² · mean KL(p_s || p_t)``.

    Args:
        teacher_logits: ``[..., classes]``; they get the gradient.
        student_logits: ``[..., classes]``; detached.
        temperature: softens both sides; above 0.

    Returns:
        A scalar in nats, at least float32; without rows 0 with a zero gradient.

    Raises:
        ValueError: shapes do not agree, or the temperature is not above 0.

    Source: Zhang et al., "Deep Mutual Learning" (arXiv 1706.00384), equation 5; Amara et al. (arXiv 2212.12965) use the
    same for the teacher's side.
    """
    check_same_shape(teacher_logits=teacher_logits, student_logits=student_logits)
    return kd_loss(teacher_logits, student_logits, temperature)


def _log_probabilities(student: Tensor, teacher: Tensor, temperature: float | int) -> tuple[Tensor, Tensor]:
    check_positive("temperature", temperature)
    check_same_shape(student_logits=student, teacher_logits=teacher)
    log_student = tempered(student, temperature).log_softmax(-1)
    return log_student, tempered(teacher.detach(), temperature).log_softmax(-1)


def _gap(log_student: Tensor, student: Tensor, log_teacher: Tensor, teacher: Tensor) -> Tensor:
    """Entropy of the teacher less that of the student, without a gradient."""
    return (student * log_student).sum(-1).detach() - (teacher * log_teacher).sum(-1)


def _total(weights: Tensor, rows: Tensor) -> Tensor:
    return torch.dot(weights, rows) if rows.dim() == 1 else (weights * rows).sum()


def _weights(
    gap: Tensor,
    surer: Tensor,
    delta: float | int,
    weighting: str,
    scale: float | int,
    factor: float | int = 1.0,
) -> tuple[Tensor, Tensor]:
    """Of the forward and of the reverse divergence, times ``factor``."""
    if not (math.isfinite(delta) and delta >= 1):
        raise ValueError(f"delta must be finite and at least 1; got {delta}")
    if weighting not in get_args(Weighting):
        raise ValueError(f"weighting must be one of {', '.join(get_args(Weighting))}; got {weighting!r}")
    check_positive("scale", scale)
    # factor · (1 + (delta - 1) · chosen), for the chosen side and for the other
    more = factor * (delta - 1)
    chosen = torch.sigmoid(gap / scale) if weighting == "sigmoid" else surer
    return torch.rsub(chosen, factor, alpha=-more), torch.rsub(chosen, factor * delta, alpha=more)
