"""Text that is read as it comes, in windows of documents."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

from tutelage.data.corpus import limited, make_documents, pack_documents
from tutelage.data.source import DataError, digest
from tutelage.data.tables import load_splits
from tutelage.data.texts import TextRows, choose_tokenizer, text_columns
from tutelage.data.tokenizer import OwnTokenizer, Tokenizer
from tutelage.data.tokens import TokenSource
from tutelage.recipe.schema import DataConfig

WINDOW = 10_000
"""Documents of a window where the recipe does not say."""


@dataclass(frozen=True)
class Window:
    """Documents of a stream that are packed together.

    Attributes:
        source: their rows. A row's id is its number since the data began; where the data begins anew, so do ids.
        number: of the window, over all passes through the data.
        state: plain JSON from which `TokenStream.windows` goes on with this very window.
    """

    source: TokenSource
    number: int
    state: dict[str, Any]


class TokenStream:
    """Windows of packed rows without end: after its last document the data begins anew.

    Windows, their rows and ids depend on the data and the recipe alone, not on where reading began.

    Args:
        rows: an IterableDataset, without the documents that are held out.
        skipped: how many those are, at the start of the split.
        split: its name, for messages.
        fingerprint: sha256 of what the data is.

    Attributes:
        epoch_rows: rows that count as an epoch.
        fingerprint, packing_fingerprint: sha256 of what a row's id stands for.
    """

    def __init__(
        self,
        rows: Any,
        tokenizer: Tokenizer,
        config: DataConfig,
        *,
        split: str,
        fingerprint: str,
        skipped: int = 0,
    ) -> None:
        if config.epoch_rows is None:
            raise DataError("data.epoch_rows is not set: how many rows of the stream count as an epoch?")
        self.rows, self.tokenizer, self.config = rows, tokenizer, config
        self.skipped, self.split = skipped, split
        self.epoch_rows = config.epoch_rows
        self.fields = frozenset({"target", "index", "mask"})
        self.fingerprint = self.packing_fingerprint = digest(
            [
                ["stream", fingerprint, split, skipped, text_columns(config)],
                [config.max_length, config.packing, _window(config)],
                [tokenizer.fingerprint, tokenizer.fast.chat_template],
            ]
        )

    def windows(self, state: Mapping[str, Any] | None = None) -> Iterator[Window]:
        """Windows from the first on, or from the one whose ``state`` is given.

        Raises:
            DataError: a document that cannot be read, or a whole pass in which nothing is learnt.
        """
        at = dict(state) if state is not None else _pass(0)
        while True:
            # A copy of the reader: where it is in the data is state of its own.
            rows = self.rows.select_columns(list(text_columns(self.config)))
            if at["reader"] is not None:
                rows.load_state_dict(at["reader"])
            reader = iter(rows)
            while found := list(islice(reader, _window(self.config))):
                source = self._source(found, at)
                if source is not None:
                    yield Window(source, at["number"], at)
                at = {
                    "number": at["number"] + (source is not None),
                    "document": at["document"] + len(found),
                    "row": at["row"] + (0 if source is None else len(source)),
                    "reader": rows.state_dict(),
                }
            if at["row"] == 0:
                raise DataError(
                    f"the split {self.split!r} of {self.config.path} has no text to train on; every document is empty, "
                    f"or nothing that counts is in its first {self.config.max_length} tokens (data.max_length)"
                )
            at = _pass(at["number"])

    def _source(self, found: list[dict[str, Any]], at: Mapping[str, Any]) -> TokenSource | None:
        """Rows of some documents; None where nothing in these is learnt."""
        rows = _text_rows(found, self.config, self.skipped + at["document"], self.split)
        documents = make_documents(rows, self.tokenizer, self.config)
        if not documents.teach(self.config.max_length):
            return None
        return pack_documents(documents, self.tokenizer, self.config, first_id=at["row"])


def _pass(number: int) -> dict[str, Any]:
    """The state at the start of the data, with window ``number``."""
    return {"number": number, "document": 0, "row": 0, "reader": None}


def _window(config: DataConfig) -> int:
    return config.window or WINDOW


def _text_rows(found: Sequence[Mapping[str, Any]], config: DataConfig, first: int, split: str) -> TextRows:
    columns = {name: [row.get(name) for row in found] for name in text_columns(config)}
    return TextRows(columns, range(first, first + len(found)), split)


class StreamedCorpus:
    """A data set that is read as it comes: a stream to train on, and held-out documents in memory.

    Args:
        own: the student's tokeniser, for a recipe that names none. One that the recipe asks to train is trained on the
            first window.

    Raises:
        DataError: as `tutelage.data.tables.load_splits`; a split or column that is not there.
    """

    def __init__(self, config: DataConfig, own: OwnTokenizer | None) -> None:
        self.config = config
        self.splits, self.fingerprint = load_splits(config, streaming=True)
        self._refuse_unknown(config.train, "data.train")
        self.held: dict[str, TextRows] = {}
        skipped = 0
        for part, wanted in self._parts().items():
            if isinstance(wanted, str):
                self._refuse_unknown(wanted, f"data.{part}")
                self.held[part] = self._text_rows(wanted, 0, None)
                continue
            self.held[part] = self._text_rows(config.train, skipped, wanted)
            skipped += wanted
        self.tokenizer = choose_tokenizer(
            config, own, lambda: self._text_rows(config.train, skipped, _window(config))
        )
        self.train = TokenStream(
            self.splits[config.train].skip(skipped),
            self.tokenizer,
            config,
            split=config.train,
            fingerprint=self.fingerprint,
            skipped=skipped,
        )

    def source(self, part: str) -> TokenSource | None:
        """The held-out rows of a part, where it has any."""
        if part not in self.held:
            return None
        rows = self.held[part]
        documents = make_documents(rows, self.tokenizer, self.config)
        return limited(pack_documents(documents, self.tokenizer, self.config), part, rows.split, self.config)

    def _parts(self) -> dict[str, str | int]:
        """The split, or the number of documents, of each held-out part that there is."""
        config, test = self.config, self.config.test
        if test is None and "test" in self.splits and "test" not in (config.train, config.validation):
            test = "test"
        wanted = {"test": test, "validation": config.validation}
        found = {part: value for part, value in wanted.items() if isinstance(value, str | int)}
        named = [config.train, *(value for value in found.values() if isinstance(value, str))]
        twice = [name for name in named if named.count(name) > 1]
        if twice:
            raise DataError(
                f"the split {twice[0]!r} is named twice among data.train, data.validation and data.test; name others, "
                "or give a number of documents to hold out"
            )
        return found

    def _text_rows(self, split: str, first: int, count: int | None) -> TextRows:
        """Documents of a split from ``first`` on: ``count``, or as many as there are; all where that is None."""
        rows = self.splits[split].skip(first).select_columns(list(text_columns(self.config)))
        found = list(islice(rows, count))
        if not found:
            raise DataError(
                f"the split {split!r} of {self.config.path} has no documents after the first {first}"
            )
        return _text_rows(found, self.config, first, split)

    def _refuse_unknown(self, split: str, where: str) -> None:
        if split not in self.splits:
            raise DataError(f"{where}: there is no split {split!r}; the data has {', '.join(self.splits)}")
        rows = self.splits[split]
        for name, field in text_columns(self.config).items():
            if rows.features is not None and name not in rows.features:
                near = difflib.get_close_matches(name, rows.features, n=1)
                hint = f"; did you mean {near[0]!r}?" if near else ""
                raise DataError(
                    f"{field}: split {split!r} has no column {name!r}; there are {', '.join(rows.features)}{hint}"
                )
