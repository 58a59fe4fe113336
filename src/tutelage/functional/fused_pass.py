"""The one pass of a fused loss: chunk by chunk, logits, losses, and at once the gradients of hidden, head and bias."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from tutelage.functional.fused_products import Gradients, Side
from tutelage.functional.fused_rows import Found, Rows
from tutelage.functional.fused_vocabulary import Vocabulary

__all__: list[str] = []

_MOST = {"cpu": 2**29}
"""Bytes of logits that a chunk holds at most; elsewhere four times as many."""

_FEWEST = {"cpu": 512}
"""Rows of logits, both models', below which the products slow down; elsewhere four times as many."""

_PART = {"cpu": 3 * 2**19}
"""Bytes of logits that are worked on at once, so that they stay in the cache; elsewhere the whole chunk."""


def chunk_rows(count: int, line: int, models: int, device: str) -> int:
    """How many of ``count`` rows a chunk holds: a sixth; more where products of so few would be slow, and fewer where
    they took too many bytes."""
    fewest, most = _FEWEST.get(device, 2**11) // models, _MOST.get(device, 2**31) // (line * models)
    return max(min(max(count // 6, fewest), most), 1)


class Chunks:
    """The counted rows, cut into chunks of about equal size, and these into parts that fit a cache. Where nothing
    counts, there is one of each, without rows.

    Args:
        counted: positions of the rows that count; or how many there are, where all do.
        line: bytes of a row of logits.
        models: how many models' logits a chunk holds.
        size: rows of a chunk; None: by bytes.
        parted: whether there are parts; not where each would cost an exchange between processes.
    """

    def __init__(
        self,
        counted: Tensor | int,
        line: int,
        models: int,
        size: int | None,
        device: torch.device,
        *,
        parted: bool = True,
    ) -> None:
        self.counted = counted if isinstance(counted, Tensor) else None
        self.count = counted if isinstance(counted, int) else len(counted)
        if size is None:
            size = chunk_rows(self.count, line, models, device.type)
        pieces = max(-(-self.count // size), 1)
        self.size = -(-self.count // pieces)
        self._part = max(_PART.get(device.type, 2**62) // line, 1) if parted else max(self.size, 1)

    def rows(self, start: int, part: slice) -> Tensor | slice:
        """Positions in the input of a part of the chunk that begins at ``start``."""
        cut = slice(start + part.start, start + part.stop)
        return cut if self.counted is None else self.counted[cut]

    def parts(self, length: int) -> Iterator[slice]:
        for start in range(0, max(length, 1), self._part):
            yield slice(start, min(start + self._part, length))

    def __iter__(self) -> Iterator[tuple[int, Tensor | slice]]:
        for start in range(0, max(self.count, 1), max(self.size, 1)):
            yield start, self.rows(start, slice(0, min(self.size, self.count - start)))


def run_pass(
    side: Side,
    vocabulary: Vocabulary,
    chunks: Chunks,
    work: Rows,
    gradients: Gradients,
    row_weight: Tensor | None,
) -> Found:
    """All chunks; returns the losses of the counted rows in their order, and adds to ``gradients``, where each row
    weighs as ``row_weight`` (``[counted rows]``) says."""
    tile = torch.empty(chunks.size, vocabulary.size, dtype=side.wide, device=side.hidden.device)
    work.reserve(tile)
    found: Found | None = None
    for start, rows in chunks:
        logits = side.logits(rows, tile)
        work.prepare(rows)
        for part in chunks.parts(len(logits)):
            few = logits[part]
            slope = side.bend_(few)
            values = work(few, chunks.rows(start, part), part)
            found = found or values.reserved(chunks.count)
            found.put(slice(start + part.start, start + part.stop), values)
            if slope is not None and gradients:
                few.mul_(slope)
        if gradients:
            weight = None if row_weight is None else row_weight[start : start + len(logits)]
            gradients.add(side, rows, logits, weight)
    if gradients.hidden is not None:
        vocabulary.sum_(gradients.hidden)
    assert found is not None
    return found
