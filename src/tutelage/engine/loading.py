"""Rows into steps. Which rows a step sees is a pure function of (seed, step): nothing but the sampler's own state has
to be kept for an exact resume, and batch layout does not depend on workers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from tutelage.engine.resident import Resident
from tutelage.engine.rng import derive_seed
from tutelage.engine.types import Batch

Fetch = Callable[[int, list[list[int]]], Iterator[Batch]]
"""An epoch's batches from its number and the positions of each batch."""


@runtime_checkable
class Source(Protocol):
    """Map-style rows. ``fetch`` gives CPU tensors; images as uint8 ``[rows, channels, height, width]`` or as float in
    [0, 1]; ``index`` holds each row's stable id. One that says ``constant = True`` gives the same row for a position in
    every epoch: its rows may be kept on an accelerator."""

    fields: frozenset[str]
    fingerprint: str

    def __len__(self) -> int: ...

    def fetch(self, positions: Sequence[int]) -> Batch: ...


class Sampler(Protocol):
    """Which positions an epoch visits, in order: ``order(epoch)`` has ``len(self)`` entries and depends on the epoch
    and on what ``state_dict`` holds, on nothing else."""

    def __len__(self) -> int: ...

    def order(self, epoch: int) -> Tensor: ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class ShuffleSampler:
    """Every row once an epoch, in an order drawn from (seed, epoch)."""

    def __init__(self, length: int, seed: int) -> None:
        self.length, self.seed = length, seed

    def __len__(self) -> int:
        return self.length

    def order(self, epoch: int) -> Tensor:
        generator = torch.Generator().manual_seed(derive_seed(self.seed, "order", epoch))
        return torch.randperm(self.length, generator=generator)

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass


class Loader:
    """Steps of micro-batches for one rank.

    A step's rows are cut into ``accumulate`` micro-batches, and each of those into one share a rank: so ranks together
    see the micro-batches that one process sees, and a rank's shares are micro-batches of one process that has more of
    them. Rows that do not fill a last step wait for the next epoch.

    Args:
        device: where steps are computed. To an accelerator, rows go from pinned memory, and a source's constant rows
            stay there where they fit (`tutelage.engine.resident`); none, or the CPU: batches stay as they are fetched.

    Raises:
        ValueError: fewer rows than a step needs, or a step that does not divide into ranks and micro-batches.
    """

    def __init__(
        self,
        source: Source,
        sampler: Sampler,
        *,
        batch_size: int,
        accumulate: int = 1,
        rank: int = 0,
        world: int = 1,
        workers: int = 0,
        seed: int = 0,
        device: torch.device | None = None,
    ) -> None:
        if len(source) == 0:
            raise ValueError("the training data has no rows; see data.path, data.train and data.limit")
        if len(sampler) < batch_size:
            raise ValueError(
                f"train.batch_size is {batch_size}, but an epoch has {len(sampler)} rows; "
                f"set train.batch_size to at most {len(sampler)}"
            )
        if batch_size % (accumulate * world):
            raise ValueError(
                f"train.batch_size {batch_size} does not divide into {world} ranks × {accumulate} micro-batches "
                "(train.accumulate)"
            )
        self.source, self.sampler = source, sampler
        self.batch_size, self.accumulate = batch_size, accumulate
        self.rank, self.world, self.workers, self.seed = rank, world, workers, seed
        self.steps_per_epoch = len(sampler) // batch_size
        self.on_accelerator = device is not None and device.type != "cpu"
        self.resident: Resident | None = None
        if device is not None and self.on_accelerator and getattr(source, "constant", False):
            self.resident = Resident(len(source), device)

    def steps(self, start: int) -> Iterator[list[Batch]]:
        """Micro-batches of step ``start``, ``start + 1``, … without end."""
        epoch, first = divmod(start, self.steps_per_epoch)
        fetch = self._fetcher()
        while True:
            positions = self._layout(epoch)[first:].flatten(0, 1).tolist()
            batches = (
                fetch(epoch, positions) if self.resident is None else self._kept(fetch, epoch, positions)
            )
            for _ in range(first, self.steps_per_epoch):
                yield [next(batches) for _ in range(self.accumulate)]
            epoch, first = epoch + 1, 0

    def _kept(self, fetch: Fetch, epoch: int, positions: list[list[int]]) -> Iterator[Batch]:
        """Batches whose rows are all on the accelerator come from there, the others from the source."""
        assert self.resident is not None
        held = [self.resident.holds(batch) for batch in positions]
        missing = [batch for batch, here in zip(positions, held, strict=True) if not here]
        fetched = fetch(epoch, missing) if missing else iter(())
        for batch, here in zip(positions, held, strict=True):
            yield self.resident.fetch(batch) if here else self.resident.keep(batch, next(fetched))

    def _layout(self, epoch: int) -> Tensor:
        """Positions ``[steps, micro-batches, rows]`` of this rank."""
        order = self.sampler.order(epoch)[: self.steps_per_epoch * self.batch_size]
        return order.view(self.steps_per_epoch, self.accumulate, self.world, -1)[:, :, self.rank]

    def _fetcher(self) -> Fetch:
        """Gives an epoch's batches from (epoch, positions of each); worker processes live as long as it does."""
        rows = _Rows(self.source)
        if self.workers == 0:
            return lambda epoch, batches: (rows.__getitems__((epoch, batch)) for batch in batches)
        plan: list[tuple[int, list[int]]] = []
        loader = DataLoader(
            rows,
            batch_sampler=plan,  # type: ignore[arg-type]  # each entry goes to __getitems__ as it is
            num_workers=self.workers,
            collate_fn=_as_it_is,
            # A generator of its own: else the workers' seeds come from the global one, and a resumed run differs.
            generator=torch.Generator().manual_seed(derive_seed(self.seed, "workers")),
            persistent_workers=True,
            pin_memory=self.on_accelerator,
            multiprocessing_context="forkserver" if torch.cuda.is_available() else "fork",
        )

        def fetch(epoch: int, batches: list[list[int]]) -> Iterator[Batch]:
            plan[:] = [(epoch, batch) for batch in batches]
            return iter(loader)

        return fetch


class Stream:
    """An endless shuffled loader beside the main one (``ctx.loader(name)``), made when it is first drawn from;
    ``drawn`` is all its state."""

    def __init__(self, make: Callable[[], Loader], device: torch.device) -> None:
        self.make, self.device, self.drawn = make, device, 0
        self._iterator: Iterator[list[Batch]] | None = None

    def __iter__(self) -> Stream:
        return self

    def __next__(self) -> Batch:
        if self._iterator is None:
            self._iterator = self.make().steps(self.drawn)
        self.drawn += 1
        return next(self._iterator)[0].to(self.device)

    def seek(self, drawn: int) -> None:
        self.drawn, self._iterator = drawn, None


class _Rows(Dataset[Batch]):
    def __init__(self, source: Source) -> None:
        self.source = source

    def __len__(self) -> int:
        return len(self.source)

    def __getitems__(self, entry: tuple[int, list[int]]) -> Batch:
        # The epoch travels with the positions: a worker's copy of the source outlives it, and loaders share sources.
        epoch, positions = entry
        if hasattr(self.source, "set_epoch"):
            self.source.set_epoch(epoch)
        return self.source.fetch(positions)


def _as_it_is(batch: Any) -> Any:
    return batch
