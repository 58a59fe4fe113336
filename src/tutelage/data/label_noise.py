"""Wrong labels, put in on purpose: outliers that a method should not learn from."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from tutelage.data.source import DataError, RowSource, digest, salt
from tutelage.engine.philox import Counter
from tutelage.engine.types import Batch

_STREAM = 2
"""Apart from the splits' permutation and the inputs' noise."""


class WrongLabels(RowSource):
    """Another source in which some rows have another class. Which rows, and which class, depends on the seed, the split
    and the row's id alone: it is the same in every epoch, batch and process.

    Args:
        source: rows with an index and class ids.
        share: the chance that a row's class is replaced, by each of the others alike.
        classes: how many there are.
        among: classes that are replaced, each by another of these; empty: all.

    Raises:
        DataError: fewer than two classes to choose from, or one that there is not.
    """

    def __init__(
        self,
        source: RowSource,
        share: float,
        classes: int,
        *,
        among: Sequence[int] = (),
        seed: int,
        split: str,
    ) -> None:
        chosen = sorted(set(among)) or list(range(classes))
        if len(chosen) < 2 or chosen[-1] >= classes:
            raise DataError(
                f"data.label_noise replaces a class by another of {chosen}; the data has {classes} classes, "
                f"numbered from 0 (data.label_noise_classes)"
            )
        self.source, self.share, self.chosen = source, share, torch.tensor(chosen)
        self.place = torch.full((classes,), -1).index_copy(0, self.chosen, torch.arange(len(chosen)))
        self.seed, self.salt = seed, salt(split)
        self.fields, self.names = source.fields, source.names
        self.fingerprint = digest(["label noise", source.fingerprint, share, chosen, seed, split])

    @property
    def target(self) -> Tensor | None:
        target, ids = self.source.target, self.source.ids
        return None if target is None or ids is None else self._replaced(target, ids)

    @property
    def ids(self) -> Tensor | None:
        return self.source.ids

    def __len__(self) -> int:
        return len(self.source)

    def fetch(self, positions: Sequence[int]) -> Batch:
        batch = self.source.fetch(positions)
        if batch.target is None or batch.index is None or batch.target.is_floating_point():
            raise DataError("data.label_noise needs class ids; these rows have none (see data.target)")
        return batch.replace(target=self._replaced(batch.target, batch.index))

    def set_epoch(self, epoch: int) -> None:
        if hasattr(self.source, "set_epoch"):
            self.source.set_epoch(epoch)

    def _replaced(self, target: Tensor, ids: Tensor) -> Tensor:
        index = ids.numpy()
        drawn = Counter(index, np.zeros_like(index), self.seed, self.salt, _STREAM).uniform(2)
        count = len(self.chosen)
        # A step of 1 … count - 1 on the circle of the classes never ends where it began.
        step = 1 + torch.from_numpy(drawn[:, 1] * (count - 1)).long().clamp(max=count - 2)
        place = self.place[target]
        other = self.chosen[(place + step) % count]
        return torch.where(torch.from_numpy(drawn[:, 0] < self.share) & (place >= 0), other, target)
