"""Feature maps of two models brought to one size."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

__all__: list[str] = []

Maps = Tensor | Sequence[Tensor]


def as_map(features: Float[Tensor, "*shape"]) -> Float[Tensor, "batch channels height width"]:
    """A map as it is, a vector ``[batch, channels]`` as a map of one position.

    Raises:
        ValueError: neither of them.
    """
    if features.dim() == 2:
        return features[..., None, None]
    if features.dim() == 4:
        return features
    raise ValueError(
        f"features must be maps [batch, channels, height, width] or vectors [batch, channels]; "
        f"got shape {list(features.shape)}"
    )


def pooled_alike(
    student: Float[Tensor, "batch student_channels student_height student_width"],
    teacher: Float[Tensor, "batch teacher_channels teacher_height teacher_width"],
) -> tuple[Tensor, Tensor]:
    """Both maps at the smaller of their heights and of their widths; the larger one is average-pooled (adaptive)."""
    size = min(student.shape[2], teacher.shape[2]), min(student.shape[3], teacher.shape[3])
    alike = [
        each if tuple(each.shape[2:]) == size else F.adaptive_avg_pool2d(each, size)
        for each in (student, teacher)
    ]
    return alike[0], alike[1]


def map_pairs(student_features: Maps, teacher_features: Maps) -> list[tuple[Tensor, Tensor]]:
    """The pairs of a pair of tensors, or of two equally long sequences of them.

    Raises:
        ValueError: one side is a tensor and the other is not, they are not equally many, or there are none.
    """
    sides = [
        [side] if isinstance(side, Tensor) else list(side) for side in (student_features, teacher_features)
    ]
    if len(sides[0]) != len(sides[1]) or not sides[0]:
        shapes = [", ".join(str(list(tensor.shape)) for tensor in side) or "none" for side in sides]
        raise ValueError(
            f"features are compared in pairs; the student gives {len(sides[0])} ({shapes[0]}), the teacher "
            f"{len(sides[1])} ({shapes[1]})"
        )
    return list(zip(*sides, strict=True))
