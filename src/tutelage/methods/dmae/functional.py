"""Masked autoencoding and feature alignment on visible patches, as pure functions of tensors."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int64, Shaped
from torch import Tensor
from torch.autograd.function import once_differentiable

from tutelage.functional.checks import check_same_shape
from tutelage.functional.reductions import mean_squared, upcast, without_autocast

__all__ = [
    "dmae_align_loss",
    "dmae_loss",
    "gather_tokens",
    "mask_indices",
    "masked_reconstruction_loss",
    "patchify",
    "unpatchify",
]


_LEAST = 1e-12
"""Length below which a token is not scaled up to 1."""


class MaskIndices(NamedTuple):
    """Which patches are visible.

    ``ids_keep`` are the visible patches of each row, in order of rising noise; ``ids_restore`` puts the visible and
    then the masked ones back in image order; ``mask`` is True where a patch is masked, in image order.
    """

    ids_keep: Int64[Tensor, "batch kept"]
    ids_restore: Int64[Tensor, "batch patches"]
    mask: Bool[Tensor, "batch patches"]


class DMAELoss(NamedTuple):
    """``total = reconstruction + beta · alignment``; the parts as they are."""

    total: Float[Tensor, ""]
    reconstruction: Float[Tensor, ""]
    alignment: Float[Tensor, ""]


def patchify(
    images: Shaped[Tensor, "batch channels height width"], patch_size: int
) -> Shaped[Tensor, "batch patches values"]:
    """Images as rows of patches: row-major over the image, each patch in the order (row, column, channel).

    Args:
        images: ``[batch, channels, height, width]``.
        patch_size: side of a patch in pixels.

    Returns:
        ``[batch, (height/p)·(width/p), p·p·channels]``.

    Raises:
        ValueError: height or width is no multiple of the patch size.
    """
    batch, channels, height, width = images.shape
    if patch_size < 1 or height % patch_size or width % patch_size or not height * width:
        raise ValueError(f"images of {height}×{width} pixels do not divide into patches of side {patch_size}")
    rows, columns = height // patch_size, width // patch_size
    split = images.reshape(batch, channels, rows, patch_size, columns, patch_size)
    return split.permute(0, 2, 4, 3, 5, 1).reshape(batch, rows * columns, patch_size**2 * channels)


def unpatchify(
    patches: Shaped[Tensor, "batch patches values"],
    patch_size: int,
    *,
    channels: int = 3,
    grid: tuple[int, int] | None = None,
) -> Shaped[Tensor, "batch channels height width"]:
    """The images that `patchify` took apart.

    Args:
        patches: ``[batch, patches, p·p·channels]``.
        patch_size: side of a patch in pixels.
        channels: of the images.
        grid: patches down and across; None: as many of both.

    Raises:
        ValueError: the patches do not make such images.
    """
    batch, count, values = patches.shape
    side = math.isqrt(count)
    rows, columns = (side, side) if grid is None else grid
    if rows * columns != count:
        wanted = "a square" if grid is None else f"a grid of {rows}×{columns}"
        raise ValueError(f"{count} patches do not fill {wanted}; give grid=(rows, columns)")
    if patch_size < 1 or values != patch_size**2 * channels:
        raise ValueError(
            f"a patch of side {patch_size} with {channels} channels has {patch_size**2 * channels} values; got {values}"
        )
    split = patches.reshape(batch, rows, columns, patch_size, patch_size, channels)
    return split.permute(0, 5, 1, 3, 2, 4).reshape(batch, channels, rows * patch_size, columns * patch_size)


def mask_indices(noise: Float[Tensor, "batch patches"], mask_ratio: float | int) -> MaskIndices:
    """Leave the ``int(patches · (1 − mask_ratio))`` patches with the smallest noise visible in every row.

    The count is that of floating point numbers: at a ratio of 0.9 one of 16 patches is visible, and none of 10.

    Args:
        noise: ``[batch, patches]``; of equal values the first patch comes first.
        mask_ratio: share of the patches that is masked, in [0, 1).

    Raises:
        ValueError: the ratio lies outside, or leaves no patch visible.
    """
    batch, patches = noise.shape
    if not 0 <= mask_ratio < 1:
        raise ValueError(f"mask_ratio must lie in [0, 1); got {mask_ratio}")
    kept = int(patches * (1 - mask_ratio))
    if kept == 0:
        raise ValueError(
            f"mask_ratio {mask_ratio} leaves int({patches} · (1 − {mask_ratio})) = 0 of {patches} patches visible; "
            "lower it, or take smaller patches"
        )
    shuffle = noise.argsort(dim=1, stable=True)
    places = torch.arange(patches, device=noise.device).expand(batch, patches)
    ids_restore = torch.empty_like(shuffle).scatter_(1, shuffle, places)
    return MaskIndices(shuffle[:, :kept], ids_restore, ids_restore >= kept)


def gather_tokens(
    tokens: Shaped[Tensor, "batch patches width"], ids_keep: Int64[Tensor, "batch kept"]
) -> Shaped[Tensor, "batch kept width"]:
    """Each row's tokens at ``ids_keep``, in that order."""
    return tokens.gather(1, ids_keep[..., None].expand(-1, -1, tokens.shape[2]))


