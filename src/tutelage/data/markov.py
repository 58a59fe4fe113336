"""Random Markov languages, made on the spot: what a language model can be tried on without any download."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tutelage.data.documents import Documents
from tutelage.data.source import DataError, digest
from tutelage.data.splits import Rows
from tutelage.data.texts import text_columns
from tutelage.data.tokenizer import END_OF_TEXT, Tokenizer
from tutelage.data.tokens import TokenSource
from tutelage.recipe.markov import MarkovConfig, MarkovSourceConfig
from tutelage.recipe.schema import DataConfig

COLUMN = "source"
_LANGUAGE, _TEXT = 0, 1
"""Streams of random numbers: of transitions, and of sequences."""


class Markov:
    """Sequences of `data.max_length` tokens; one split, ``train``. The column ``source`` names each one's source, where
    `data.columns` asks for it.

    Raises:
        DataError: settings that choose columns, which these rows do not have, or another task.
    """

    class_names: tuple[str, ...] | None = None

    def __init__(self, config: DataConfig, task: str) -> None:
        if task != "language-model":
            raise DataError(f"`markov` is text for a language model; the task is {task}")
        if text_columns(config):
            raise DataError(
                f"`markov` makes its own text; leave out {', '.join(text_columns(config).values())}"
            )
        others = [name for name in config.columns if name != COLUMN]
        if others:
            raise DataError(
                f"`markov` has the column {COLUMN!r} alone; data.columns names {', '.join(others)}"
            )
        self.config, self.language = config, config.markov or MarkovConfig()
        self.sizes: Mapping[str, int] = {"train": self.language.rows}
        names = tuple(source.name for source in self.language.sources)
        self.names = names
        words = [f"s{number}" for number in range(self.language.symbols)]
        tags = [f"<{name}>" for name in names] if self.language.tagged else []
        self.tokenizer: Tokenizer = _word_tokenizer([*words, *tags])
        self.fingerprint = digest(
            ["markov", self.language.model_dump(mode="json"), config.seed, config.max_length]
        )

    @property
    def outputs(self) -> int:
        return self.tokenizer.size

    @property
    def scale(self) -> Tensor:
        return torch.ones(())

    def read(self, splits: Sequence[str], train: str) -> Markov:
        language, length = self.language, self.config.max_length
        self.source_of = _sources(language, self.config.seed)
        self.tokens = np.empty((language.rows, length), dtype=np.int32)
        first = int(language.tagged)
        for number, source in enumerate(language.sources):
            rows = np.flatnonzero(self.source_of == number)
            if language.tagged:
                self.tokens[rows, 0] = language.symbols + number
            generators = [_generator(self.config.seed, number, stream) for stream in (_LANGUAGE, _TEXT)]
            self.tokens[rows, first:] = _sequences(
                source, language.symbols, len(rows), length - first, *generators
            )
        return self

    def source(self, rows: Rows) -> TokenSource:
        length = self.config.max_length
        wanted = COLUMN in self.config.columns
        return TokenSource(
            Documents(
                self.tokens[rows.ids].reshape(-1), np.arange(len(rows.ids) + 1, dtype=np.int64) * length
            ),
            self.tokenizer,
            max_length=length,
            packing=self.config.packing,
            columns={COLUMN: torch.from_numpy(self.source_of[rows.ids])} if wanted else None,
            names={COLUMN: self.names} if wanted else None,
        )


def _word_tokenizer(words: Sequence[str]) -> Tokenizer:
    """A word is a token; the last one ends a text and fills rows up."""
    import transformers
    from tokenizers import Tokenizer as Backend
    from tokenizers import models, pre_tokenizers

    backend = Backend(
        models.WordLevel({word: place for place, word in enumerate([*words, END_OF_TEXT])}, END_OF_TEXT)
    )
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return Tokenizer(
        transformers.PreTrainedTokenizerFast(
            tokenizer_object=backend, eos_token=END_OF_TEXT, pad_token=END_OF_TEXT, unk_token=END_OF_TEXT
        )
    )


def _generator(seed: int, source: int, stream: int) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(np.random.SeedSequence([seed, source, stream])))


def _sources(language: MarkovConfig, seed: int) -> NDArray[np.int64]:
    """The source of each row, as many of each as its share says, in random order."""
    shares = np.array([source.share for source in language.sources])
    ends = np.round(np.cumsum(shares) / shares.sum() * language.rows).astype(np.int64)
    counts = np.diff(ends, prepend=0)
    return _generator(seed, len(shares), _TEXT).permutation(np.repeat(np.arange(len(shares)), counts))


def _sequences(
    source: MarkovSourceConfig,
    symbols: int,
    rows: int,
    length: int,
    transitions: np.random.Generator,
    text: np.random.Generator,
) -> NDArray[np.int32]:
    """Sequences ``[rows, length]``. The first symbols, which have fewer before them, are drawn alike."""
    table = transitions.dirichlet(np.full(symbols, source.concentration), size=symbols**source.order)
    heights = np.cumsum(table, axis=1)
    found = text.integers(symbols, size=(rows, length)).astype(np.int32)
    drawn = text.random((rows, length))
    powers = symbols ** np.arange(source.order - 1, -1, -1)
    for place in range(source.order, length):
        state = (
            found[:, place - source.order : place] @ powers
            if source.order
            else np.zeros(rows, dtype=np.int64)
        )
        below = drawn[:, place, None] * heights[state, -1:]
        found[:, place] = (heights[state] <= below).sum(1).clip(max=symbols - 1)
    return found
