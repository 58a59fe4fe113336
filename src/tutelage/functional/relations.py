"""Losses between the relations of a batch's rows: distances, angles and similarities of their features."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from tutelage.functional.checks import check_positive
from tutelage.functional.features import unit_rows
from tutelage.functional.reductions import upcast, without_autocast

__all__ = ["pkt_loss", "rkd_loss", "sp_loss"]

_CHUNK = 2**22
"""Entries of the largest tensor that the angles of some anchors need at once."""

_SHORT = 1e-12
"""A difference of rows that is no longer has no direction."""


def rkd_loss(
    student_features: Float[Tensor, "batch _ *student"],
    teacher_features: Float[Tensor, "batch _ *teacher"],
    distance_weight: float | int = 25.0,
    angle_weight: float | int = 50.0,
    squared: bool = False,
    eps: float = 1e-12,
) -> Float[Tensor, ""]:
    """Smooth L1 difference of the rows' distances and angles, ``distance_weight · D + angle_weight · A``.

    - ``D`` compares pairwise Euclidean distances, each side divided by its own mean over distinct rows: mean over
      ``batch²`` entries, the diagonal being 0;
    - ``A`` compares the cosines of the angles ``j i k`` at every row ``i``: mean over all ``batch³`` entries.

    Squared distances are clamped at eps, so that equal rows are legal; there neither distances nor angles have a
    gradient. The ``batch³`` cosines are never held at once. The angles' gradient is formed in the forward and can be
    differentiated only once.

    Args:
        student_features: ``[batch, ...]``, flattened.
        teacher_features: ``[batch, ...]``, flattened, of any width; detached.
        distance_weight, angle_weight: weights of the two parts.
        squared: compare squared distances.
        eps: least squared distance of two rows; above 0.

    Returns:
        A scalar, at least float32, unchanged where either side is scaled. Fewer than two rows give 0 with a zero
        gradient.

    Raises:
        ValueError: the sides have unequally many rows, or eps is not above 0.

    Source: Park et al., "Relational Knowledge Distillation" (arXiv 1904.05068), equations 4 to 9.
    """
    check_positive("eps", eps)
    student, teacher = _flat(student_features, teacher_features)
    if len(student) < 2:
        return student.sum() * 0
    with without_autocast(student):
        distance = F.smooth_l1_loss(_distances(student, squared, eps), _distances(teacher, squared, eps))
        differentiable = student.requires_grad and torch.is_grad_enabled()
        angle: Tensor = _Angles.apply(student, teacher, differentiable)[0]
    return distance_weight * distance + angle_weight * angle


def pkt_loss(
    student_features: Float[Tensor, "batch _ *student"],
    teacher_features: Float[Tensor, "batch _ *teacher"],
    eps: float = 1e-7,
) -> Float[Tensor, ""]:
    """Divergence of the rows' similarity distributions, ``mean over batch² of P_t log((P_t + eps) / (P_s + eps))``.

    ``P`` is ``(cos + 1) / 2`` of every pair of rows, a row with itself included, divided by its row's sum. A row of
    zeros has cosine 0 with all.

    Args:
        student_features: ``[batch, ...]``, flattened.
        teacher_features: ``[batch, ...]``, flattened, of any width; detached.
        eps: added to norms and probabilities; above 0.

    Returns:
        A scalar in nats, at least float32; an empty batch gives 0 with a zero gradient.

    Raises:
        ValueError: the sides have unequally many rows, or eps is not above 0.

    Source: Passalis, Tefas, "Learning Deep Representations with Probabilistic Knowledge Transfer"
    (arXiv 1803.10837), equations 4 to 6 with the cosine kernel.
    """
    check_positive("eps", eps)
    student, teacher = _flat(student_features, teacher_features)
    if not len(student):
        return student.sum()
    with without_autocast(student):
        ours, theirs = _affinities(student, eps), _affinities(teacher, eps)
    return (theirs * ((theirs + eps) / (ours + eps)).log()).mean()


def sp_loss(
    student_features: Float[Tensor, "batch _ *student"], teacher_features: Float[Tensor, "batch _ *teacher"]
) -> Float[Tensor, ""]:
    """Mean squared difference of the batch's Gram matrices, each row of them normalised to length 1.

    A row of zeros stays one, without a gradient.

    Args:
        student_features: ``[batch, ...]``, flattened.
        teacher_features: ``[batch, ...]``, flattened, of any width; detached.

    Returns:
        A scalar, at least float32, unchanged where either side is scaled. Fewer than two rows give 0 with a zero
        gradient.

    Raises:
        ValueError: the sides have unequally many rows.

    Source: Tung, Mori, "Similarity-Preserving Knowledge Distillation" (arXiv 1907.09682), equations 2 to 4.
    """
    student, teacher = _flat(student_features, teacher_features)
    if len(student) < 2:
        return student.sum() * 0
    with without_autocast(student):
        return F.mse_loss(unit_rows(_gram(student)), unit_rows(_gram(teacher)))


def _flat(
    student: Float[Tensor, "*student_shape"], teacher: Float[Tensor, "*teacher_shape"]
) -> tuple[Float[Tensor, "batch ours"], Float[Tensor, "batch theirs"]]:
    if min(student.dim(), teacher.dim()) < 2 or len(student) != len(teacher):
        raise ValueError(
            "features must be [batch, ...] with equally many rows; got student_features "
            f"{list(student.shape)}, teacher_features {list(teacher.shape)}"
        )
    return upcast(student).flatten(1), upcast(teacher.detach()).flatten(1)


def _distances(
    features: Float[Tensor, "batch width"], squared: bool, eps: float
) -> Float[Tensor, "batch batch"]:
    """Distances of all pairs of rows over their mean, 0 on the diagonal."""
    # Not by a matrix product: it loses the digits of close rows.
    plain = torch.cdist(features, features, compute_mode="donot_use_mm_for_euclid_dist")
    distances = plain.square().clamp(min=eps) if squared else plain.clamp(min=eps**0.5)
    distances = distances.fill_diagonal_(0.0)
    rows = len(features)
    return distances / (distances.sum() / (rows * (rows - 1)))


def _affinities(features: Float[Tensor, "batch width"], eps: float) -> Float[Tensor, "batch batch"]:
    unit = features / (torch.linalg.vector_norm(features, dim=1, keepdim=True) + eps)
    shifted = _gram(unit) + 1  # twice the (cos + 1) / 2, which the sum below takes out again
    return shifted / shifted.sum(1, keepdim=True)


def _gram(features: Float[Tensor, "batch width"]) -> Float[Tensor, "batch batch"]:
    products: Tensor = _Gram.apply(features)
    return products


class _Gram(torch.autograd.Function):
    """Inner products of all pairs of rows, whose gradient takes one product instead of the usual two."""

    # Not by setup_context: it looks at the signature on every call, which costs more than the product.
    @staticmethod
    def forward(ctx: Any, features: Tensor) -> Tensor:
        ctx.save_for_backward(features)
        return features @ features.T

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> Tensor:
        (features,) = ctx.saved_tensors
        with without_autocast(features):
            gradient: Tensor = (upstream + upstream.T) @ features
        return gradient


class _Angles(torch.autograd.Function):
    """Mean smooth L1 difference of ``<e_ij, e_ik>``, ``e_ij = (f_j - f_i) / |f_j - f_i|``, over all i, j, k.

    Some anchors i at a time, with their part of the gradient, so that neither direction holds more than a chunk.
    """

    @staticmethod
    def forward(student: Tensor, teacher: Tensor, differentiable: bool) -> tuple[Tensor, Tensor]:
        rows = len(student)
        anchors = max(1, _CHUNK // (rows * max(rows, student.shape[1], teacher.shape[1])))
        total, gradient = student.new_zeros(()), torch.zeros_like(student)
        for start in range(0, rows, anchors):
            chunk = slice(start, start + anchors)
            unit, norms = _directions(student, chunk)
            cosines = unit @ unit.mT
            other, _ = _directions(teacher, chunk)
            wanted = (other @ other.mT).to(cosines.dtype)
            total += F.smooth_l1_loss(cosines, wanted, reduction="sum")
            if differentiable:
                slope = (cosines - wanted).clamp_(-1, 1)
                along = (slope * cosines).sum(2, keepdim=True)
                # d cosines reaches e_ij twice, as <e_ij, e_ik> and <e_ik, e_ij>.
                change = torch.baddbmm(unit * along, slope, unit, beta=-1).mul_(2 / norms)
                change.masked_fill_(norms <= _SHORT, 0.0)
                gradient += change.sum(0)
                gradient[chunk] -= change.sum(1)
        return total / rows**3, gradient / rows**3

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, bool], output: tuple[Tensor, Tensor]) -> None:
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(output[1])

    @staticmethod
    def backward(ctx: Any, upstream: Tensor, _: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        if torch.is_grad_enabled():
            raise RuntimeError("rkd_loss has first derivatives only; differentiate it without create_graph")
        return gradient * upstream, None, None


def _directions(
    features: Float[Tensor, "batch width"], chunk: slice
) -> tuple[Float[Tensor, "anchors batch width"], Float[Tensor, "anchors batch 1"]]:
    """Unit vectors from the chunk's rows to all rows, and the clamped lengths that they were divided by."""
    differences = features - features[chunk, None]
    norms = torch.linalg.vector_norm(differences, dim=2, keepdim=True).clamp(min=_SHORT)
    return differences.div_(norms), norms
