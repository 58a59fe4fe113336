"""Losses between inner features of two models."""

from __future__ import annotations

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from tutelage.functional.checks import check_same_shape
from tutelage.functional.reductions import upcast

__all__ = ["fitnet_loss"]


def fitnet_loss(
    student_features: Float[Tensor, "*shape"], teacher_features: Float[Tensor, "*shape"]
) -> Float[Tensor, ""]:
    """Mean squared difference of a student's projected feature and the teacher's, over all entries.

    Args:
        student_features: ``[batch, channels, height, width]`` or any other shape, already projected to the teacher's.
        teacher_features: the same shape; detached.

    Returns:
        A scalar, at least float32; without entries 0 with a zero gradient.

    Raises:
        ValueError: shapes do not agree.

    Source: Romero et al., "FitNets: Hints for Thin Deep Nets" (arXiv 1412.6550), equation 3, as a mean.
    """
    check_same_shape(student_features=student_features, teacher_features=teacher_features)
    student, teacher = upcast(student_features), upcast(teacher_features.detach())
    return F.mse_loss(student, teacher, reduction="sum") / max(student.numel(), 1)