def masked_reconstruction_loss(
    prediction: Float[Tensor, "*prediction_shape"],
    target_patches: Float[Tensor, "*target_shape"],
    mask: Shaped[Tensor, "*mask_shape"],
    *,
    norm_pix: bool = False,
    eps: float = 1e-6,
) -> Float[Tensor, ""]:
    """Mean squared error of the masked patches, ``Σ m · mean_P (prediction − target)² / Σ m``.

    Args:
        prediction: ``[batch, patches, values]``.
        target_patches: the same shape, as `patchify` gives it; detached.
        mask: ``[batch, patches]``, True or 1 where a patch is masked and counts.
        norm_pix: shift and scale each target patch to mean 0 and (unbiased) variance 1 first. A constant patch becomes
            0.
        eps: added to that variance.

    Returns:
        A scalar, at least float32; where nothing is masked 0 with a zero gradient.

    Raises:
        ValueError: shapes do not agree, or ``norm_pix`` with patches of a single value.

    Source: He et al., "Masked Autoencoders Are Scalable Vision Learners" (arXiv 2111.06377), section 3.
    """
    check_same_shape(prediction=prediction, target_patches=target_patches)
    if prediction.dim() != 3 or mask.shape != prediction.shape[:2]:
        raise ValueError(
            "prediction is [batch, patches, values] and mask [batch, patches]; got "
            f"{list(prediction.shape)} and {list(mask.shape)}"
        )
    if prediction.shape[2] == 0:
        raise ValueError("patches have no values")
    target = upcast(target_patches.detach())
    if norm_pix:
        target = _normalised(target, eps)
    errors = F.mse_loss(upcast(prediction), target, reduction="none").mean(2)
    weight = mask.to(errors.dtype)
    total = weight.sum()
    return torch.where(weight != 0, errors * weight, 0.0).sum() / torch.where(total == 0, 1.0, total)


def _normalised(
    patches: Float[Tensor, "batch patches values"], eps: float
) -> Float[Tensor, "batch patches values"]:
    if patches.shape[2] == 1:
        raise ValueError("norm_pix needs patches of at least 2 values: one value has no unbiased variance")
    variance, mean = torch.var_mean(patches, dim=2, keepdim=True)
    return (patches - mean) * (variance + eps).rsqrt()


