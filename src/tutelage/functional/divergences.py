"""Divergences between the class distributions of two models, all in log space."""

from __future__ import annotations

import math

import torch.nn.functional as F
from jaxtyping import Float, Integer, Shaped
from torch import Tensor

from tutelage.functional.checks import check_positive, check_same_shape
from tutelage.functional.reductions import masked_mean, upcast

__all__ = ["entropy", "forward_kl", "kd_loss", "reverse_kl"]


def kd_loss(
    student_logits: Float[Tensor, "*rows classes"],
    teacher_logits: Float[Tensor, "*rows classes"],
    temperature: float | int = 4.0,
    mask: Shaped[Tensor, "*rows"] | None = None,
    weight: float | int | Float[Tensor, ""] | Float[Tensor, "*rows"] = 1.0,
) -> Float[Tensor, ""]:
    """Softened KL divergence of the student from the teacher, ``temperature² · mean KL(p_t || p_s)``.

    ``p = softmax(logits / temperature)``. It is summed over classes, the last axis, and averaged over all leading axes,
    so it serves rows of images and tokens of text alike; 0 where the logits agree up to a constant a row.

    Args:
        student_logits: ``[..., classes]``.
        teacher_logits: ``[..., classes]``; detached.
        temperature: softens both sides; above 0. The factor temperature² keeps the gradient's size.
        mask: ``[...]``, not zero where a row counts; the mean is over those alone. None counts: 0 with a zero gradient.
        weight: one number, or one a row ``[...]``; multiplied in before the mean, which stays over rows.

    Returns:
        A scalar in nats, at least float32.

    Raises:
        ValueError: shapes do not agree, or the temperature is not above 0.

    Source: Hinton, Vinyals, Dean, "Distilling the Knowledge in a Neural Network" (arXiv 1503.02531), section 2.
    """
    by_row = weight if isinstance(weight, Tensor) and weight.dim() else None
    if mask is None and by_row is None:
        log_student, log_teacher = _log_probabilities(student_logits, teacher_logits, temperature)
        whole = F.kl_div(log_student, log_teacher, reduction="sum", log_target=True)
        return whole * (weight * temperature**2 / max(student_logits.shape[:-1].numel(), 1))
    divergence = forward_kl(student_logits, teacher_logits, temperature)
    if by_row is not None:
        check_same_shape(weight=by_row, rows=divergence)
    return masked_mean(divergence * weight, mask) * temperature**2


def forward_kl(
    student_logits: Float[Tensor, "*rows classes"],
    teacher_logits: Float[Tensor, "*rows classes"],
    temperature: float | int = 1.0,
) -> Float[Tensor, "*rows"]:
    """``KL(p_t || p_s)`` of each row, ``p = softmax(logits / temperature)``: it spreads the student over all that the
    teacher holds possible.

    Args:
        student_logits: ``[..., classes]``.
        teacher_logits: ``[..., classes]``; detached.
        temperature: softens both sides; above 0. Its square is no factor here.

    Returns:
        ``[...]`` in nats, at least float32.

    Raises:
        ValueError: shapes do not agree, or the temperature is not above 0.
    """
    log_student, log_teacher = _log_probabilities(student_logits, teacher_logits, temperature)
    return (log_teacher.exp() * (log_teacher - log_student)).sum(-1)


def reverse_kl(
    student_logits: Float[Tensor, "*rows classes"],
    teacher_logits: Float[Tensor, "*rows classes"],
    temperature: float | int = 1.0,
) -> Float[Tensor, "*rows"]:
    """``KL(p_s || p_t)`` of each row: it draws the student to where the teacher is most certain. The gradient reaches
    the student through both factors. Otherwise as `forward_kl`."""
    log_student, log_teacher = _log_probabilities(student_logits, teacher_logits, temperature)
    return (log_student.exp() * (log_student - log_teacher)).sum(-1)


def entropy(logits: Float[Tensor, "*rows classes"], temperature: float | int = 1.0) -> Float[Tensor, "*rows"]:
    """Entropy of each row of ``softmax(logits / temperature)``, in nats, at least float32: from 0 to log classes.

    Raises:
        ValueError: the temperature is not above 0.
    """
    check_positive("temperature", temperature)
    log_probabilities = tempered(logits, temperature).log_softmax(-1)
    return -(log_probabilities.exp() * log_probabilities).sum(-1)


def _log_probabilities(
    student_logits: Tensor, teacher_logits: Tensor, temperature: float | int
) -> tuple[Tensor, Tensor]:
    check_positive("temperature", temperature)
    check_same_shape(student_logits=student_logits, teacher_logits=teacher_logits)
    log_student = tempered(student_logits, temperature).log_softmax(-1)
    return log_student, tempered(teacher_logits.detach(), temperature).log_softmax(-1)


def tempered(logits: Float[Tensor, "*shape"], temperature: float | int) -> Float[Tensor, "*shape"]:
    """``logits / temperature``, at least in float32; at temperature 1 without a copy."""
    return upcast(logits) if temperature == 1 else upcast(logits) / temperature


def log_softmax_without(
    logits: Float[Tensor, "batch classes"], exclude: Integer[Tensor, "batch excluded"]
) -> Float[Tensor, "batch classes"]:
    """Log-probabilities over all classes but the excluded ones, where 0 stands and no gradient arises.

    ``exclude`` names at least one class a row and leaves at least one. The exclusion is exact however large the logits.
    """
    return logits.scatter(1, exclude, -math.inf).log_softmax(-1).scatter(1, exclude, 0.0)


def softmax_without(
    logits: Float[Tensor, "batch classes"], exclude: Integer[Tensor, "batch excluded"]
) -> Float[Tensor, "batch classes"]:
    """Probabilities over all classes but the excluded ones, which get exactly 0."""
    return logits.scatter(1, exclude, -math.inf).softmax(-1)
