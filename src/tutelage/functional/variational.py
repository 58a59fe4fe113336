"""VID: the likelihood of a teacher's feature under a Gaussian whose mean the student's feature gives."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from tutelage.functional.checks import check_positive, check_same_shape
from tutelage.functional.maps import as_map, pooled_alike
from tutelage.functional.reductions import upcast

__all__ = ["vid_linear_loss", "vid_loss"]


def vid_loss(
    predicted_mean: Float[Tensor, "batch channels *grid"],
    teacher_features: Float[Tensor, "batch channels *grid"],
    log_scale: Float[Tensor, " channels"],
    eps: float = 1e-5,
) -> Float[Tensor, ""]:
    """Negative log-likelihood of the teacher's feature, ``mean of ½ ((mean − teacher)² / var + log var)``.

    ``var = softplus(log_scale) + eps``, one a channel; the constant ``½ log 2π`` is left out, so the loss may be below
    0.

    Args:
        predicted_mean: ``[batch, channels, height, width]``, or without or with more axes of positions.
        teacher_features: the same shape; detached.
        log_scale: ``[channels]``; learned with the rest.
        eps: least variance; above 0.

    Returns:
        A scalar, the mean over all entries, at least float32; without entries 0 with a zero gradient.

    Raises:
        ValueError: shapes do not agree, or eps is not above 0.

    Source: Ahn et al., "Variational Information Distillation for Knowledge Transfer" (arXiv 1904.05835), equation 6.
    """
    check_positive("eps", eps)
    check_same_shape(predicted_mean=predicted_mean, teacher_features=teacher_features)
    if log_scale.shape != predicted_mean.shape[1:2]:
        raise ValueError(
            f"log_scale must hold one value a channel, [{predicted_mean.shape[1]}]; got {list(log_scale.shape)}"
        )
    error = upcast(predicted_mean) - upcast(teacher_features.detach())
    # Summed by channel before the division, so that no tensor of the features' size holds a variance.
    squared = error.square().sum([axis for axis in range(error.dim()) if axis != 1])
    entries = error.numel()
    variance = F.softplus(upcast(log_scale)) + eps
    total = squared / variance + variance.log() * (entries // max(len(variance), 1))
    return 0.5 * total.sum() / max(entries, 1)


def vid_linear_loss(
    student_features: Float[Tensor, "batch student_channels *student_grid"],
    teacher_features: Float[Tensor, "batch teacher_channels *teacher_grid"],
    weights: Sequence[Tensor],
    log_scale: Float[Tensor, " teacher_channels"],
    eps: float = 1e-5,
) -> Float[Tensor, ""]:
    """`vid_loss` of the mean that 1 × 1 convolutions without bias, ReLU between them, make of the student's map.

    The larger map is average-pooled to the smaller one first.

    Args:
        student_features: ``[batch, channels, height, width]``, or ``[batch, channels]``.
        teacher_features: likewise, of other channels and size; detached.
        weights: matrices ``[out, in]`` (three in the paper's code), from the student's channels to the teacher's.
        log_scale, eps: of `vid_loss`.

    Raises:
        ValueError: as `vid_loss`; a feature is neither a map nor a vector; no weights.
    """
    if not weights:
        raise ValueError("vid_linear_loss needs at least one weight matrix; got none")
    mean, teacher = pooled_alike(as_map(student_features), as_map(teacher_features.detach()))
    with torch.autocast(mean.device.type, enabled=False):
        mean = upcast(mean)
        for number, weight in enumerate(weights):
            mean = F.conv2d(mean.relu() if number else mean, upcast(weight)[:, :, None, None])
    return vid_loss(mean, teacher, log_scale, eps)
