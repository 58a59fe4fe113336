"""Regression on logits (arXiv 1312.6184)."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from tutelage.functional.checks import check_same_shape
from tutelage.functional.reductions import masked_mean, upcast

__all__ = ["logit_mse_loss"]


def logit_mse_loss(
    student_logits: Float[Tensor, "batch classes"], teacher_logits: Float[Tensor, "batch classes"]
) -> Float[Tensor, ""]:
    """Half the squared distance between the logits of two models, each row less its own mean.

    A constant added to a row of logits changes no probability, so it is taken off both sides. Summed over classes,
    averaged over rows; 0 where the logits agree up to a constant a row.

    Args:
        student_logits: ``[batch, classes]``.
        teacher_logits: ``[batch, classes]``; detached.

    Returns:
        A scalar in squared units of the logits, at least float32; an empty batch gives 0 with a zero gradient.

    Raises:
        ValueError: shapes do not agree.

    Source: Ba, Caruana, "Do Deep Nets Really Need to be Deep?" (arXiv 1312.6184), the loss for regressing logits, which
    leaves the rows as they are.
    """
    check_same_shape(student_logits=student_logits, teacher_logits=teacher_logits)
    difference = upcast(student_logits) - upcast(teacher_logits.detach())
    difference = difference - difference.mean(-1, keepdim=True)
    return masked_mean(difference.square().sum(-1)) / 2
