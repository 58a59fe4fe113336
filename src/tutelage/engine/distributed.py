"""What several ranks share: the DDP wrap, FSDP2, gradients and statistics over ranks."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
import torch.distributed.nn.functional as dist_functional
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel

if TYPE_CHECKING:
    from tutelage.engine.step import TrainStep


def world_size() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def gather_rows(tensor: Tensor) -> Tensor:
    """Rows of all ranks along the first axis, in rank order; gradients flow back to each rank's own rows.

    Every rank must bring the same shape.
    """
    if world_size() == 1:
        return tensor
    return torch.cat(list(dist_functional.all_gather(tensor.contiguous())))


def mean_over_ranks(tensor: Tensor) -> Tensor:
    """Mean over ranks, differentiable."""
    if world_size() == 1:
        return tensor
    total: Tensor = dist_functional.all_reduce(tensor.clone())
    return total / world_size()


def whole(tensor: Tensor) -> Tensor:
    """The full tensor of a sharded one; any other as it is. A collective call."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


class AllRanksBatchNorm(_BatchNorm):
    """BatchNorm whose statistics are taken over the rows of all ranks by a differentiable all-reduce.

    torch's SyncBatchNorm refuses CPU. Ranks may bring different numbers of rows.
    """

    def _check_input_dim(self, input: Tensor) -> None:  # noqa: A002 (torch's own name)
        if input.dim() < 2:
            raise ValueError(f"BatchNorm wants [rows, channels, ...]; got shape {tuple(input.shape)}")

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 (torch's own name)
        self._check_input_dim(input)
        if not (self.training or self.running_mean is None) or world_size() == 1:
            return super().forward(input)
        axes = [axis for axis in range(input.dim()) if axis != 1]
        values = input.float()
        count = torch.full((1,), values.numel() / values.shape[1], device=input.device)
        sums = torch.cat([values.sum(axes), count])
        total: Tensor = dist_functional.all_reduce(sums)
        count = total[-1].detach()
        mean = total[:-1] / count
        shape = [1, -1] + [1] * (input.dim() - 2)
        # The second pass over centred values keeps the precision that a sum of squares would lose.
        squares: Tensor = dist_functional.all_reduce((values - mean.view(shape)).square().sum(axes))
        variance = squares / count
        self._track(mean.detach(), variance.detach(), count)
        output = (values - mean.view(shape)) * torch.rsqrt(variance + self.eps).view(shape)
        if self.affine:
            output = output * self.weight.view(shape) + self.bias.view(shape)
        return output.to(input.dtype)

    @torch.no_grad()
    def _track(self, mean: Tensor, variance: Tensor, count: Tensor) -> None:
        if self.running_mean is None or self.running_var is None or self.num_batches_tracked is None:
            return
        self.num_batches_tracked.add_(1)
        momentum = self.momentum if self.momentum is not None else 1.0 / float(self.num_batches_tracked)
        self.running_mean.lerp_(mean, momentum)
        self.running_var.lerp_(variance * (count / (count - 1).clamp(min=1)), momentum)


def over_all_ranks(module: nn.Module) -> None:
    """Turn every BatchNorm inside ``module`` into one that sees all ranks; parameters and buffers stay the same."""
    for name, child in module.named_children():
        if isinstance(child, _BatchNorm) and not isinstance(child, AllRanksBatchNorm):
            child.__class__ = AllRanksBatchNorm
        else:
            over_all_ranks(child)
        assert getattr(module, name) is child


def replicate(module: TrainStep, *, find_unused: bool) -> DistributedDataParallel:
    """The DDP wrap. ``broadcast_buffers=False``: it would overwrite memory banks; never a static graph, since which
    parameters are used may change."""
    device = next(module.parameters()).device
    ids: list[Any] | None = [device] if device.type != "cpu" else None
    with warnings.catch_warnings():
        # What torch offers instead of `broadcast_buffers` still overwrites buffers at the start.
        warnings.filterwarnings("ignore", message="`broadcast_buffers`", category=FutureWarning)
        return DistributedDataParallel(
            module, device_ids=ids, find_unused_parameters=find_unused, broadcast_buffers=False
        )


def shard(module: nn.Module, blocks: Iterable[nn.Module] = ()) -> None:
    """Shard a module's parameters over all ranks with torch's ``fully_shard``: each block is a unit, the module itself
    the root. After it every parameter is a ``DTensor``. A module without parameters stays as it is."""
    from torch.distributed.fsdp import fully_shard

    for block in blocks:
        if next(block.parameters(), None) is not None:
            fully_shard(block)
    if next(module.parameters(), None) is not None:
        fully_shard(module)


def average_gradients(gradients: list[Tensor | None]) -> None:
    """Replace every plain gradient by its mean over ranks, in place, in one exchange a dtype. DTensors are averaged
    already."""
    world = world_size()
    plain = [g for g in gradients if g is not None and not isinstance(g, DTensor)]
    if world == 1 or not plain:
        return
    for dtype in {g.dtype for g in plain}:
        group = [g for g in plain if g.dtype == dtype]
        flat = torch.cat([g.reshape(-1) for g in group])
        dist.all_reduce(flat)
        flat /= world
        for gradient, part in zip(group, flat.split([g.numel() for g in group]), strict=True):
            gradient.copy_(part.view_as(gradient))
