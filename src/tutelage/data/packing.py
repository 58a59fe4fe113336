"""Documents into rows of at most so many tokens."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from tutelage.data.source import DataError

Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Layout:
    """Which tokens stand in which row: pieces of documents, ordered by row and by place in the row.

    Attributes:
        document, start, length: of each piece ``[pieces]``: its document, its first token there, its tokens.
        first: ``[rows + 1]``: the pieces of row r are ``first[r]`` up to ``first[r + 1]``.
        max_length: tokens that a row may have.
        lost: tokens that stand in no row, of documents that have something to learn.
    """

    document: Ints
    start: Ints
    length: Ints
    first: Ints
    max_length: int
    lost: int

    @property
    def rows(self) -> int:
        return len(self.first) - 1

    @property
    def fill(self) -> float:
        """Share of all places in rows that hold a token; 0 without rows."""
        return float(self.length.sum() / (self.rows * self.max_length)) if self.rows else 0.0


@dataclass(frozen=True)
class _Pieces:
    document: Ints
    start: Ints
    length: Ints
    row: Ints


def pack(
    lengths: Ints, max_length: int, how: str, groups: Ints | None = None, learnt: Ints | None = None
) -> Layout:
    """Lay documents out in rows of at most ``max_length`` tokens.

    Args:
        lengths: tokens of each document ``[documents]``; empty ones stand nowhere.
        how: ``best_fit``: documents are cut into pieces of ``max_length``, and the pieces, longest first, each put
            where the least room is left over (best-fit decreasing). ``wrapped``: documents are joined in their order
            and cut every ``max_length`` tokens. ``none``: a document a row; what is longer is cut off.
        groups: a code of each document; only documents of one code share a row.
        learnt: of documents of which a part alone counts, where in each one the first token stands that is learnt
            ``[documents]``; its length where none is. Such a document is cut off at ``max_length`` whatever ``how``:
            the end of an answer is not learnt without its beginning and its prompt. Under ``wrapped`` one that would
            cross a row's end begins the next. What is left without a token to learn stands nowhere.

    Raises:
        DataError: an unknown ``how``, no tokens at all, or none that is learnt.
    """
    ways = {"best_fit": _best_fit, "wrapped": _wrapped if learnt is None else _in_turn, "none": _alone}
    if how not in ways:
        raise DataError(f"packing {how!r} is unknown; allowed: {', '.join(ways)}")
    if not lengths.any():
        raise DataError("there are no tokens to pack: every document is empty")
    whole = lengths
    if learnt is not None:
        whole = np.where(learnt < lengths, lengths, 0)
        lengths = np.where(learnt < max_length, np.minimum(whole, max_length), 0)
        _refuse_unlearnt(whole, lengths, max_length)
    documents = np.flatnonzero(lengths)
    codes = np.zeros(len(lengths), dtype=np.int64) if groups is None else groups
    parts, rows = [], 0
    for code in np.unique(codes[documents]):
        chosen = documents[codes[documents] == code]
        pieces = ways[how](lengths[chosen], max_length)
        parts.append(_Pieces(chosen[pieces.document], pieces.start, pieces.length, pieces.row + rows))
        rows = int(parts[-1].row.max()) + 1
    document, start, length, row = (
        np.concatenate([getattr(part, name) for part in parts])
        for name in ("document", "start", "length", "row")
    )
    order = np.argsort(row, kind="stable")
    first = np.searchsorted(row[order], np.arange(rows + 1))
    lost = int(whole.sum() - length.sum())
    return Layout(document[order], start[order], length[order], first, max_length, lost)


def _refuse_unlearnt(whole: Ints, cut: Ints, max_length: int) -> None:
    """Refuse documents of which, before or after they are cut off, nothing is learnt."""
    if not whole.any():
        raise DataError(
            "nothing counts in any document: no token that follows another one belongs to an answer; see that the "
            "answers are not empty, and that the chat template marks what the assistant says"
        )
    if not cut.any():
        raise DataError(
            f"in every document what is learnt begins after data.max_length, {max_length} tokens; raise it"
        )


def _cut(lengths: Ints, max_length: int) -> tuple[Ints, Ints, Ints]:
    """Document, start and length of the pieces of at most ``max_length`` tokens."""
    counts = -(-lengths // max_length)
    document = np.repeat(np.arange(len(lengths)), counts)
    number = np.arange(len(document)) - np.repeat(np.cumsum(counts) - counts, counts)
    start = number * max_length
    return document, start, np.minimum(lengths[document] - start, max_length)


def _best_fit(lengths: Ints, max_length: int) -> _Pieces:
    document, start, length = _cut(lengths, max_length)
    order = np.argsort(-length, kind="stable")
    rows_with_room: list[list[int]] = [[] for _ in range(max_length + 1)]
    rooms = 0  # bit r: there is a row that still takes r tokens
    row = np.empty(len(length), dtype=np.int64)
    opened = 0
    for piece, size in zip(order.tolist(), length[order].tolist(), strict=True):
        fitting = rooms >> size
        if fitting:
            room = size + (fitting & -fitting).bit_length() - 1
            place = rows_with_room[room].pop()
            if not rows_with_room[room]:
                rooms ^= 1 << room
        else:
            room, place, opened = max_length, opened, opened + 1
        row[piece] = place
        if room > size:
            rows_with_room[room - size].append(place)
            rooms |= 1 << (room - size)
    return _Pieces(document[order], start[order], length[order], row[order])


def _wrapped(lengths: Ints, max_length: int) -> _Pieces:
    ends = np.cumsum(lengths)
    begins = ends - lengths
    starts = np.union1d(begins, np.arange(0, ends[-1], max_length))
    document = np.searchsorted(ends, starts, side="right")
    length = np.diff(starts, append=ends[-1])
    return _Pieces(document, starts - begins[document], length, starts // max_length)


def _in_turn(lengths: Ints, max_length: int) -> _Pieces:
    """Documents of at most ``max_length`` tokens in their order, none over two rows."""
    row, filled, rows = 0, 0, []
    for length in lengths.tolist():
        filled += length
        if filled > max_length:
            row, filled = row + 1, length
        rows.append(row)
    return replace(_alone(lengths, max_length), row=np.asarray(rows, dtype=np.int64))


def _alone(lengths: Ints, max_length: int) -> _Pieces:
    rows = np.arange(len(lengths))
    return _Pieces(rows, np.zeros_like(rows), np.minimum(lengths, max_length), rows)
