"""Rows in memory and rows chosen from others. Every row keeps the id that it has in the split it was read from."""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tutelage.engine.loading import Source
from tutelage.engine.philox import Counter
from tutelage.engine.types import Batch, Inputs
from tutelage.engine.views import to_float


class DataError(ValueError):
    """Data that cannot be used, with where the fault is."""


class RowSource(ABC):
    """Base of the sources here: what `tutelage.engine.loading.Source` asks for, and what is known of all rows at once.

    Attributes:
        fields: what batches carry beside inputs.
        fingerprint: sha256 of what the rows are.
        names: for columns of codes, the name of each code.
        constant: whether a position gives the same row in every epoch.
        packing_fingerprint: of packed tokens, sha256 of what a row's id stands for, however many rows there are.
    """

    constant = False
    packing_fingerprint: str | None = None
    fields: frozenset[str]
    fingerprint: str
    names: Mapping[str, Sequence[str]]

    @property
    @abstractmethod
    def target(self) -> Tensor | None:
        """Targets of all rows, ``[rows, ...]``, where they are at hand without fetching."""

    @property
    @abstractmethod
    def ids(self) -> Tensor | None:
        """Ids of all rows, ``[rows]`` int64, where they are at hand without fetching."""

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def fetch(self, positions: Sequence[int]) -> Batch: ...


class ArraySource(RowSource):
    """Base of sources whose targets, ids and columns are in memory, one entry a row."""

    constant = True

    def __init__(
        self,
        index: Tensor,
        target: Tensor | None,
        columns: Mapping[str, Tensor],
        names: Mapping[str, Sequence[str]],
        fingerprint: str,
    ) -> None:
        for name, column in {"index": index, "target": target, **columns}.items():
            if column is not None and len(column) != len(index):
                raise DataError(f"`{name}` has {len(column)} rows, `index` has {len(index)}")
        self.index, self.columns, self.names, self.fingerprint = (
            index,
            dict(columns),
            dict(names),
            fingerprint,
        )
        self._target = target
        self.fields = frozenset({"index", *columns} | ({"target"} if target is not None else set()))

    @property
    def target(self) -> Tensor | None:
        return self._target

    @property
    def ids(self) -> Tensor | None:
        return self.index

    def __len__(self) -> int:
        return len(self.index)

    def column(self, name: str) -> Tensor:
        """A column of all rows."""
        return self.columns[name]

    @abstractmethod
    def inputs(self, rows: Tensor) -> Inputs:
        """Inputs at positions ``rows`` (int64)."""

    def fetch(self, positions: Sequence[int]) -> Batch:
        rows = torch.as_tensor(positions, dtype=torch.int64)
        return Batch(
            inputs=self.inputs(rows),
            target=None if self._target is None else self._target[rows],
            index=self.index[rows],
            columns={name: column[rows] for name, column in self.columns.items()},
        )


class TensorSource(ArraySource):
    """Rows in memory.

    Args:
        inputs: ``[rows, ...]``; images uint8 or float in [0, 1], ``[rows, channels, height, width]``.
        target: ``[rows, ...]``; none: rows without label.
        index: id of each row; left out: its position.
        columns: further fields ``[rows]``.
        names: for a column of codes, the name of each code.
        fingerprint: what the rows are; left out: the sha256 of all tensors.
    """

    def __init__(
        self,
        inputs: Tensor,
        target: Tensor | None = None,
        *,
        index: Tensor | None = None,
        columns: Mapping[str, Tensor] | None = None,
        names: Mapping[str, Sequence[str]] | None = None,
        fingerprint: str | None = None,
    ) -> None:
        index = torch.arange(len(inputs)) if index is None else index
        columns = columns or {}
        if fingerprint is None:
            fingerprint = digest(
                [tensor_digest(t) for t in (inputs, target, index, *columns.values()) if t is not None]
            )
        super().__init__(index, target, columns, names or {}, fingerprint)
        if len(inputs) != len(index):
            raise DataError(f"inputs have {len(inputs)} rows, `index` has {len(index)}")
        self._inputs = inputs

    def inputs(self, rows: Tensor) -> Tensor:
        return self._inputs[rows]


