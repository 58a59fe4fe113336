"""A sharded model as a plain one again: what ships, what is measured on one rank."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Generic, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from tutelage.engine.distributed import whole

M = TypeVar("M", bound=nn.Module)
Make = Callable[[str, Tensor], Tensor]


class Blueprint(Generic[M]):
    """A model's structure without its weights, taken before they are sharded.

    Args:
        module: not sharded yet. What is copied are modules and buffers; parameters take no memory.
    """

    def __init__(self, module: M) -> None:
        self.module = _copied(
            module, lambda name, tensor: torch.empty_like(tensor, device="meta"), lambda name, tensor: tensor
        )

    def filled(self, sharded: M) -> M:
        """A plain copy of the model as it is now, on its device; buffers are rank 0's. A collective call."""
        state = (
            sharded.state_dict()
        )  # not named_parameters: the state's hooks end a forward that left weights gathered
        buffers = dict(sharded.named_buffers(remove_duplicate=False))
        model = _copied(
            self.module,
            lambda name, tensor: whole(state[name]).detach().clone(),
            lambda name, tensor: _of_first(buffers[name]),
        )
        extra = {name: value for name, value in state.items() if not isinstance(value, Tensor)}
        model.load_state_dict(extra, strict=False)
        return model.train(sharded.training)


def _of_first(tensor: Tensor) -> Tensor:
    tensor = tensor.detach().clone()
    dist.broadcast(tensor, src=0)  # running statistics differ between ranks, of which rank 0's are saved
    return tensor


def _copied(module: M, parameter: Make, buffer: Make) -> M:
    """A deep copy with other tensors; what was tied stays tied."""
    memo: dict[int, object] = {
        id(old): nn.Parameter(parameter(name, old), requires_grad=old.requires_grad)
        for name, old in module.named_parameters()
    }
    memo |= {id(old): buffer(name, old).clone() for name, old in module.named_buffers()}
    return copy.deepcopy(module, memo)
