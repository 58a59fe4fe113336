"""Heads whose rows stay where FSDP2 put them, and what a loss over all ranks' tokens needs.

Every rank evaluates the loss L of all ranks' tokens with its own rows of the heads, and the trainer weighs it by that
rank's share s_r of the step's items, with Σ s_r = ranks (`tutelage.engine.gathering`). A rank's rows of the head belong
to it alone: no mean over ranks follows, and they must get what the whole head would, (Σ s_r / ranks) ∂L/∂W. So the
gradient that comes in at L is averaged over ranks before anything else.
"""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.tensor import DTensor, Partial

from tutelage.engine.distributed import gather_rows, world_size
from tutelage.functional.heads import Head, Sampled, TopK


class SpreadHead(Head):
    """A head of which each rank holds some rows. ``weight`` and ``bias`` are the whole ones, gathered from all ranks
    each time they are read: a collective call. Fused losses read `rows` instead.

    Args:
        weight, bias: cut along their first axis, and spread over ranks.
        outputs: rows that are tokens; further ones are cut off.
    """

    _weight: DTensor
    _bias: DTensor | None
    _outputs: int

    def __init__(
        self, weight: DTensor, bias: DTensor | None, outputs: int, softcap: float | None, scale: float
    ) -> None:
        held = {"softcap": softcap, "scale": scale, "_weight": weight, "_bias": bias, "_outputs": outputs}
        for name, value in held.items():
            object.__setattr__(self, name, value)  # a head is frozen

    @property
    def weight(self) -> Tensor:
        return gathered(self._weight)[: self._outputs]

    @property
    def bias(self) -> Tensor | None:
        return None if self._bias is None else gathered(self._bias)[: self._outputs]

    @property
    def vocabulary(self) -> int:
        return self._outputs

    @property
    def group(self) -> ProcessGroup:
        """The processes that hold the rows, in their order."""
        return self._weight.device_mesh.get_group()

    @property
    def rows(self) -> Head:
        """This rank's rows; their gradient stays on this rank, as it comes."""
        held = self._held()
        bias = None if self._bias is None else on_mesh(self._bias).to_local()[:held]
        return Head(on_mesh(self._weight).to_local()[:held], bias, self.softcap, self.scale)

    def _held(self) -> int:
        return rows_of_rank(len(self._weight), self._outputs, world_size(), dist.get_rank())

    def whole(self) -> Head:
        return Head(self.weight, self.bias, self.softcap, self.scale)


def rows_of_rank(rows: int, outputs: int, ranks: int, rank: int) -> int:
    """How many of the first ``outputs`` of ``rows`` lie on a rank."""
    each = -(-rows // ranks)  # as torch cuts them
    return min(max(outputs - each * rank, 0), each)


def gathered(value: DTensor) -> Tensor:
    """The whole of a sharded parameter: the gradient of each rank's own rows is averaged, as that of every other
    parameter is. A collective call."""
    return on_mesh(value).full_tensor(grad_placements=[Partial("avg")] * value.device_mesh.ndim)


def on_mesh(value: DTensor) -> DTensor:
    """On the devices that ranks compute on, where shards are kept in CPU memory."""
    device = value.device_mesh.device_type
    return value if value.device.type == device else cast(DTensor, value.to(device))


class Exchange:
    """The tokens of all ranks that count, in rank order. Each rank brings as many as it has; room is made for the most.

    Args:
        counts: ``[...]`` bool, this rank's tokens that count.
    """

    def __init__(self, counts: Tensor) -> None:
        self.counts = counts
        sizes = gather_rows(counts.sum()[None])
        self.most = max(int(sizes.max()), 1)
        self.share = sizes[dist.get_rank()] / sizes.sum().clamp(min=1)
        """Of all tokens that count, this rank's."""
        self.mask = (torch.arange(self.most, device=counts.device) < sizes[:, None]).flatten()

    def __call__(self, values: Tensor) -> Tensor:
        """``[..., *]`` of this rank's tokens to ``[tokens of all ranks, *]``; zeros fill up. Differentiable: the
        gradient is the sum of what all ranks' losses give."""
        own = values[self.counts]
        return gather_rows(F.pad(own, (0, 0) * (own.dim() - 1) + (0, self.most - len(own))))

    def sparse(self, teacher: TopK | Sampled) -> TopK | Sampled:
        return type(teacher)(**{name: self(value) for name, value in vars(teacher).items()})


def mean_gradient(loss: Tensor) -> Tensor:
    """The loss itself; the gradient that comes in is averaged over ranks."""
    found: Tensor = _MeanGradient.apply(loss)
    return found


class _MeanGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, loss: Tensor) -> Tensor:
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        gradient = gradient.clone()
        dist.all_reduce(gradient)
        return gradient / world_size()
