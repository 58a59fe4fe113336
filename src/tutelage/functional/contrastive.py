"""CRD: each embedding tells its own row's memory of the other model from those of rows of other classes."""

from __future__ import annotations

import math
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Integer, Shaped
from torch import Tensor

from tutelage.functional.checks import check_positive, check_same_shape, check_share
from tutelage.functional.reductions import masked_mean, upcast

__all__ = ["CRDStep", "crd_linear_loss", "crd_loss"]

_DENSE_ROWS = 32
"""Scores of all rows are cheaper than a copy of the contrasted ones, up to so many times as many rows."""


class CRDStep(NamedTuple):
    """A step of CRD: the loss, the memories after it (detached copies) and the normalisers that were used."""

    loss: Float[Tensor, ""]
    memory_student: Float[Tensor, "rows width"]
    memory_teacher: Float[Tensor, "rows width"]
    z_student: Float[Tensor, ""]
    z_teacher: Float[Tensor, ""]


def crd_loss(
    student_embedding: Float[Tensor, "batch width"],
    teacher_embedding: Float[Tensor, "batch width"],
    memory_student: Float[Tensor, "rows width"],
    memory_teacher: Float[Tensor, "rows width"],
    index: Integer[Tensor, " batch"],
    contrast_index: Integer[Tensor, "batch contrasts"],
    temperature: float | int = 0.07,
    momentum: float | int = 0.5,
    z_student: float | int | Float[Tensor, ""] | None = None,
    z_teacher: float | int | Float[Tensor, ""] | None = None,
    eps: float = 1e-7,
    mode: Literal["exact", "relax"] = "exact",
) -> CRDStep:
    """Contrastive distillation against memories: noise-contrastive estimation, student to teacher and back.

    With ``a_s = exp(<memory_teacher[contrast_index], student_embedding> / temperature) / z_student``, K negatives and
    ``c = K / rows``: ``−mean over the batch of [log(a_0 / (a_0 + c + eps)) + Σ_k log(c / (a_k + c + eps))]``, plus the
    same of ``a_t``, the teacher's embedding against the student's memory. It is computed in log space. Then each
    memory's row becomes ``normalize(momentum · old + (1 − momentum) · embedding)``; where an index stands twice in the
    batch, the last one counts.

    Args:
        student_embedding: ``[batch, width]``, rows of length 1.
        teacher_embedding: likewise; not detached, since its projection is trained too.
        memory_student: ``[rows, width]``, detached; left as it is.
        memory_teacher: likewise.
        index: ``[batch]``, each sample's row of the memories.
        contrast_index: ``[batch, 1 + K]``: the positive's row, then those of K ≥ 1 negatives.
        temperature: above 0.
        momentum: share of the old memory, in [0, 1].
        z_student: constant that makes scores probabilities. None: ``rows`` times the mean of this batch's scores,
            detached; hand the returned one on to later steps.
        z_teacher: likewise.
        eps: keeps the ratios finite; above 0.
        mode: ``exact``: the positive is the sample itself; ``relax``: it may be another row of its class.

    Returns:
        `CRDStep`; the loss is at least float32, and 0 with a zero gradient for an empty batch.

    Raises:
        ValueError: shapes do not agree, no negatives, options out of range, or in mode ``exact`` a first column that is
            not ``index`` (values are looked at on the CPU only).

    Source: Tian, Krishnan, Isola, "Contrastive Representation Distillation" (arXiv 1910.10699), section 3.2, and the
    authors' code.
    """
    check_positive("temperature", temperature)
    check_positive("eps", eps)
    check_share("momentum", momentum)
    check_same_shape(student_embedding=student_embedding, teacher_embedding=teacher_embedding)
    check_same_shape(memory_student=memory_student, memory_teacher=memory_teacher)
    _check_contrast(index, contrast_index, mode)
    rows = len(memory_student)
    sides = []
    for embedding, memory, z in (
        (student_embedding, memory_teacher, z_student),
        (teacher_embedding, memory_student, z_teacher),
    ):
        scores = contrast_scores(embedding, memory, contrast_index, temperature)
        constant = normaliser(scores, rows) if z is None else torch.as_tensor(z).to(scores)
        sides.append((nce_loss(scores, constant, rows, eps), constant))
    (student_loss, z_student), (teacher_loss, z_teacher) = sides
    return CRDStep(
        student_loss + teacher_loss,
        _remembered(memory_student, index, student_embedding, momentum),
        _remembered(memory_teacher, index, teacher_embedding, momentum),
        z_student,
        z_teacher,
    )


