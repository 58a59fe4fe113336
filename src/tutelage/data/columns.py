"""Columns of a table as tensors: numbers, labels and codes. A fault is named by row, column and split."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tutelage.data.source import DataError

Arrow = Any
"""A pyarrow ChunkedArray; pyarrow has no types."""


@dataclass(frozen=True)
class Column:
    """A column of one split.

    Attributes:
        name, split: for messages.
        values: an arrow array.
        class_names: names of its codes, where the data itself says them.
    """

    name: str
    split: str
    values: Arrow
    class_names: tuple[str, ...] | None = None

    @property
    def kind(self) -> str:
        """``text``, ``number``, ``whole`` (number), ``truth`` (yes or no) or ``other``."""
        import pyarrow.types as types

        data_type = self.values.type
        if types.is_dictionary(data_type):
            data_type = data_type.value_type
        if types.is_string(data_type) or types.is_large_string(data_type):
            return "text"
        if types.is_boolean(data_type):
            return "truth"
        if types.is_integer(data_type):
            return "whole"
        return "number" if types.is_floating(data_type) or types.is_decimal(data_type) else "other"

    def fault(self, row: int, what: str) -> DataError:
        return DataError(f"row {row} of column {self.name!r}, split {self.split!r}, {what}")

    def refuse_missing(self) -> None:
        if self.values.null_count:
            row = int(np.flatnonzero(self.values.is_null().to_numpy(zero_copy_only=False))[0])
            raise self.fault(row, "is missing; remove the row or fill it")


@dataclass(frozen=True)
class ListColumn(Column):
    """A column of lists: ``values`` are the entries of all lists, one list after the other; row r's are
    ``values[offsets[r]:offsets[r + 1]]``."""

    offsets: NDArray[np.int64] = field(default_factory=lambda: np.zeros(1, dtype=np.int64))

    def fault(self, row: int, what: str) -> DataError:
        owner = int(np.searchsorted(self.offsets, row, side="right")) - 1
        place = f"entry {row - int(self.offsets[owner])} of row {owner}"
        return DataError(f"{place} of column {self.name!r}, split {self.split!r}, {what}")


def numbers(column: Column) -> NDArray[np.float64]:
    """Numbers ``[rows]``; yes and no are 1 and 0.

    Raises:
        DataError: text, a missing entry, NaN or an infinity.
    """
    if column.kind not in ("number", "whole", "truth"):
        example = column.values[0].as_py() if len(column.values) else None
        raise DataError(
            f"column {column.name!r} of split {column.split!r} holds no numbers but "
            f"{str(example)[:40]!r} ({column.values.type})"
        )
    column.refuse_missing()
    values = column.values.cast("float64").to_numpy()
    wrong = np.flatnonzero(~np.isfinite(values))
    if len(wrong):
        raise column.fault(int(wrong[0]), f"is {values[wrong[0]]}; allowed: finite numbers")
    return np.asarray(values, dtype=np.float64)


def matrix(columns: Sequence[Column]) -> Tensor:
    """Numbers of several columns, ``[rows, columns]`` float32.

    Raises:
        DataError: as `numbers`, and a number beyond float32.
    """
    values = np.stack([numbers(column) for column in columns], axis=1)
    wrong = np.argwhere(np.abs(values) > np.finfo(np.float32).max)
    if len(wrong):
        row, position = map(int, wrong[0])
        raise columns[position].fault(row, f"is {values[row, position]:g}, more than float32 can hold")
    return torch.from_numpy(values.astype(np.float32))


@dataclass(frozen=True)
class Labels:
    """Class ids by split, how many classes there are, and their names where they have any."""

    ids: dict[str, Tensor]
    classes: int
    names: tuple[str, ...] | None


def class_ids(columns: Mapping[str, Column], train: str) -> Labels:
    """Class ids of every split's target column. Text becomes the position in the sorted values of the training split.

    Raises:
        DataError: no label, a negative or broken number, or a label that the training split does not have.
    """
    first = columns[train]
    for column in columns.values():
        column.refuse_missing()
    if first.kind == "text":
        words = tuple(sorted(first.values.unique().to_pylist()))
        return _labels({split: _codes(column, words) for split, column in columns.items()}, len(words), words)
    ids = {split: _whole(column) for split, column in columns.items()}
    names = first.class_names or (("False", "True") if first.kind == "truth" else None)
    classes = len(names) if names else int(ids[train].max()) + 1
    for split, values in ids.items():
        wrong = np.flatnonzero((values < 0) | (values >= classes))
        if len(wrong):
            row = int(wrong[0])
            known = "declared" if names else f"seen in split {train!r}"
            raise columns[split].fault(
                row, f"is the label {values[row]}; allowed: 0 to {classes - 1} ({classes} classes {known})"
            )
    return _labels(ids, classes, names)


def _labels(ids: Mapping[str, NDArray[np.int64]], classes: int, names: tuple[str, ...] | None) -> Labels:
    if classes < 2:
        raise DataError(
            f"the target has {classes} class ({', '.join(names or ['0'])}); classification needs two"
        )
    return Labels({split: torch.from_numpy(values) for split, values in ids.items()}, classes, names)


def _whole(column: Column) -> NDArray[np.int64]:
    values = numbers(column)
    wrong = np.flatnonzero(values != np.round(values))
    if len(wrong):
        raise column.fault(
            int(wrong[0]), f"is {values[wrong[0]]:g}, no class id; for numbers set task: regression"
        )
    return values.astype(np.int64)


def _codes(column: Column, words: Sequence[str]) -> NDArray[np.int64]:
    """Position of every entry in ``words``."""
    import pyarrow as pa
    import pyarrow.compute as compute

    if column.kind != "text":
        raise DataError(
            f"column {column.name!r} of split {column.split!r} holds {column.values.type}, elsewhere text"
        )
    values = column.values.cast("string")
    found = compute.index_in(values, value_set=pa.array(words, type=pa.string()))
    if found.null_count:
        row = int(np.flatnonzero(found.is_null().to_numpy(zero_copy_only=False))[0])
        raise column.fault(
            row, f"is {values[row].as_py()!r}, which no training row has; there are {', '.join(words[:20])}"
        )
    return np.asarray(found.to_numpy(), dtype=np.int64)


@dataclass(frozen=True)
class Travelling:
    """A column that travels with the batch, by split; ``names`` of its codes where it holds codes."""

    values: dict[str, Tensor]
    names: tuple[str, ...] | None


def travelling(columns: Mapping[str, Column]) -> Travelling:
    """Text as the position in the sorted values of all splits, whole numbers as int64, others as float32.

    Raises:
        DataError: a missing entry, or a column of another kind.
    """
    kinds = {column.kind for column in columns.values()}
    for column in columns.values():
        column.refuse_missing()
    if kinds == {"text"}:
        words = tuple(
            sorted({word for column in columns.values() for word in column.values.unique().to_pylist()})
        )
        return Travelling(
            {split: torch.from_numpy(_codes(column, words)) for split, column in columns.items()}, words
        )
    if kinds <= {"whole", "truth"}:
        names = next(iter(columns.values())).class_names or (
            ("False", "True") if kinds == {"truth"} else None
        )
        return Travelling(
            {split: torch.from_numpy(_whole(column)) for split, column in columns.items()}, names
        )
    values = {
        split: torch.from_numpy(numbers(column).astype(np.float32)) for split, column in columns.items()
    }
    return Travelling(values, None)
