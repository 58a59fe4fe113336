"""Which rows train, and which are held out. All of it depends on the seed and on the split's size alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tutelage.data.source import DataError, salt
from tutelage.engine.philox import Counter
from tutelage.recipe.schema import DataConfig

Ids = NDArray[np.int64]


@dataclass(frozen=True)
class Rows:
    """Rows of a split as it was read, by id, ascending."""

    split: str
    ids: Ids


@dataclass(frozen=True)
class Chosen:
    """The rows of each part of a run."""

    train: Rows
    validation: Rows | None
    test: Rows | None

    def parts(self) -> dict[str, Rows]:
        found = {"train": self.train, "validation": self.validation, "test": self.test}
        return {name: rows for name, rows in found.items() if rows is not None}


def choose_rows(config: DataConfig, sizes: Mapping[str, int]) -> Chosen:
    """Test rows first, then validation, then training rows, from one seeded permutation of the training split; a
    split's name takes that split instead. ``limit`` keeps the first of what is left to train on: a larger limit keeps
    the same rows and more, and the held-out rows do not change.

    Args:
        sizes: rows of each split that was read.

    Raises:
        DataError: a split that is not there or is empty, or numbers that leave no rows.
    """
    if config.train not in sizes:
        raise DataError(f"{_missing('train', config.train, sizes)}; set data.train")
    for name in {config.train, config.validation, config.test} & set(sizes):
        if sizes[str(name)] == 0:
            raise DataError(f"the split {name!r} of {config.path} has no rows")
    test = config.test
    if test is None and "test" in sizes and "test" not in (config.train, config.validation):
        test = "test"
    order = permutation(sizes[config.train], config.seed, config.train)
    held: dict[str, Rows | None] = {}
    rest = order
    for part, wanted in (("test", test), ("validation", config.validation)):
        if isinstance(wanted, str):
            held[part] = Rows(_named(config, part, wanted, sizes), np.arange(sizes[wanted]))
        elif wanted is not None:
            count = _count(config, part, wanted, len(order), len(rest))
            held[part] = Rows(config.train, rest[:count])
            rest = rest[count:]
    if held.get("test") is not None and config.test == config.validation and isinstance(config.test, str):
        raise DataError(
            f"data.validation and data.test are both the split {config.test!r}; give two splits, or a share"
        )
    if config.limit is not None and config.limit > len(rest):
        raise DataError(
            f"data.limit is {config.limit}, but {len(rest)} rows are left to train on "
            f"({len(order)} of {config.train!r}, {len(order) - len(rest)} held out)"
        )
    train = Rows(config.train, np.sort(rest[: config.limit]))
    return Chosen(train, _limited(config, held.get("validation")), _limited(config, held.get("test")))


def permutation(rows: int, seed: int, split: str) -> Ids:
    """A random order of rows, the same on every machine and version: each row is sorted by a number of its own."""
    return positions_in_order(np.arange(rows), seed, split)


def positions_in_order(ids: Ids, seed: int, split: str) -> Ids:
    """Positions of some rows of a split in the order in which `choose_rows` takes them: the first are those that a
    ``limit`` would keep."""
    words = Counter(ids, np.zeros_like(ids), seed, salt(split), stream=1).words(1)
    return np.argsort(words[:, 0], kind="stable")


def _named(config: DataConfig, part: str, name: str, sizes: Mapping[str, int]) -> str:
    if name not in sizes:
        raise DataError(
            f"{_missing(part, name, sizes)}; name one in data.{part}, or give a share to hold out"
        )
    if name == config.train:
        raise DataError(
            f"data.{part} is {name!r}, the training split itself; name another, or give a share to hold out"
        )
    return name


def _count(config: DataConfig, part: str, wanted: float | int, rows: int, left: int) -> int:
    count = wanted if isinstance(wanted, int) else round(wanted * rows)
    if count == 0:
        raise DataError(
            f"data.{part} is {wanted}: of {rows} rows of {config.train!r} that is none; give at least {1 / rows:.2g}"
        )
    if count >= left:
        raise DataError(
            f"data.{part} is {wanted}: {count} of the {left} rows left of {config.train!r} would leave none to train on"
        )
    return count


def _limited(config: DataConfig, rows: Rows | None) -> Rows | None:
    """At most ``evaluation_limit`` rows, from all over the split: rows may stand there sorted by class."""
    if rows is None:
        return None
    limit = config.evaluation_limit
    if limit is None or limit >= len(rows.ids):
        return Rows(rows.split, np.sort(rows.ids))
    if rows.split == config.train:  # held out, so in random order already
        return Rows(rows.split, np.sort(rows.ids[:limit]))
    return Rows(rows.split, np.sort(permutation(len(rows.ids), config.seed, rows.split)[:limit]))


def _missing(part: str, name: str, sizes: Mapping[str, int]) -> str:
    return f"there is no {part} split {name!r}; the data has {', '.join(sizes)}"