def crd_linear_loss(
    student_features: Float[Tensor, "batch student_features"],
    teacher_features: Float[Tensor, "batch teacher_features"],
    student_weight: Float[Tensor, "width student_features"],
    student_bias: Float[Tensor, " width"],
    teacher_weight: Float[Tensor, "width teacher_features"],
    teacher_bias: Float[Tensor, " width"],
    memory_student: Float[Tensor, "rows width"],
    memory_teacher: Float[Tensor, "rows width"],
    index: Integer[Tensor, " batch"],
    contrast_index: Integer[Tensor, "batch contrasts"],
    **options: Any,
) -> CRDStep:
    """`crd_loss` of embeddings ``normalize(features @ weight.T + bias)``, for loops without a module.

    Args:
        student_features: ``[batch, features]``, pooled; gradients reach them.
        teacher_features: likewise; detached, while gradients reach the teacher's weight and bias.
        student_weight, student_bias, teacher_weight, teacher_bias: ``[width, features]`` and ``[width]``.
        memory_student, memory_teacher, index, contrast_index: of `crd_loss`.
        options: temperature, momentum, z_student, z_teacher, eps, mode of `crd_loss`.

    Raises:
        ValueError: as `crd_loss`.
    """
    with torch.autocast(student_features.device.type, enabled=False):
        student = F.linear(upcast(student_features), upcast(student_weight), upcast(student_bias))
        teacher = F.linear(upcast(teacher_features.detach()), upcast(teacher_weight), upcast(teacher_bias))
    return crd_loss(
        F.normalize(student, dim=1),
        F.normalize(teacher, dim=1),
        memory_student,
        memory_teacher,
        index,
        contrast_index,
        **options,
    )


def contrast_scores(
    embedding: Float[Tensor, "batch width"],
    memory: Float[Tensor, "rows width"],
    contrast_index: Integer[Tensor, "batch contrasts"],
    temperature: float | int,
) -> Float[Tensor, "batch contrasts"]:
    """``<memory[contrast_index], embedding> / temperature``, at least float32; the memory is detached."""
    contrasts, (rows, width) = contrast_index.shape[1], memory.shape
    with torch.autocast(embedding.device.type, enabled=False):
        query, memory = upcast(embedding) / temperature, upcast(memory.detach())
        if rows <= min(_DENSE_ROWS, width) * contrasts:
            return (query @ memory.T).gather(1, contrast_index)
        contrasted = memory.index_select(0, contrast_index.flatten()).view(-1, contrasts, width)
        return torch.bmm(contrasted, query[..., None])[..., 0]


def normaliser(scores: Float[Tensor, "batch contrasts"], rows: int) -> Float[Tensor, ""]:
    """``rows · mean(exp(scores))``, detached."""
    return rows * masked_mean(scores.detach().exp())


def nce_loss(
    scores: Float[Tensor, "batch contrasts"],
    z: Float[Tensor, ""],
    rows: int,
    eps: float = 1e-7,
    mask: Shaped[Tensor, " batch"] | None = None,
) -> Float[Tensor, ""]:
    """Noise-contrastive estimation of the first column against the others, the mean over the rows that count.

    ``log(a / (a + m)) = −softplus(log m − log a)`` and ``log(c / (a + m)) = log(c / m) − softplus(log a − log m)`` with
    ``m = c + eps``: nothing overflows, however large the scores.
    """
    negatives = scores.shape[1] - 1
    noise = negatives / rows
    odds = scores - (z * (noise + eps)).log()
    positive = F.softplus(-odds[:, 0])
    negative = F.softplus(odds[:, 1:]).sum(1) + negatives * math.log1p(eps / noise)
    return masked_mean(positive + negative, mask)


def moved_rows(
    memory: Float[Tensor, "rows width"],
    index: Integer[Tensor, " batch"],
    embedding: Float[Tensor, "batch width"],
    momentum: float | int,
) -> Float[Tensor, "batch width"]:
    """What to write into the memory at ``index``: ``normalize(momentum · old + (1 − momentum) · embedding)``, detached.

    Where a row stands several times in ``index``, its last embedding counts: all of its places get the same, so that
    the order in which a device writes them does not matter.
    """
    places = torch.arange(len(index), device=index.device)
    last = places.new_zeros(len(memory)).scatter_reduce(0, index, places, "amax")[index]
    moved = torch.lerp(embedding.detach().to(memory)[last], memory.detach()[index], momentum)
    return F.normalize(moved, dim=1)


def _remembered(
    memory: Float[Tensor, "rows width"],
    index: Integer[Tensor, " batch"],
    embedding: Float[Tensor, "batch width"],
    momentum: float | int,
) -> Float[Tensor, "rows width"]:
    return memory.detach().index_copy(0, index, moved_rows(memory, index, embedding, momentum))


def _check_contrast(
    index: Integer[Tensor, " batch"], contrast_index: Integer[Tensor, "batch contrasts"], mode: str
) -> None:
    if mode not in ("exact", "relax"):
        raise ValueError(f"mode must be 'exact' or 'relax'; got {mode!r}")
    if contrast_index.dim() != 2 or len(contrast_index) != len(index) or contrast_index.shape[1] < 2:
        raise ValueError(
            f"contrast_index must be [{len(index)}, 1 + negatives] with at least one negative; "
            f"got shape {list(contrast_index.shape)}"
        )
    if mode == "exact" and index.device.type == "cpu" and not torch.equal(contrast_index[:, 0], index):
        row = int((contrast_index[:, 0] != index).nonzero()[0])
        raise ValueError(
            f"in mode 'exact' the first column of contrast_index is the sample itself; in row {row} it is "
            f"{int(contrast_index[row, 0])}, index is {int(index[row])}"
        )
