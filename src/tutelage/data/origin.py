"""Where rows come from: splits by name and size, and a source of any rows of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

from torch import Tensor

from tutelage.data.source import RowSource
from tutelage.data.splits import Rows
from tutelage.data.tokenizer import Tokenizer


class Reading(Protocol):
    """Splits with their columns read."""

    @property
    def outputs(self) -> int: ...

    @property
    def class_names(self) -> tuple[str, ...] | None: ...

    @property
    def tokenizer(self) -> Tokenizer | None:
        """That made the inputs, where rows are text."""

    @property
    def scale(self) -> Tensor:
        """Range of the inputs, in which noise is measured; broadcasts over a row."""

    def source(self, rows: Rows) -> RowSource: ...


class Origin(Protocol):
    """Splits that were found, nothing read yet.

    Attributes:
        sizes: rows of each split.
        fingerprint: sha256 of what all of them hold.
    """

    @property
    def sizes(self) -> Mapping[str, int]: ...

    @property
    def fingerprint(self) -> str: ...

    def read(self, splits: Sequence[str], train: str) -> Reading:
        """Read the columns of ``splits``; classes are those of ``train``."""