class SubsetSource(RowSource):
    """Rows of another source at ``positions``, in this order; their ids stay.

    Raises:
        DataError: a position outside of the source.
    """

    def __init__(self, source: Source, positions: Sequence[int] | Tensor) -> None:
        self.source = source
        self.positions = torch.as_tensor(positions, dtype=torch.int64).clone()
        if len(self.positions):
            low, high = int(self.positions.min()), int(self.positions.max())
            if low < 0 or high >= len(source):
                raise DataError(
                    f"row {low if low < 0 else high} of a source with {len(source)} rows; positions start at 0"
                )
        self.fields, self.constant = source.fields, getattr(source, "constant", False)
        self.names = getattr(source, "names", {})
        self.packing_fingerprint = getattr(source, "packing_fingerprint", None)
        self.fingerprint = digest(["subset", source.fingerprint, tensor_digest(self.positions)])

    @property
    def target(self) -> Tensor | None:
        known = self.source.target if isinstance(self.source, RowSource) else None
        return None if known is None else known[self.positions]

    @property
    def ids(self) -> Tensor | None:
        known = self.source.ids if isinstance(self.source, RowSource) else None
        return None if known is None else known[self.positions]

    def __len__(self) -> int:
        return len(self.positions)

    def fetch(self, positions: Sequence[int]) -> Batch:
        return self.source.fetch(self.positions[torch.as_tensor(positions, dtype=torch.int64)].tolist())

    def column(self, name: str) -> Tensor:
        """A column of all rows."""
        return column(self.source, name)[self.positions]

    def set_epoch(self, epoch: int) -> None:
        if hasattr(self.source, "set_epoch"):
            self.source.set_epoch(epoch)


class NoisySource(RowSource):
    """Another source with Gaussian noise that belongs to each row: the same in every epoch, batch and process.

    Args:
        source: rows with an index. uint8 inputs become float32 first; sums are not cut to [0, 1].
        deviation: standard deviation, in units of ``scale``.
        scale: a factor that broadcasts over a row's inputs.
        seed, split: with the row's index, the key of the noise.
    """

    def __init__(self, source: RowSource, deviation: float, *, scale: Tensor, seed: int, split: str) -> None:
        self.source, self.deviation, self.scale = source, deviation * scale.float(), scale
        self.seed, self.salt = seed, salt(split)
        self.fields, self.names, self.constant = source.fields, source.names, source.constant
        self.fingerprint = digest(["noise", source.fingerprint, deviation, scale.tolist(), seed, split])

    @property
    def target(self) -> Tensor | None:
        return self.source.target

    @property
    def ids(self) -> Tensor | None:
        return self.source.ids

    def __len__(self) -> int:
        return len(self.source)

    def fetch(self, positions: Sequence[int]) -> Batch:
        batch = to_float(self.source.fetch(positions))
        assert isinstance(batch.inputs, Tensor)
        assert batch.index is not None
        ids = batch.index.numpy()
        counter = Counter(ids, np.zeros_like(ids), self.seed, self.salt)
        noise = torch.from_numpy(counter.normal_field(tuple(batch.inputs.shape[1:])))
        return batch.replace(inputs=batch.inputs + noise * self.deviation)


def subset(source: Source, positions: Sequence[int] | Tensor) -> SubsetSource:
    """The rows of ``source`` at ``positions``; each keeps its id."""
    if isinstance(source, SubsetSource):
        rows = source.positions[torch.as_tensor(positions, dtype=torch.int64)]
        return SubsetSource(source.source, rows)
    return SubsetSource(source, positions)


def targets(source: Source) -> Tensor:
    """Targets of all rows, ``[rows, ...]``.

    Raises:
        DataError: rows without a target.
    """
    known: Tensor | None = getattr(source, "target", None)
    return _fetched(source, "target") if known is None else known


def row_ids(source: Source) -> Tensor:
    """Ids of all rows, ``[rows]`` int64: what batches carry as ``index``.

    Raises:
        DataError: rows without an id.
    """
    known: Tensor | None = getattr(source, "ids", None)
    return _fetched(source, "index") if known is None else known


def column(source: Source, name: str) -> Tensor:
    """A column of all rows, ``[rows]``.

    Raises:
        DataError: the rows do not carry it.
    """
    if name not in source.fields - {"target", "index", "mask"}:
        raise DataError(f"these rows have no column {name!r}; name it in data.columns")
    known: Callable[[str], Tensor] | None = getattr(source, "column", None)
    return _fetched(source, name) if known is None else known(name)


def _fetched(source: Source, field: str) -> Tensor:
    parts = []
    for start in range(0, len(source), 512):
        batch = source.fetch(list(range(start, min(start + 512, len(source)))))
        value = batch.columns[field] if field in batch.columns else getattr(batch, field)
        if value is None:
            raise DataError(f"these rows have no {field}; see `data` in the recipe")
        parts.append(value)
    if not parts:
        raise DataError(f"no rows: there is no {field}")
    return torch.cat(parts)


def salt(name: str) -> int:
    """A 64-bit number that stands for a name in a random key."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little")


def digest(parts: Any) -> str:
    """sha256 of plain JSON values."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def tensor_digest(tensor: Tensor) -> str:
    """sha256 of a tensor's dtype, shape and bytes."""
    raw = tensor.detach().cpu().contiguous()
    head = f"{raw.dtype} {list(raw.shape)} ".encode()
    return hashlib.sha256(head + raw.reshape(-1).view(torch.uint8).numpy().tobytes()).hexdigest()
