"""A teacher that is a set of stored outputs. Rows are keyed by (index, view): the answer to exactly the pixels that the
student sees. Stores on disk come later; the interface and the one in memory are here."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from tutelage.engine.needs import Offers
from tutelage.engine.spec import ModelSpec
from tutelage.engine.teacher import Grad, Teacher
from tutelage.engine.types import Batch, Outputs


class Store(Protocol):
    """Stored outputs: logits and tapped features of rows by (index, view)."""

    offers: Offers
    spec: ModelSpec
    taps: tuple[str, ...]

    def read(self, index: Tensor, view: Tensor, taps: tuple[str, ...]) -> Outputs:
        """Outputs of the given rows, on the device of ``index``.

        Raises:
            KeyError: a row that was never stored, named by index and view.
        """


class StoredTeacher:
    """Answers from a store; no model runs."""

    def __init__(self, store: Store) -> None:
        self.store, self.spec, self.offers = store, store.spec, store.offers
        self.module = None

    def outputs(
        self, batch: Batch, taps: tuple[str, ...] = (), grad: Grad = "none", *, logits: bool = True
    ) -> Outputs:
        """See `tutelage.engine.teacher.Teacher`.

        Raises:
            ValueError: gradients are asked for, or the batch has no index and view.
        """
        if grad != "none":
            raise ValueError(f"a stored teacher gives no gradients (grad={grad!r}); use a live one")
        if batch.index is None or batch.view is None:
            raise ValueError("a stored teacher is read by (index, view); this batch has none")
        return self.store.read(batch.index, batch.view, taps)


class MemoryStore:
    """Outputs of a live teacher, kept in memory: a row is computed once for every view of it."""

    def __init__(self, teacher: Teacher, taps: tuple[str, ...] = ()) -> None:
        self.spec, self.taps = teacher.spec, taps
        self.offers = Offers(live=False, input_gradient=False, trainable=False, taps=bool(taps))
        self._rows: dict[tuple[int, int], tuple[Tensor, dict[str, Tensor]]] = {}

    def add(self, teacher: Teacher, batch: Batch) -> None:
        """Store a live teacher's outputs for a batch.

        Raises:
            ValueError: the batch has no index and view.
        """
        if batch.index is None or batch.view is None:
            raise ValueError("rows are stored by (index, view); this batch has none")
        outputs = teacher.outputs(batch, self.taps)
        for i, key in enumerate(zip(batch.index.tolist(), batch.view.tolist(), strict=True)):
            features = {path: outputs.features[path][i].cpu() for path in self.taps}
            self._rows[key] = (outputs.logits[i].cpu(), features)

    def read(self, index: Tensor, view: Tensor, taps: tuple[str, ...]) -> Outputs:
        """See `Store.read`."""
        keys = list(zip(index.tolist(), view.tolist(), strict=True))
        missing = [key for key in keys if key not in self._rows]
        if missing:
            raise KeyError(
                f"{len(missing)} rows were never stored; the first is (index, view) = {missing[0]}"
            )
        unknown = set(taps) - set(self.taps)
        if unknown:
            raise KeyError(
                f"taps {sorted(unknown)} were not stored; there are {', '.join(self.taps) or 'none'}"
            )
        rows = [self._rows[key] for key in keys]
        logits = torch.stack([row[0] for row in rows]).to(index.device)
        return Outputs(
            logits,
            features={path: torch.stack([row[1][path] for row in rows]).to(index.device) for path in taps},
        )
