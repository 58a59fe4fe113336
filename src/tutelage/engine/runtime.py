"""`Runtime`: what a process runs on. Launch, device, precision and the exchange between ranks live here, once a
process; Trainers are handed it and keep all state of their own."""

from __future__ import annotations

import contextlib
import signal
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any, Literal, TypeVar

import torch
import torch.distributed as dist
from accelerate import PartialState
from torch import Tensor

from tutelage.recipe.schema import TrainConfig

T = TypeVar("T")
Precision = Literal["fp32", "bf16", "fp16"]
_SIGN_OF_LIFE_SECONDS = 2.0
_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


class RankError(RuntimeError):
    """Rank 0 failed at what the other ranks waited for; its own error says why."""


class SilentRankError(RuntimeError):
    """Ranks that this one waited for gave no answer: they were killed, or hang."""


class Runtime:
    """Device, precision and ranks.

    accelerate's ``PartialState`` finds the launch (``torchrun``, ``accelerate launch``, none) and the device. Its
    ``Accelerator`` is not used: it is a singleton with one precision, and many Trainers live in one process here.

    Args:
        device: ``auto`` or a device type. ``cpu`` and ``cuda`` are tested; ``mps`` and ``xpu`` take the same path,
            untested.
        precision: ``bf16`` and ``fp16`` run forwards under autocast; ``fp16`` scales the loss.
        sharding: how several ranks share a model: replicated (``ddp``) or ``fsdp`` (torch's ``fully_shard``).
        timeout: minutes that a rank waits for another. It holds from the first Runtime of a process on.
    """

    def __init__(
        self,
        device: str = "auto",
        precision: Precision = "fp32",
        sharding: Literal["ddp", "fsdp"] = "ddp",
        timeout: float = 30.0,
    ) -> None:
        self._launch = PartialState(cpu=device == "cpu" or None, timeout=timedelta(minutes=timeout))
        self.timeout = timeout
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

    @classmethod
    def of(cls, config: TrainConfig) -> Runtime:
        """As a recipe's ``train`` part says. Warns where there is nobody to share with."""
        runtime = cls(config.device, config.precision, config.sharding, config.timeout)
        if config.sharding == "fsdp" and runtime.world == 1:
            warnings.warn(
                "train.sharding is fsdp, and there is one process: nothing is shared out; "
                "`torchrun --nproc-per-node N -m tutelage …` starts several",
                stacklevel=2,
            )
        return runtime

    @property
    def is_main(self) -> bool:
        """Whether this rank writes."""
        return self.rank == 0

    def shares_teachers(self, config: TrainConfig) -> bool:
        """Whether ranks share a frozen teacher's weights."""
        as_student = self.sharding == "fsdp"
        return as_student if self.world == 1 or config.shard_teacher is None else config.shard_teacher

    @property
    def half(self) -> torch.dtype | None:
        """The number format of products in half precision; none where they are as models are."""
        return _DTYPES.get(self.precision)

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

    def mean(self, values: dict[str, Tensor]) -> dict[str, Tensor]:
        """Means over ranks of scalars by name, without gradients."""
        if self.world == 1 or not values:
            return values
        total = self.sum(torch.stack([value.double() for value in values.values()]))
        return dict(zip(values, (total / self.world).unbind(), strict=True))

    def gather_objects(self, value: Any) -> list[Any]:
        """Every rank's value of a small plain object, in rank order, on every rank."""
        if self.world == 1:
            return [value]
        found = [None] * self.world
        dist.all_gather_object(found, value)
        return found

    def broadcast_object(self, value: Any) -> Any:
        """Rank 0's value of a small plain object on every rank."""
        if self.world == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    def on_main(self, make: Callable[[], T]) -> T:
        """What ``make`` gives on rank 0, a small plain object, on every rank.

        Raises:
            RankError: on the other ranks, where ``make`` raises on rank 0; so none of them is left waiting.
        """
        if self.world == 1:
            return make()
        if not self.is_main:
            value, failure = self.broadcast_object(None)
            if failure is not None:
                raise RankError(failure)
            return value  # type: ignore[no-any-return]
        try:
            value = make()
        except Exception as error:
            self.broadcast_object((None, f"{type(error).__name__} on rank 0: {error}"))
            raise
        self.broadcast_object((value, None))
        return value

    def barrier(self) -> None:
        if self.world > 1:
            dist.barrier()

    @contextlib.contextmanager
    def main_first(self) -> Iterator[None]:
        """Rank 0 runs the block before the others do (downloads, caches); where it fails there, they try too."""
        if not self.is_main:
            self.barrier()
        try:
            yield
        finally:
            if self.is_main:
                self.barrier()

    @contextlib.contextmanager
    def naming_the_silent(self) -> Iterator[None]:
        """Around all that ranks do together: an exchange that fails since a rank is gone or hangs becomes an error that
        names it.

        Raises:
            SilentRankError: in place of the error of the exchange.
        """
        try:
            yield
        except RuntimeError as error:
            if self.world == 1 or not _is_failed_exchange(error):
                raise
            if threading.current_thread() is threading.main_thread():
                # A launcher that saw the other end sends this one SIGTERM. It ends anyway, and has to say why.
                signal.signal(signal.SIGTERM, signal.SIG_IGN)
            raise SilentRankError(self._silence(error)) from error

    def _silence(self, error: RuntimeError) -> str:
        silent = silent_ranks(self.rank, self.world)
        late = "timed out" in str(error).lower()
        how = (
            f"no answer within {self.timeout:g} minutes (train.timeout)"
            if late
            else "the connection is closed"
        )
        if not silent:
            return f"an exchange between ranks failed, though all of them are there: {error}"
        who = f"rank {silent[0]}" if len(silent) == 1 else f"ranks {', '.join(map(str, silent))}"
        return (
            f"{who} of {self.world} went silent: {how}. It was killed or hangs; its own output and the system's log "
            "say more (memory that ran out is common). `tutelage resume`, under the same launcher, goes on from the "
            "last checkpoint"
        )

    def close(self) -> None:
        """Leave the process group, where this process is in one."""
        if dist.is_available() and dist.is_initialized():
            dist.destroy_process_group()
        PartialState._reset_state()


def silent_ranks(rank: int, world: int) -> list[int]:
    """Ranks that do not say within a few seconds that they are alive; each that waits for them calls this."""
    store = dist.distributed_c10d._get_default_store()
    alive = {other: f"tutelage/alive/{other}" for other in range(world)}
    end = time.monotonic() + _SIGN_OF_LIFE_SECONDS
    try:
        store.set(alive[rank], "yes")
        while True:
            silent = [other for other, key in alive.items() if not store.check([key])]
            if not silent or time.monotonic() > end:
                return silent
            time.sleep(0.05)
    except RuntimeError:  # the store is gone with the rank that kept it
        return [other for other in range(world) if other != rank] if world == 2 else [0]


def _is_failed_exchange(error: RuntimeError) -> bool:
    return isinstance(error, dist.DistError) or (type(error) is RuntimeError and "/gloo/" in str(error))


def _available(device: str) -> bool:
    module = getattr(torch, device, None)
    if device == "mps":
        return bool(torch.backends.mps.is_available())
    return module is not None and bool(module.is_available())
