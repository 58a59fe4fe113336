"""How far a classifier's confidence is from how often it is right."""

from __future__ import annotations

import torch
from jaxtyping import Float, Integer, Shaped
from torch import Tensor

from tutelage.functional.checks import check_class_ids

__all__ = ["expected_calibration_error"]

BINS = 15
_TOLERANCE = 1e-3
"""How far above 1 a probability may be: half precision rounds."""


def expected_calibration_error(
    probabilities: Float[Tensor, "rows classes"], target: Integer[Tensor, " rows"], bins: int = BINS
) -> Float[Tensor, ""]:
    """Expected calibration error of the most probable class, ``Σ_b n_b / n |accuracy_b − confidence_b|``.

    Rows are sorted by their largest probability into bins of equal width ``(lo, hi]`` of [0, 1]; an empty bin counts 0.
    Collect all rows first: a mean over batches is another figure.

    Args:
        probabilities: ``[rows, classes]``, in [0, 1]; detached.
        target: class ids ``[rows]``.
        bins: how many, at least 1.

    Returns:
        A scalar in [0, 1], at least float32; 0 without rows.

    Raises:
        ValueError: fewer than one bin, shapes or ids that do not fit, or values that are no probabilities (values are
            checked on the CPU only).

    Source: Guo et al., "On Calibration of Modern Neural Networks" (arXiv 1706.04599), section 2.
    """
    if probabilities.dim() != 2 or not probabilities.shape[1]:
        raise ValueError(f"probabilities must be [rows, classes]; got shape {list(probabilities.shape)}")
    check_class_ids(target, *probabilities.shape)
    confidence, predicted = probabilities.detach().max(1)
    if confidence.device.type == "cpu" and len(confidence):
        low, high = float(probabilities.min()), float(confidence.max())
        if not (low >= 0 and high <= 1 + _TOLERANCE):
            raise ValueError(
                f"probabilities must lie in [0, 1]; got {low:g} to {high:g}: take the softmax of logits first"
            )
    return calibration_error(confidence.clamp(max=1.0), predicted == target, bins)


def confidence_bins(confidence: Float[Tensor, " rows"], bins: int = BINS) -> Integer[Tensor, " rows"]:
    """The bin ``(lo, hi]`` of equal width, from 0, that each confidence lies in; 0 itself is in the first."""
    # Edges in the confidence's own precision, so that one that was rounded to an edge lies on it.
    edges = torch.arange(1, bins, dtype=confidence.dtype, device=confidence.device) / bins
    return torch.bucketize(confidence, edges)


def calibration_error(
    confidence: Float[Tensor, " rows"], right: Shaped[Tensor, " rows"], bins: int = BINS
) -> Float[Tensor, ""]:
    """`expected_calibration_error` from each row's confidence, in [0, 1], and whether it is right.

    Raises:
        ValueError: fewer than one bin.
    """
    if bins < 1:
        raise ValueError(f"bins must be at least 1; got {bins}")
    wide = confidence.double()
    # What a bin's confidences and hits sum to differs by n_b (accuracy − confidence).
    gaps = wide.new_zeros(bins).index_add(0, confidence_bins(confidence, bins), right.double() - wide)
    error = gaps.abs().sum() / max(len(confidence), 1)
    return error if confidence.dtype == torch.float64 else error.float()
