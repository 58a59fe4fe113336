"""Steps from rows that are read as they come, with exact resume: rows are shuffled inside a window, and all that has to
be kept is where that window began and how many of its steps are done."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor

from tutelage.engine.loading import Source
from tutelage.engine.rng import derive_seed
from tutelage.engine.types import Batch


class Window(Protocol):
    """Rows that lie together. ``state`` is plain JSON, from which a stream goes on with this very window."""

    @property
    def source(self) -> Source: ...

    @property
    def number(self) -> int: ...

    @property
    def state(self) -> dict[str, Any]: ...


class RowStream(Protocol):
    """Windows without end; ``epoch_rows`` of their rows count as an epoch."""

    epoch_rows: int

    def windows(self, state: Mapping[str, Any] | None = None) -> Iterator[Window]: ...


class StreamLoader:
    """Steps of micro-batches for one rank, as `tutelage.engine.loading.Loader` cuts them. Every rank reads the stream
    and keeps its own part of each step. Rows of a window that do not fill a last step are left out; so is a window that
    fills none, as the rest of a pass through the data may be.

    It is its own sampler: ``state_dict`` is where the step last given stands.

    Raises:
        ValueError: an epoch of less than a step, or a step that does not divide into ranks and micro-batches.
    """

    def __init__(
        self,
        stream: RowStream,
        *,
        batch_size: int,
        accumulate: int = 1,
        rank: int = 0,
        world: int = 1,
        seed: int = 0,
    ) -> None:
        if stream.epoch_rows < batch_size:
            raise ValueError(
                f"data.epoch_rows is {stream.epoch_rows}, train.batch_size {batch_size}; an epoch needs a step at least"
            )
        if batch_size % (accumulate * world):
            raise ValueError(
                f"train.batch_size {batch_size} does not divide into {world} ranks × {accumulate} micro-batches "
                "(train.accumulate)"
            )
        self.stream, self.batch_size, self.accumulate = stream, batch_size, accumulate
        self.rank, self.world, self.seed = rank, world, seed
        self.steps_per_epoch = stream.epoch_rows // batch_size
        self._state: dict[str, Any] = {"step": 0, "window": None, "used": 0}

    def __len__(self) -> int:
        return self.stream.epoch_rows

    def steps(self, start: int) -> Iterator[list[Batch]]:
        """Micro-batches of step ``start``, ``start + 1``, … without end.

        Raises:
            ValueError: ``start`` is not where the state stands, or windows fill no step.
        """
        if start != self._state["step"]:
            raise ValueError(f"the stream stands at step {self._state['step']}; step {start} was asked for")
        used, left_out = self._state["used"], 0
        for window in self.stream.windows(self._state["window"]):
            parts = self._layout(window)
            # One short window is the end of a pass; several that would fill a step together are too small.
            left_out = 0 if len(parts) else left_out + len(window.source)
            if left_out >= self.batch_size:
                raise ValueError(
                    f"a window of the stream has {len(window.source)} rows, train.batch_size is {self.batch_size}; set "
                    "data.window to more documents"
                )
            for number in range(used, len(parts)):
                self._state = {"step": self._state["step"] + 1, "window": window.state, "used": number + 1}
                yield [window.source.fetch(positions) for positions in parts[number].tolist()]
            used = 0

    def _layout(self, window: Window) -> Tensor:
        """Positions ``[steps, micro-batches, rows]`` of this rank."""
        generator = torch.Generator().manual_seed(derive_seed(self.seed, "window", window.number))
        order = torch.randperm(len(window.source), generator=generator)
        steps = len(order) // self.batch_size
        order = order[: steps * self.batch_size]
        return order.view(
            steps, self.accumulate, self.world, self.batch_size // (self.accumulate * self.world)
        )[:, :, self.rank]

    def state_dict(self) -> dict[str, Any]:
        return dict(self._state)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._state = dict(state)

    def order(self, epoch: int) -> Tensor:
        """There is none before the rows are read."""
        raise TypeError("a stream has no order of its rows")
