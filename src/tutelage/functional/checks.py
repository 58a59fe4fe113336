"""What the losses refuse, in one wording. Nothing here waits for an accelerator."""

from __future__ import annotations

import math

from jaxtyping import Float
from torch import Tensor

__all__: list[str] = []


class TargetError(IndexError, ValueError):
    """A label that names no class: an index out of range, and a bad value."""


class SoftTargetError(TypeError, ValueError):
    """Distributions where class ids are needed: an argument of the wrong kind, and a bad value."""


def check_positive(name: str, value: float | int) -> None:
    """Raise ValueError unless ``value`` is finite and above 0."""
    if not (math.isfinite(value) and value > 0):
        raise ValueError(f"{name} must be finite and above 0; got {value}")


def check_share(name: str, value: float | int) -> None:
    """Raise ValueError unless ``value`` lies in [0, 1]."""
    if not 0 <= value <= 1:
        raise ValueError(f"{name} must lie in [0, 1]; got {value}")


def check_same_shape(**tensors: Tensor) -> None:
    """Raise ValueError unless all shapes agree."""
    if len({tensor.shape for tensor in tensors.values()}) > 1:
        shapes = ", ".join(f"{name} {list(tensor.shape)}" for name, tensor in tensors.items())
        raise ValueError(f"shapes must agree; got {shapes}")


def check_class_ids(target: Tensor, rows: int, classes: int) -> None:
    """Hold class ids against how many rows and classes there are. Values are checked on the CPU only, as in
    `check_target`.

    Raises:
        TargetError: an id lies outside ``[0, classes)``.
        ValueError: not one integer a row.
    """
    if target.dim() != 1 or len(target) != rows:
        raise ValueError(f"target must be class ids [{rows}]; got shape {list(target.shape)}")
    if target.is_floating_point():
        raise ValueError(f"class ids must be integers; got {target.dtype}")
    if target.device.type == "cpu" and rows:
        low, high = (int(value) for value in target.aminmax())
        if low < 0 or high >= classes:
            raise TargetError(
                f"target {low if low < 0 else high} names none of the {classes} classes 0 … {classes - 1}"
            )


def check_target(target: Tensor, logits: Float[Tensor, "batch classes"]) -> None:
    """Hold a target against the logits it belongs to: class ids ``[batch]``, or a distribution ``[batch, classes]``.

    Values of ids are checked on the CPU only: elsewhere that would wait for the device, whose own gather stops the run.

    Raises:
        TargetError: an id lies outside ``[0, classes)``.
        ValueError: shapes do not fit, or ids are no integers.
    """
    rows, classes = logits.shape
    if target.dim() == 2:
        if target.shape != logits.shape:
            raise ValueError(
                f"a soft target must have the logits' shape {[rows, classes]}; got {list(target.shape)}"
            )
        return
    if target.dim() != 1 or len(target) != rows:
        raise ValueError(
            f"target must be class ids [{rows}] or a distribution [{rows}, {classes}]; got shape {list(target.shape)}"
        )
    check_class_ids(target, rows, classes)
