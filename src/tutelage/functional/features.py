"""Losses between inner features of two models."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from tutelage.functional.checks import check_same_shape
from tutelage.functional.maps import Maps, map_pairs, pooled_alike
from tutelage.functional.reductions import mean_squared, upcast

__all__ = ["at_loss", "fitnet_loss"]


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
    return mean_squared(upcast(student_features), upcast(teacher_features.detach()))


def at_loss(student_features: Maps, teacher_features: Maps, p: int = 2) -> Float[Tensor, ""]:
    """Mean squared difference of spatial attention, ``A(f) = normalise(flatten(mean over channels of f^p))``.

    Of maps of different size the larger is average-pooled to the smaller first. ``A`` has length 1 in every row; of a
    map of zeros it is 0, without a gradient. With odd ``p`` signs survive.

    Args:
        student_features: a map ``[batch, channels, height, width]``, or several in a sequence.
        teacher_features: as many, of any channels and sizes; detached.
        p: power of the activations; 1 and above.

    Returns:
        A scalar, at least float32: the mean over rows and positions, summed over maps; unchanged where a map is
        multiplied by a number above 0. Without rows 0 with a zero gradient.

    Raises:
        ValueError: not equally many maps or none, features that are no maps, other numbers of rows, or ``p`` below 1.

    Source: Zagoruyko, Komodakis, "Paying More Attention to Attention" (arXiv 1612.03928), section 3.1; the squared
    difference as a mean, to which the usual weight 1000 belongs.
    """
    if p < 1:
        raise ValueError(f"p must be an integer of at least 1; got {p}")
    terms = [
        _attention_difference(student, teacher, p)
        for student, teacher in map_pairs(student_features, teacher_features)
    ]
    return sum(terms[1:], start=terms[0])


def _attention_difference(
    student: Float[Tensor, "*student_shape"], teacher: Float[Tensor, "*teacher_shape"], p: int
) -> Float[Tensor, ""]:
    if student.dim() != 4 or teacher.dim() != 4 or len(student) != len(teacher):
        raise ValueError(
            "at_loss compares maps [batch, channels, height, width] of the same rows; got student_features "
            f"{list(student.shape)}, teacher_features {list(teacher.shape)}"
        )
    maps = pooled_alike(upcast(student), upcast(teacher.detach()))
    return mean_squared(*(unit_rows(_PowerMean.apply(each, p).flatten(1)) for each in maps))


class _PowerMean(torch.autograd.Function):
    """Mean over channels of ``maps^p``, whose gradient takes one pass over the maps."""

    @staticmethod
    def forward(maps: Tensor, p: int) -> Tensor:
        return maps.pow(p).mean(1)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, int], output: Tensor) -> None:
        maps, ctx.p = inputs
        ctx.save_for_backward(maps)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None]:
        (maps,) = ctx.saved_tensors
        power = maps if ctx.p == 2 else maps.pow(ctx.p - 1)
        return power * (upstream * (ctx.p / maps.shape[1]))[:, None], None


def unit_rows(values: Float[Tensor, "rows width"], eps: float = 1e-12) -> Float[Tensor, "rows width"]:
    """Rows divided by their length, but at least by eps; shorter ones have no gradient, which would be 1 / eps."""
    norms: Tensor = torch.linalg.vector_norm(values, dim=1, keepdim=True)
    return torch.where(norms > eps, values, values.detach()) / norms.clamp(min=eps)
