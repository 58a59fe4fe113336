"""How losses are reduced: in float32 or better, over the rows that count; where none do, to a 0 with a gradient."""

from __future__ import annotations

import contextlib

import torch
import torch.nn.functional as F
from jaxtyping import Float, Shaped
from torch import Tensor

from tutelage.functional.checks import check_same_shape

__all__: list[str] = []


def upcast(tensor: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """float16 and bfloat16 as float32; float32 and float64 as they are."""
    return tensor if tensor.dtype in (torch.float32, torch.float64) else tensor.float()


def without_autocast(tensor: Float[Tensor, "*shape"]) -> contextlib.AbstractContextManager[None]:
    """A block in which products of tensors on this device keep their precision; free where autocast is off."""
    device = tensor.device.type
    if torch.is_autocast_enabled(device):
        context: contextlib.AbstractContextManager[None] = torch.autocast(device, enabled=False)
        return context
    return contextlib.nullcontext()


def masked_mean(
    values: Float[Tensor, "*rows"], mask: Shaped[Tensor, "*rows"] | None = None
) -> Float[Tensor, ""]:
    """Mean of the values whose mask is not zero; without a mask, of all.

    Where nothing counts it is 0 and has a (zero) gradient, so that every rank of a launch can go backward.

    Raises:
        ValueError: ``mask`` has another shape than ``values``.
    """
    if mask is None:
        return values.sum() / max(values.numel(), 1)
    check_same_shape(values=values, mask=mask)
    counted = mask != 0
    return torch.where(counted, values, 0.0).sum() / counted.sum().clamp(min=1)


def mean_squared(student: Float[Tensor, "*shape"], teacher: Float[Tensor, "*shape"]) -> Float[Tensor, ""]:
    """Mean squared difference over all entries; without entries 0 with a zero gradient."""
    return F.mse_loss(student, teacher, reduction="sum") / max(student.numel(), 1)


def keep_rows(mask: Shaped[Tensor, " batch"] | None, *tensors: Tensor) -> tuple[Tensor, ...]:
    """Each tensor's rows whose mask is not zero; without a mask, the tensors themselves.

    Raises:
        ValueError: ``mask`` is not one value a row.
    """
    if mask is None:
        return tensors
    if any(mask.shape != tensor.shape[:1] for tensor in tensors):
        shapes = ", ".join(str(list(tensor.shape)) for tensor in tensors)
        raise ValueError(f"mask must hold one value a row; got shape {list(mask.shape)} for tensors {shapes}")
    rows = mask != 0
    return tuple(tensor[rows] for tensor in tensors)
