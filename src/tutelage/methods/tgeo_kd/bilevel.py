"""The derivative of every row's loss along one direction of the parameters, without a gradient a row."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import Literal

import torch
import torch.autograd.forward_ad as forward_mode
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

Parameters = Mapping[str, Tensor]
RowLosses = Callable[[Parameters], Tensor]
"""Parameters by name in, losses ``[rows]`` out. It must draw the same random numbers at every call."""
Derivative = Literal["forward", "difference"]

STEP = 0.01
"""Length of the central difference's step, over all parameters together."""


def directional_derivative(
    losses: RowLosses, parameters: Parameters, direction: Parameters, how: Derivative
) -> Tensor:
    """``d losses(parameters + t · direction) / dt`` at 0, ``[rows]``.

    Args:
        how: ``forward``: one pass in forward mode, exact. ``difference``: two passes at a distance of 0.01 on both
            sides, for layers that have no forward-mode rule.

    Raises:
        NotImplementedError: a layer has no forward-mode rule.
    """
    if how == "difference":
        return _central_difference(losses, parameters, direction)
    # Only the plain form of attention has a forward-mode rule.
    with forward_mode.dual_level(), sdpa_kernel(SDPBackend.MATH), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*torch.jit.script", category=FutureWarning)  # torch's own
        duals = {
            name: forward_mode.make_dual(parameters[name].detach(), part)  # type: ignore[no-untyped-call]
            for name, part in direction.items()
        }
        value, tangent = forward_mode.unpack_dual(losses(duals))  # type: ignore[no-untyped-call]
        return torch.zeros_like(value) if tangent is None else tangent.detach()


@torch.no_grad()
def _central_difference(losses: RowLosses, parameters: Parameters, direction: Parameters) -> Tensor:
    lengths = torch.stack([part.norm() for part in direction.values()])
    step: Tensor = STEP / lengths.norm().clamp(min=1e-12)

    def moved(by: Tensor) -> Tensor:
        return losses({name: parameters[name] + by * part for name, part in direction.items()})

    return (moved(step) - moved(-step)) / (2 * step)
