"""Rows of tokens for language models."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tutelage.data.documents import Documents
from tutelage.data.packing import pack
from tutelage.data.ragged import ranges, spread
from tutelage.data.source import RowSource, digest, tensor_digest
from tutelage.data.tokenizer import Tokenizer
from tutelage.engine.types import Batch

IGNORED = -100
"""Target of a position that does not count."""


class TokenSource(RowSource):
    """Documents packed into rows of tokens.

    A batch's inputs are ``input_ids`` and ``position_ids``, both ``[rows, length]`` int64. Positions start at 0 with
    every document (of a document that is split over rows, with every piece), and once more where padding begins: causal
    attention that goes by them keeps documents and padding apart. ``target[:, i]`` is the token that follows position i
    in its document, which for the last one of a split document's piece stands in another row; it is -100 at a
    document's end, where a document is cut off, in padding, and where the next token does not count. ``mask`` is True
    where there is a target. Documents of which a part alone counts are never split, and those of which nothing is
    learnt within ``max_length`` stand in no row (`tutelage.data.packing.pack`).

    Packed rows have ``max_length`` places always; rows of one document as many as the longest of the batch.

    Args:
        documents: tokens; empty documents stand in no row.
        tokenizer: that made them.
        max_length, packing: as `tutelage.data.packing.pack` takes them.
        columns: of each document ``[documents]``; documents share a row only where all of these are equal.
        names: for a column of codes, the name of each code.
        first_id: id of the first row.

    Attributes:
        packing_fingerprint: sha256 of what a row's id stands for; it is the same however many rows are kept.
        fill: share of all places in packed rows that hold a token.
        lost: tokens that stand in no row, since their document is longer than one and not split.
    """

    def __init__(
        self,
        documents: Documents,
        tokenizer: Tokenizer,
        *,
        max_length: int,
        packing: str,
        columns: Mapping[str, Tensor] | None = None,
        names: Mapping[str, Sequence[str]] | None = None,
        first_id: int = 0,
    ) -> None:
        columns = columns or {}
        self.layout = pack(documents.lengths, max_length, packing, _groups(columns), documents.learnt)
        self.fill, self.lost = self.layout.fill, self.layout.lost
        self.documents, self.pad_id = documents, tokenizer.pad_id
        self.packed = packing != "none"
        self._splits = self.packed and documents.counted is None
        self.names = dict(names or {})
        self.fields = frozenset({"target", "index", "mask", *columns})
        self.constant = (
            self.packed
        )  # rows that are as long as the batch's longest cannot be kept in one table
        leader = torch.from_numpy(self.layout.document[self.layout.first[:-1]])
        self._columns = {name: values[leader] for name, values in columns.items()}
        self._kept = np.arange(self.layout.rows)
        self._first_id = first_id
        self.packing_fingerprint = digest(
            [
                [tensor_digest(torch.from_numpy(documents.tokens)), tokenizer.fingerprint],
                [tensor_digest(torch.from_numpy(documents.offsets)), max_length, packing, first_id],
                None
                if documents.counted is None
                else ["cut off", tensor_digest(torch.from_numpy(documents.counted))],
                {name: tensor_digest(values) for name, values in columns.items()},
            ]
        )
        self.fingerprint = self.packing_fingerprint

    def keep(self, positions: NDArray[np.int64]) -> TokenSource:
        """The rows at ``positions`` alone, in this order; their ids stay."""
        chosen = copy.copy(self)
        chosen._kept = self._kept[positions]
        chosen.fingerprint = digest(
            ["rows", self.packing_fingerprint, tensor_digest(torch.from_numpy(chosen._kept))]
        )
        return chosen

    @property
    def target(self) -> Tensor | None:
        return None

    @property
    def ids(self) -> Tensor:
        return torch.from_numpy(self._kept + self._first_id)

    def column(self, name: str) -> Tensor:
        """A column of all rows."""
        return self._columns[name][torch.from_numpy(self._kept)]

    def tokens_of(self, position: int) -> list[NDArray[np.int32]]:
        """Tokens of each document's piece in a row, in the order in which they stand there."""
        layout, row = self.layout, self._kept[position]
        numbers = slice(int(layout.first[row]), int(layout.first[row + 1]))
        starts = self.documents.offsets[layout.document[numbers]] + layout.start[numbers]
        ends = starts + layout.length[numbers]
        return [self.documents.tokens[start:end] for start, end in zip(starts, ends, strict=True)]

    @property
    def tokens(self) -> int:
        """In all rows, padding apart."""
        return int(self.row_lengths.sum())

    @property
    def row_lengths(self) -> NDArray[np.int64]:
        """Tokens of each row, padding apart."""
        whole = np.add.reduceat(self.layout.length, self.layout.first[:-1])
        return np.asarray(whole[self._kept], dtype=np.int64)

    @property
    def teaching(self) -> NDArray[np.bool_]:
        """Which rows have a target ``[rows]``: not those of a document's last token alone, as nothing foretells it."""
        layout = self.layout
        followed = layout.length > 1
        if self._splits:
            followed |= layout.start + layout.length < self.documents.lengths[layout.document]
        elif self.documents.counted is not None:
            followed[:] = True  # only documents with something to learn stand in rows
        return np.asarray(np.logical_or.reduceat(followed, layout.first[:-1])[self._kept], dtype=np.bool_)

    def piece_numbers(self) -> NDArray[np.int64]:
        """Numbers in `layout` of the pieces of documents that stand in these rows, in the rows' order."""
        first = self.layout.first[self._kept]
        return ranges(first, self.layout.first[self._kept + 1] - first)

    def __len__(self) -> int:
        return len(self._kept)

    def fetch(self, positions: Sequence[int]) -> Batch:
        layout, documents = self.layout, self.documents
        rows = self._kept[np.asarray(positions, dtype=np.int64)]
        count = layout.first[rows + 1] - layout.first[rows]
        pieces = ranges(layout.first[rows], count)
        length, document = layout.length[pieces], layout.document[pieces]
        start = documents.offsets[document] + layout.start[pieces]
        end = documents.offsets[document + 1] if self._splits else start + length
        here = ranges(start, length)
        after = here + 1
        target = np.where(after < np.repeat(end, length), documents.tokens.take(after, mode="clip"), IGNORED)
        if documents.counted is not None:
            target = np.where(documents.counted.take(after, mode="clip"), target, IGNORED)

        filled = np.add.reduceat(length, np.cumsum(count) - count)
        width = layout.max_length if self.packed else int(filled.max())
        place = np.arange(width) - filled[:, None]
        is_token = place < 0
        place[is_token] = here - np.repeat(start, length)
        labels = spread(target, is_token, IGNORED)
        return Batch(
            inputs={
                "input_ids": spread(documents.tokens[here], is_token, self.pad_id),
                "position_ids": torch.from_numpy(place),
            },
            target=labels,
            index=torch.from_numpy(rows + self._first_id),
            mask=labels != IGNORED,
            columns={name: values[rows] for name, values in self._columns.items()},
        )


def _groups(columns: Mapping[str, Tensor]) -> NDArray[np.int64] | None:
    """A code of each document that is equal where all columns are; None without columns."""
    if not columns:
        return None
    codes = [np.unique(values.numpy(), return_inverse=True)[1] for values in columns.values()]
    return np.unique(np.stack(codes, axis=1), axis=0, return_inverse=True)[1].reshape(-1)
