"""How alike two representations of the same rows are."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from tutelage.functional.reductions import upcast

__all__ = ["linear_cka"]


def linear_cka(x: Float[Tensor, "rows left"], y: Float[Tensor, "rows right"]) -> Float[Tensor, ""]:
    """Linear centred kernel alignment, ``||Yc' Xc||² / (||Xc' Xc|| ||Yc' Yc||)`` in Frobenius norms.

    Columns are centred. It lies in [0, 1], is 1 where the features agree up to rotation, scale and shift, and does not
    depend on the order of rows. Few rows of many features make it high by chance.

    Args:
        x: ``[rows, features]``.
        y: ``[rows, features]`` of the same rows; the widths may differ.

    Returns:
        A scalar, at least float32; 0 where one side is the same for all rows. Differentiable.

    Raises:
        ValueError: other numbers of rows, or fewer than two.

    Source: Kornblith et al., "Similarity of Neural Network Representations Revisited" (arXiv 1905.00414), section 3.
    """
    if len(x) != len(y) or len(x) < 2:
        raise ValueError(f"CKA compares two or more rows seen by both sides; got {len(x)} and {len(y)} rows")
    x, y = _centred(x), _centred(y)
    # The same norms from the features' products or from the rows', whichever are the smaller matrices.
    if len(x) < max(x.shape[1], y.shape[1]):
        x, y = x @ x.T, y @ y.T
        cross, left, right = (x * y).sum(), x.norm(), y.norm()
    else:
        cross, left, right = (y.T @ x).square().sum(), (x.T @ x).norm(), (y.T @ y).norm()
    cka: Tensor = cross / (left * right).clamp_min(torch.finfo(cross.dtype).tiny)
    return cka


def _centred(features: Float[Tensor, "rows width"]) -> Float[Tensor, "rows width"]:
    """Each column's mean taken off, and the whole at norm 1, so that no size of values overflows."""
    features = upcast(features)
    centred = features - features.mean(0)
    largest = centred.detach().abs().amax().clamp_min(torch.finfo(centred.dtype).tiny)
    scaled = centred / largest
    norm: Tensor = scaled.detach().norm().clamp_min(torch.finfo(scaled.dtype).tiny)
    return scaled / norm
