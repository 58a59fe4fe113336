"""The ``data.markov`` part of a recipe: a language made on the spot, to try language models offline."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import Field

from tutelage.recipe.config import Config
from tutelage.recipe.parts import Rows, Text

_MOST = 2**24
"""Entries of a table of transitions."""


class MarkovSourceConfig(Config):
    """One source of sequences: each symbol depends on the ``order`` before it."""

    name: Text = Field(description="What the column `source` calls it.")
    order: int = Field(1, ge=0, le=6, description="Symbols that the next one depends on.")
    share: float = Field(1.0, gt=0, le=1e6, description="Rows of this source to rows of the others.")
    concentration: float = Field(
        0.1,
        gt=0,
        le=1e6,
        description="Of the Dirichlet distribution of transitions: small is predictable, large is noise.",
    )


class MarkovConfig(Config):
    """Sequences of symbols from random Markov sources, all drawn from `data.seed`; each is `data.max_length` tokens."""

    symbols: int = Field(32, ge=2, le=4096, description="Symbols of the alphabet.")
    rows: Rows = Field(3000, description="Sequences, held-out ones included.")
    tagged: bool = Field(False, description="Begin every sequence with a token that names its source.")
    sources: tuple[MarkovSourceConfig, ...] = Field(
        (MarkovSourceConfig(name="main"),), min_length=1, max_length=64, description="The sources."
    )

    @classmethod
    def conflicts(cls, values: Mapping[str, Any]) -> list[str]:
        sources, symbols = values["sources"], values["symbols"]
        if not isinstance(sources, tuple | list) or not isinstance(symbols, int):
            return []
        parts = [source.model_dump() if isinstance(source, Config) else source for source in sources]
        if not all(isinstance(part, Mapping) for part in parts):
            return []  # told by the fields
        orders = {part.get("name"): part.get("order", 1) for part in parts}
        reasons = [
            f"source {name!r} has {symbols} symbols to the power of {order + 1} transitions, more than {_MOST}; lower "
            "symbols or its order"
            for name, order in orders.items()
            if isinstance(order, int) and 0 <= order <= 6 and symbols ** (order + 1) > _MOST
        ]
        if len(orders) < len(parts):
            reasons.append(
                f"sources have the names {', '.join(map(str, orders))}, some twice; each needs its own"
            )
        return reasons
