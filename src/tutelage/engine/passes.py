"""Whole passes over a run's training rows: what a method finds in them before the first step, or measures after it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch

from tutelage.engine.loading import Source
from tutelage.engine.runtime import Runtime
from tutelage.engine.types import Batch
from tutelage.engine.views import Views


class TrainingRows:
    """A run's training rows as `Method.prepare` and `Step.data` give them: a `Source`, and passes over the whole of it.
    `rows` gives those of other parts of the data in the same form.

    Whatever else the source has (``target``, ``ids``) is found here too.

    Args:
        source: the rows.
        views: the random changes that training draws.
        batch_size: rows of a batch of a pass.
        further: sources of the other parts, by name.
    """

    def __init__(
        self,
        source: Source,
        views: Views,
        runtime: Runtime,
        batch_size: int,
        further: Mapping[str, Source] | None = None,
    ) -> None:
        self.source, self.views, self.runtime, self.batch_size = source, views, runtime, batch_size
        self.further = dict(further or {})
        self.fields, self.fingerprint = source.fields, source.fingerprint

    def __len__(self) -> int:
        return len(self.source)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["source"], name)

    def rows(self, name: str) -> TrainingRows:
        """The rows of another part, ``validation``, as evaluation sees them; ``train`` is this one.

        Raises:
            ValueError: a part that the method's ``Needs.loaders`` does not name.
        """
        if name == "train":
            return self
        if name not in self.further:
            raise ValueError(f"no rows {name!r}; this method's Needs.loaders names {sorted(self.further)}")
        return TrainingRows(
            self.further[name], Views((), self.views.seed), self.runtime, self.batch_size, self.further
        )

    def batches(self, *, augmented: bool = False, most: int | None = None) -> Iterator[Batch]:
        """Every row once, in order, in batches on the device; each rank gets its share.

        A rank that has no row left gets one that its mask leaves out, since the forward of a sharded model is a
        collective: so leave out masked rows after the forward (`keep_rows`).

        Args:
            augmented: with the first view of every row drawn, as the first epoch shows it; else as evaluation sees it.
            most: about that many rows, evenly spread, where there are more.
        """
        stride = 1 if most is None else -(-len(self.source) // most)
        positions = range(0, len(self.source), stride)
        rank, world = self.runtime.rank, self.runtime.world
        for start in range(0, len(positions), self.batch_size * world):
            mine = list(positions[start : start + self.batch_size * world][rank::world])
            yield self._batch(mine or [0], augmented, masked=not mine)

    def _batch(self, positions: list[int], augmented: bool, *, masked: bool) -> Batch:
        batch = self.source.fetch(positions)
        if masked:
            none = torch.zeros(len(batch)) if batch.mask is None else torch.zeros_like(batch.mask)
            batch = batch.replace(mask=none)
        views = self.views if augmented else Views((), self.views.seed)
        view = torch.zeros(len(batch), dtype=torch.int64)
        draws = views.draw(batch, view)
        return views(batch.to(self.runtime.device), view, draws)

    @property
    def unchanged(self) -> bool:
        """Whether the first view is the row as evaluation sees it: training draws no random changes."""
        return not self.views.configs
