"""Rows mixed with other rows of their batch."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, Integer
from torch import Tensor

from tutelage.functional.checks import check_target

__all__ = ["mixup"]

_TOLERANCE = 1e-4
"""How far a distribution's sum may be from 1."""


def mixup(
    inputs: Float[Tensor, batch * shape],
    target: Tensor,
    permutation: Integer[Tensor, " partners"],
    weight: Any,
    *,
    base: Integer[Tensor, " bases"] | None = None,
    num_classes: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Rows and their targets mixed with partners, ``weight · x[base] + (1 - weight) · x[permutation]``.

    Args:
        inputs: ``[batch, ...]``, floating point: integers would be cut off.
        target: class ids ``[batch]``, which become one-hot, or distributions ``[batch, classes]``.
        permutation: positions of the partners, ``[batch]``.
        weight: share of the first row in [0, 1]: a number, ``[batch]`` or ``[batch, 1]``; cast to the inputs' dtype.
        base: positions of the first rows, ``[batch]``; left out: every row in its place.
        num_classes: needed for class ids.

    Returns:
        The mixed inputs in their own dtype, and distributions ``[batch, classes]``, at least float32.

    Raises:
        ValueError: integer inputs, a target or an index that does not fit, or (looked at on the CPU only) a weight
            outside [0, 1] or a distribution that does not sum to 1.

    Source: Zhang et al., "mixup: Beyond Empirical Risk Minimization" (arXiv 1710.09412), equation 1.
    """
    if not inputs.is_floating_point():
        raise ValueError(
            f"inputs to mix must be floating point; got {inputs.dtype}: divide images by 255 first"
        )
    rows = len(inputs)
    distributions = _distributions(target, rows, num_classes)
    for name, index in (("permutation", permutation), ("base", base)):
        if index is not None and index.shape != (rows,):
            raise ValueError(f"{name} must hold one position a row, [{rows}]; got shape {list(index.shape)}")
    share = _by_row(weight, inputs)
    first, labels = (inputs, distributions) if base is None else (inputs[base], distributions[base])
    mixed = torch.lerp(inputs[permutation], first, share.view(-1, *[1] * (inputs.dim() - 1)))
    return mixed, torch.lerp(distributions[permutation], labels, share[:, None].to(labels.dtype))


def _distributions(target: Tensor, rows: int, num_classes: int | None) -> Tensor:
    if target.dim() == 2 and len(target) == rows:
        wide = target if target.dtype == torch.float64 else target.float()
        if target.device.type == "cpu" and bool(((wide.sum(1) - 1).abs() > _TOLERANCE).any()):
            raise ValueError("a target that is a distribution sums to 1 in every row")
        return wide
    if num_classes is None:
        raise ValueError(
            f"targets to mix are class ids [{rows}] with num_classes, or distributions [{rows}, classes]; got shape "
            f"{list(target.shape)} and no num_classes"
        )
    check_target(target, target.new_empty(rows, num_classes, dtype=torch.float32))
    empty = torch.zeros(
        rows, num_classes, device=target.device
    )  # one_hot would look at the ids, and wait for them
    return empty.scatter_(1, target.long()[:, None], 1.0)


def _by_row(weight: Any, inputs: Tensor) -> Tensor:
    """``[batch]`` in the inputs' dtype."""
    share = torch.as_tensor(weight, device=inputs.device)
    if share.device.type == "cpu" and not bool(((share >= 0) & (share <= 1)).all()):
        raise ValueError("a mixing weight lies in [0, 1]")
    share = share.to(inputs.dtype)
    if share.dim() == 0:
        return share.expand(len(inputs))
    if share.shape not in ((len(inputs),), (len(inputs), 1)):
        raise ValueError(
            f"weight must be a number, [{len(inputs)}] or [{len(inputs)}, 1]; got shape {list(share.shape)}"
        )
    return share.flatten()