def dmae_align_loss(
    student_features: Float[Tensor, "*student_shape"],
    teacher_features: Float[Tensor, "*teacher_shape"],
    *,
    weight: Float[Tensor, "out width"] | None = None,
    bias: Float[Tensor, " out"] | None = None,
    normalize: bool = True,
    kind: Literal["l1", "l2"] = "l1",
) -> Float[Tensor, ""]:
    """Mean distance of the student's projected tokens and the teacher's, over batch, tokens and features.

    Args:
        student_features: ``[batch, tokens, student width]``, before the final norm.
        teacher_features: ``[batch, tokens, teacher width]``; detached.
        weight, bias: of the linear head, ``[teacher width, student width]`` and ``[teacher width]``; None: the features
            are projected already.
        normalize: scale each token of both sides to length 1 first; one that is zero stays zero.
        kind: ``l1`` (absolute) or ``l2`` (squared) differences.

    Returns:
        A scalar, at least float32; without entries 0 with a zero gradient. Of unit vectors it is of order
        ``1/√(teacher width)`` (l1), so its size says nothing beside another loss.

    Raises:
        ValueError: features that are not paired token by token, widths that do not fit, a bias without weight, or an
            unknown kind.

    Source: Bai et al., "Masked Autoencoders Enable Efficient Knowledge Distillers" (arXiv 2208.12256), section 3.
    """
    if kind not in ("l1", "l2"):
        raise ValueError(f"kind must be 'l1' or 'l2'; got {kind!r}")
    _check_paired(student_features, teacher_features)
    student, teacher = upcast(student_features), upcast(teacher_features.detach())
    if weight is not None:
        student = _projected(student, weight, bias)
    elif bias is not None:
        raise ValueError("a bias is given without a weight; give both of the head, or neither")
    if student.shape != teacher.shape:
        raise ValueError(
            f"the student's features have width {student.shape[2]}, the teacher's {teacher.shape[2]}; "
            "give the weight of a head that maps one to the other"
        )
    if normalize:
        student, _ = _Unit.apply(student)
        teacher = F.normalize(teacher, dim=2, eps=_LEAST)
    if kind == "l2":
        return mean_squared(student, teacher)
    return F.l1_loss(student, teacher, reduction="sum") / max(student.numel(), 1)


class _Unit(torch.autograd.Function):
    """Tokens ``[..., width]`` divided by their length, but at least by `_LEAST`; shorter ones have no gradient, which
    would be its inverse. Keeps the result alone for the backward. Second output: the slope, ``[..., 1]``."""

    @staticmethod
    def forward(tokens: Tensor) -> tuple[Tensor, Tensor]:
        lengths = torch.linalg.vector_norm(tokens, dim=-1, keepdim=True)
        scale = lengths.clamp(min=_LEAST).reciprocal()
        return tokens * scale, torch.where(lengths > _LEAST, scale, 0.0)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: tuple[Tensor, Tensor]) -> None:
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(*output)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor, _: Tensor) -> Tensor:
        unit, slope = ctx.saved_tensors
        along = torch.linalg.vecdot(unit, upstream).unsqueeze(-1)
        return torch.addcmul(upstream, unit, along, value=-1).mul_(slope)


def _check_paired(student: Float[Tensor, "*student_shape"], teacher: Float[Tensor, "*teacher_shape"]) -> None:
    if student.dim() != 3 or teacher.dim() != 3 or student.shape[:2] != teacher.shape[:2]:
        raise ValueError(
            "features are [batch, tokens, width] with the same tokens on both sides; got student_features "
            f"{list(student.shape)}, teacher_features {list(teacher.shape)}"
        )


def _projected(
    student: Float[Tensor, "batch tokens wide"],
    weight: Float[Tensor, "out width"],
    bias: Float[Tensor, " out"] | None,
) -> Float[Tensor, "batch tokens out"]:
    if weight.shape[1] != student.shape[2]:
        raise ValueError(
            f"the head's weight [{weight.shape[0]}, {weight.shape[1]}] takes features of width {weight.shape[1]}; "
            f"the student's have {student.shape[2]}"
        )
    with without_autocast(student):
        return F.linear(student, weight.to(student), None if bias is None else bias.to(student))


def dmae_loss(
    reconstruction: Float[Tensor, ""],
    alignments: Sequence[Float[Tensor, ""]],
    *,
    beta: float | int = 1.0,
) -> DMAELoss:
    """Reconstruction plus ``beta`` times the sum of the aligned blocks' losses; without those, reconstruction alone.

    Raises:
        ValueError: ``beta`` is negative or not finite.
    """
    if not (math.isfinite(beta) and beta >= 0):
        raise ValueError(f"beta must be finite and at least 0; got {beta}")
    if not alignments:
        return DMAELoss(reconstruction, reconstruction, torch.zeros_like(reconstruction))
    alignment = sum(alignments[1:], start=alignments[0])
    return DMAELoss(reconstruction + beta * alignment, reconstruction, alignment)
