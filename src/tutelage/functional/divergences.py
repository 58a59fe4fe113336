"""Divergences between the class distributions of two models, all in log space."""

from __future__ import annotations

import math

from jaxtyping import Float, Integer, Shaped
from torch import Tensor

from tutelage.functional.checks import check_positive, check_same_shape
from tutelage.functional.reductions import masked_mean, upcast

__all__ = ["kd_loss"]


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
    check_positive("temperature", temperature)
    check_same_shape(student_logits=student_logits, teacher_logits=teacher_logits)
    log_student = tempered(student_logits, temperature).log_softmax(-1)
    log_teacher = tempered(teacher_logits.detach(), temperature).log_softmax(-1)
    divergence = (log_teacher.exp() * (log_teacher - log_student)).sum(-1)
    if isinstance(weight, Tensor) and weight.dim():
        check_same_shape(weight=weight, rows=divergence)
    return masked_mean(divergence * weight, mask) * temperature**2


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
