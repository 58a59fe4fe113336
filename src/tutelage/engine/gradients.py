"""Norm and clipping of gradients, sharded ones too, without waiting for the device."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor


def grad_norm(parameters: Iterable[Tensor]) -> Tensor:
    """Euclidean norm of all gradients together, as a plain scalar on their device; 0 where there is none.

    Gradients of sharded parameters (DTensor) count whole: every rank of their mesh must call.
    """
    parameters = list(parameters)
    groups: dict[Any, list[Tensor]] = {}
    for parameter in parameters:
        if (grad := parameter.grad) is not None:
            groups.setdefault(_mesh(grad), []).append(grad)
    if not groups:
        return torch.zeros((), device=parameters[0].device if parameters else None)
    norms = [torch.nn.utils.get_total_norm(grads) for grads in groups.values()]
    whole = [norm.full_tensor() if isinstance(norm, DTensor) else norm for norm in norms]
    return whole[0] if len(whole) == 1 else torch.linalg.vector_norm(torch.stack(whole))


def clip_(parameters: Iterable[Tensor], max_norm: float, norm: Tensor) -> None:
    """Scale all gradients, in place, so that their norm is at most ``max_norm``.

    Args:
        max_norm: above 0.
        norm: `grad_norm` of the same parameters.
    """
    groups: dict[Any, list[Tensor]] = {}
    for parameter in parameters:
        if parameter.grad is not None:
            groups.setdefault(_mesh(parameter.grad), []).append(parameter)
    for group in groups.values():
        torch.nn.utils.clip_grads_with_norm_(group, max_norm, norm)


def _mesh(grad: Tensor) -> Any:
    return grad.device_mesh if isinstance(grad, DTensor) else None
