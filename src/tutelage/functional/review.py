"""ReviewKD's loss: maps compared whole and at several sizes of a pyramid."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from tutelage.functional.checks import check_same_shape
from tutelage.functional.maps import Maps, map_pairs
from tutelage.functional.reductions import mean_squared, upcast

__all__ = ["hcl_loss"]


def hcl_loss(
    student_features: Maps, teacher_features: Maps, levels: Sequence[int] = (4, 2, 1)
) -> Float[Tensor, ""]:
    """Hierarchical context loss: the mean squared difference of two maps, and of both pooled to ``level × level``.

    For one stage ``(MSE(s, t) + Σ w_g MSE(pool_g(s), pool_g(t))) / (1 + Σ w_g)`` over the levels g below the map's
    height, with weights ½, ¼, … in the order of these levels. Stages are summed.

    Args:
        student_features: a map ``[batch, channels, height, width]``, or several in a sequence, already fused and
            projected to the teacher's shapes.
        teacher_features: as many, of the same shapes; detached.
        levels: sides of the pooled maps; each at least 1.

    Returns:
        A scalar, at least float32; 0 where all maps agree, and for an empty batch, with a zero gradient.

    Raises:
        ValueError: not equally many maps, shapes that do not agree, features that are no maps, or a level below 1.

    Source: Chen et al., "Distilling Knowledge via Knowledge Review" (arXiv 2104.09044), section 3.4.
    """
    if any(level < 1 for level in levels):
        raise ValueError(f"levels must be at least 1; got {tuple(levels)}")
    stages = [
        _stage_loss(student, teacher, levels)
        for student, teacher in map_pairs(student_features, teacher_features)
    ]
    return sum(stages[1:], start=stages[0])


def _stage_loss(
    student: Float[Tensor, "*student_shape"], teacher: Float[Tensor, "*teacher_shape"], levels: Sequence[int]
) -> Float[Tensor, ""]:
    check_same_shape(student_features=student, teacher_features=teacher)
    if student.dim() != 4:
        raise ValueError(
            f"hcl_loss compares maps [batch, channels, height, width]; got {list(student.shape)}"
        )
    student, teacher = upcast(student), upcast(teacher.detach())
    height = student.shape[2]
    loss, total, weight = mean_squared(student, teacher), 1.0, 1.0
    pooled = whole = (student, teacher)
    for level in (level for level in levels if level < height):
        ours, theirs = pooled if _divides(level, pooled[0]) else whole
        even = _divides(level, ours)
        ours, theirs = F.adaptive_avg_pool2d(ours, level), F.adaptive_avg_pool2d(theirs, level)
        if even:
            # Means over cells of one size: means of these are means of the whole map, for a fraction of the work.
            pooled = ours, theirs
        weight /= 2
        total += weight
        loss = loss + weight * mean_squared(ours, theirs)
    return loss / total


def _divides(level: int, features: Float[Tensor, "batch channels height width"]) -> bool:
    return features.shape[2] % level == 0 and features.shape[3] % level == 0
