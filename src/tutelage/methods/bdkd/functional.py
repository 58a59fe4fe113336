"""What a teacher learns from its student, as pure functions of tensors."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from tutelage.functional.checks import check_same_shape
from tutelage.functional.divergences import kd_loss

__all__ = ["bdkd_teacher_loss"]


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
