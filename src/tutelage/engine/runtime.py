"""`Runtime`: what a process runs on. Launch, device, precision and the exchange between ranks live here, once a
process; Trainers are handed it and keep all state of their own."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, Literal

import torch
import torch.distributed as dist
from accelerate import PartialState
from torch import Tensor

Precision = Literal["fp32", "bf16", "fp16"]
_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


class Runtime:
    """Device, precision and ranks.

    accelerate's ``PartialState`` finds the launch (``torchrun``, ``accelerate launch``, none) and the device. Its
    ``Accelerator`` is not used: it is a singleton with one precision, and many Trainers live in one process here.

    Args:
        device: ``auto`` or a device type. ``cpu`` and ``cuda`` are tested; ``mps`` and ``xpu`` take the same path,
            untested.
        precision: ``bf16`` and ``fp16`` run forwards under autocast; ``fp16`` scales the loss.
        sharding: how several ranks share a model: replicated (``ddp``) or ``fsdp`` (torch's ``fully_shard``).
    """

    def __init__(
        self, device: str = "auto", precision: Precision = "fp32", sharding: Literal["ddp", "fsdp"] = "ddp"
    ) -> None:
        self._launch = PartialState(cpu=device == "cpu" or None)
        self.device = self._launch.device if device in ("auto", "cpu") else torch.device(device)
        if device not in ("auto", "cpu") and not _available(device):
            raise ValueError(f"train.device is {device!r}, which this machine does not have; use auto or cpu")
        if device == "cpu":
            self.device = torch.device("cpu")
        self.precision = precision
        if precision == "fp16" and self.device.type == "cpu":
            raise ValueError("train.precision fp16 needs an accelerator; on cpu use bf16 or fp32")
        self.rank: int = self._launch.process_index
        self.world: int = self._launch.num_processes
        self.sharding: Literal["single", "ddp", "fsdp"] = "single" if self.world == 1 else sharding

    @property
    def is_main(self) -> bool:
        """Whether this rank writes."""
        return self.rank == 0

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        if self.precision == "fp32":
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, _DTYPES[self.precision])

    def scaler(self) -> torch.amp.GradScaler | None:
        return torch.amp.GradScaler(self.device.type) if self.precision == "fp16" else None

    def sum(self, tensor: Tensor) -> Tensor:
        """Sum over ranks, without gradients; the tensor itself where there is one rank."""
        if self.world > 1:
            tensor = tensor.detach().clone()
            dist.all_reduce(tensor)
        return tensor

    def broadcast_object(self, value: Any) -> Any:
        """Rank 0's value of a small plain object on every rank."""
        if self.world == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    def barrier(self) -> None:
        if self.world > 1:
            dist.barrier()

    @contextlib.contextmanager
    def main_first(self) -> Iterator[None]:
        """Rank 0 runs the block before the others do (downloads, caches)."""
        if not self.is_main:
            self.barrier()
        yield
        if self.is_main:
            self.barrier()

    def close(self) -> None:
        """Leave the process group, where this process is in one."""
        if dist.is_available() and dist.is_initialized():
            dist.destroy_process_group()
        PartialState._reset_state()


def _available(device: str) -> bool:
    module = getattr(torch, device, None)
    if device == "mps":
        return bool(torch.backends.mps.is_available())
    return module is not None and bool(module.is_available())
