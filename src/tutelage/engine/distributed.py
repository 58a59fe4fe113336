"""What several ranks share: the DDP wrap, FSDP2, gradients and statistics over ranks."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel

if TYPE_CHECKING:
    from tutelage.engine.step import TrainStep


def world_size() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def gather_rows(tensor: Tensor) -> Tensor:
    """Rows of all ranks along the first axis, in rank order. The gradient of a rank's own rows is the sum of what all
    ranks' losses give.

    Every rank must bring the same shape.
    """
    if world_size() == 1:
        return tensor
    rows: Tensor = _GatherRows.apply(tensor)
    return rows


def sum_over_ranks(tensor: Tensor) -> Tensor:
    """Sum over ranks; its gradient is the sum of what all ranks' losses give."""
    if world_size() == 1:
        return tensor
    total: Tensor = _Sum.apply(tensor)
    return total


def gather_uneven(tensor: Tensor) -> Tensor:
    """Rows of all ranks along the first axis, in rank order, where ranks may bring different numbers of them, or none.
    Without gradients."""
    if world_size() == 1:
        return tensor
    counts = gather_rows(torch.tensor([len(tensor)], device=tensor.device)).tolist()
    padded = tensor.new_zeros(max(counts), *tensor.shape[1:])
    padded[: len(tensor)] = tensor.detach()
    parts = gather_rows(padded).split(max(counts))
    return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])


def mean_over_ranks(tensor: Tensor) -> Tensor:
    """Mean over ranks, differentiable."""
    return sum_over_ranks(tensor) / world_size() if world_size() > 1 else tensor


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        rows = tensor.new_empty(world_size() * len(tensor), *tensor.shape[1:])
        dist.all_gather_into_tensor(rows, tensor.contiguous())
        return rows

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        own = gradient.new_empty(len(gradient) // world_size(), *gradient.shape[1:])
        dist.reduce_scatter_tensor(own, gradient.contiguous())
        return own


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        total = tensor.detach().clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return _Sum.forward(ctx, gradient)


def whole(tensor: Tensor) -> Tensor:
    """The full tensor of a sharded one; any other as it is. A collective call."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def is_sharded(module: nn.Module) -> bool:
    """Whether ranks share its parameters, so that only all of them together can run it."""
    return any(isinstance(parameter, DTensor) for parameter in module.parameters())


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
        values = input if input.dtype == torch.float64 else input.float()
        count = values.new_full((1,), values.numel() / values.shape[1])
        sums = torch.cat([values.sum(axes), count])
        total = sum_over_ranks(sums)
        count = total[-1].detach()
        mean = total[:-1] / count
        shape = [1, -1] + [1] * (input.dim() - 2)
        # The second pass over centred values keeps the precision that a sum of squares would lose.
        squares = sum_over_ranks((values - mean.view(shape)).square().sum(axes))
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


def check_batch_norm(rows: int, who: str) -> None:
    """Refuse a micro-batch from which BatchNorm, in training, can take no statistics.

    Raises:
        ValueError: it holds one row, on one rank.
    """
    if rows * world_size() < 2:
        raise ValueError(
            f"{who} has a BatchNorm, which learns nothing from one row, and a micro-batch holds one; raise "
            "train.batch_size or lower train.accumulate"
        )


def over_all_ranks(module: nn.Module) -> None:
    """Turn every BatchNorm inside ``module`` into one that sees all ranks; parameters and buffers stay the same. Where
    a method's objective gets the rows of all ranks, it sees them already."""
    if getattr(module, "sees_all_ranks", False):
        return
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


def shard(
    module: nn.Module,
    blocks: Iterable[nn.Module] = (),
    *,
    keep_root: bool = True,
    dtype: torch.dtype | None = None,
    offload: bool = False,
) -> None:
    """Shard a module's parameters over all ranks with torch's ``fully_shard``: each block is a unit, the module itself
    the root. After it every parameter is a ``DTensor``. A module without parameters stays as it is.

    Args:
        keep_root: keep what lies in no block whole from a forward to its backward, which then need not gather it anew;
            False for a module that has no backward.
        dtype: in which blocks are gathered; none: as they are. Autocast would keep a rounded copy of every block until
            the backward pass.
        offload: shards lie in CPU memory, and come to the device as they are gathered.
    """
    from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy, fully_shard

    where: OffloadPolicy = OffloadPolicy()
    if offload:
        where = CPUOffloadPolicy(pin_memory=torch.accelerator.is_available())
    rounded = MixedPrecisionPolicy(dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for block in blocks:
        if next(block.parameters(), None) is not None:
            fully_shard(block, mp_policy=rounded if dtype else MixedPrecisionPolicy(), offload_policy=where)
    if next(module.parameters(), None) is not None:
        fully_shard(module, reshard_after_forward=None if keep_root else True, offload_policy=where)


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
