"""The refined corpus as a data set of its own: the text of kept rows, which any tokeniser can read."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tutelage.data import Tokenizer, TokenSource, column
from tutelage.procedures.text_data import write_text_data

_CHUNK = 1000
"""Rows whose text is in memory at once."""


def write_corpus(
    folder: Path,
    source: TokenSource,
    tokenizer: Tokenizer,
    kept: Tensor,
    scores: dict[str, Tensor],
    about: dict[str, Any],
) -> None:
    """Write the documents of the kept rows, in the corpus' order, as parquet in the hub's layout; complete or not at
    all.

    A document that was cut into pieces comes back as its kept pieces, each a text of its own. Special tokens are left
    out: the reader's tokeniser puts its own.

    Args:
        kept: positions ``[kept]``.
        scores: of all rows, by name; a column each.
        about: what the corpus was made by; kept in the file's metadata.

    Raises:
        UnwrittenError: the disk refuses.
    """
    coded = [name for name in source.names if name in source.fields]
    columns = {"text": str, "row": int, **dict.fromkeys(scores, float), **dict.fromkeys(coded, str)}
    starts = range(0, len(kept), _CHUNK)
    parts = (_texts(source, tokenizer, kept[start : start + _CHUNK], scores, coded) for start in starts)
    write_text_data(folder, columns, parts, about)


def _texts(
    source: TokenSource, tokenizer: Tokenizer, part: Tensor, scores: dict[str, Tensor], coded: list[str]
) -> dict[str, list[Any]]:
    """Columns of some rows' documents."""
    texts = [
        (position, text)
        for position in part.tolist()
        for text in (tokenizer.decode(ids.tolist(), special=False) for ids in source.tokens_of(position))
        if text
    ]
    positions = torch.tensor([position for position, _ in texts], dtype=torch.int64)
    return {
        "text": [text for _, text in texts],
        "row": source.ids[positions].tolist(),
        **{name: values[positions].tolist() for name, values in scores.items()},
        **{name: list(_titles(source, name, positions)) for name in coded},
    }


def _titles(source: TokenSource, name: str, positions: Tensor) -> Iterator[str]:
    return (source.names[name][int(code)] for code in column(source, name)[positions].tolist())


def quantiles(compared: dict[str, Tensor]) -> list[list[Any]]:
    """Rows of a table: name, number of values and their quantiles at `SHARES`."""
    shares = torch.tensor(SHARES, dtype=torch.float64)
    return [[name, len(values), *_at(values, shares)] for name, values in compared.items()]


SHARES = (0.0, 0.05, 0.25, 0.5, 0.75, 0.95, 1.0)


def _at(values: Tensor, shares: Tensor) -> list[float]:
    # torch.quantile refuses more than 2^24 values.
    ordered = values.sort().values
    places = (shares * (len(ordered) - 1)).round().long()
    return ordered[places].tolist() if len(ordered) else [None] * len(shares)  # type: ignore[list-item]


def kept_by_column(source: TokenSource, kept: Tensor, score: Tensor) -> list[list[Any]]:
    """Rows of a table: of every value of every column of codes its rows, those kept, their share, the mean score."""
    is_kept = torch.zeros(len(source), dtype=torch.bool)
    is_kept[kept] = True
    found = []
    for name in (name for name in source.names if name in source.fields):
        codes = column(source, name)
        for code in torch.unique(codes).tolist():
            here = codes == code
            count = int(here.sum())
            chosen = int((here & is_kept).sum())
            found.append(
                [
                    name,
                    source.names[name][int(code)],
                    count,
                    chosen,
                    chosen / count,
                    float(score[here].mean()),
                ]
            )
    return found
