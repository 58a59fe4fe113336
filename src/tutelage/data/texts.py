"""Columns with text, and the tokeniser that reads them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tutelage.data.source import DataError
from tutelage.data.splits import Rows
from tutelage.data.tables import ReadColumns, Tables
from tutelage.data.tokenizer import OwnTokenizer, Tokenizer, load_tokenizer, train_tokenizer
from tutelage.recipe.schema import DataConfig
from tutelage.recipe.tokens import TrainedTokenizerConfig

Chat = list[dict[str, str]]


@dataclass(frozen=True)
class TextRows:
    """Text columns of some rows.

    Attributes:
        columns: entries by column.
        ids: of the rows, for messages.
        split: theirs.
    """

    columns: Mapping[str, list[Any]]
    ids: Sequence[int]
    split: str

    def fault(self, position: int, column: str, what: str) -> DataError:
        return DataError(f"row {self.ids[position]} of column {column!r}, split {self.split!r}, {what}")

    def texts(self, column: str) -> list[str]:
        """Entries that are text.

        Raises:
            DataError: one that is missing or something else.
        """
        entries = self.columns[column]
        for position, entry in enumerate(entries):
            if not isinstance(entry, str):
                raise self.fault(position, column, f"is {_shown(entry)}; allowed: text")
        return entries

    def words(self, column: str) -> list[list[str]]:
        """Entries that are lists of words.

        Raises:
            DataError: one that is something else, or has no word.
        """
        entries = self.columns[column]
        for position, entry in enumerate(entries):
            if not isinstance(entry, list) or not entry or not all(isinstance(word, str) for word in entry):
                raise self.fault(position, column, f"is {_shown(entry)}; allowed: a list of words")
        return entries

    def chats(self, column: str) -> list[Chat]:
        """Entries that are chats; fields without a value are left out of a turn. Parquet gives every turn the fields of
        all of them, and templates ask which ones are there.

        Raises:
            DataError: one that is no list of {role, content}, or in which the assistant says nothing.
        """
        for position, entry in enumerate(self.columns[column]):
            if not isinstance(entry, list) or not entry or not all(map(_is_turn, entry)):
                raise self.fault(
                    position, column, f"is {_shown(entry)}; allowed: a list of {{role, content}}"
                )
            roles = {turn["role"] for turn in entry}
            if "assistant" not in roles:
                said = ", ".join(sorted(roles))
                raise self.fault(position, column, f"has no turn of the role `assistant`; it has {said}")
        return [
            [{name: value for name, value in turn.items() if value is not None} for turn in entry]
            for entry in self.columns[column]
        ]


def _is_turn(turn: Any) -> bool:
    return isinstance(turn, Mapping) and all(isinstance(turn.get(key), str) for key in ("role", "content"))


def _shown(entry: Any) -> str:
    return "missing" if entry is None else f"{str(entry)[:60]!r}"


def text_columns(config: DataConfig) -> dict[str, str]:
    """The field of the recipe that names each column with text."""
    if isinstance(config.text, tuple):
        return dict.fromkeys(config.text, "data.text")
    named = {name: getattr(config, name) for name in ("text", "messages", "prompt", "completion")}
    return {column: f"data.{name}" for name, column in named.items() if column is not None}


def check_text(config: DataConfig, task: str) -> None:
    """Refuse text fields that do not go with the task.

    Raises:
        DataError: what the task needs, or cannot use.
    """
    columns = text_columns(config)
    if task == "language-model":
        if not columns:
            raise DataError(
                "language-model needs text: set data.text, data.messages, or data.prompt and data.completion"
            )
        if config.target is not None:
            raise DataError(
                f"data.target is {config.target!r}, but language-model learns the text itself; leave it out"
            )
    elif config.stream:
        raise DataError(f"data.stream is for language-model; the task is {task}: leave it out")
    elif config.messages is not None or config.prompt is not None:
        raise DataError(
            f"{' and '.join(columns.values())} are for language-model; the task {task} reads data.text"
        )
    if task == "token-classification" and config.text is None:
        raise DataError("token-classification needs data.text, the column with lists of words")
    if task in ("language-model", "token-classification") and isinstance(config.text, tuple):
        raise DataError(
            f"data.text names a pair of columns, {', '.join(config.text)}; the task {task} has one"
        )


def choose_tokenizer(
    config: DataConfig, own: OwnTokenizer | None, training: Callable[[], TextRows]
) -> Tokenizer:
    """The tokeniser that the recipe names, else the student's ``own``; with the recipe's chat template. ``training``
    reads the rows on which it is trained where the recipe asks for that.

    Raises:
        DataError: none is named, or it cannot be had.
    """
    named = config.tokenizer if config.tokenizer is not None else own
    if named is None:
        raise DataError(
            "text needs a tokeniser, and the student brings none: set data.tokenizer to a hub name, a folder, "
            "or {train: 8192}"
        )
    if isinstance(named, TrainedTokenizerConfig):
        found = train_tokenizer(_all_texts(training(), config), named.train)
    else:
        found = load_tokenizer(*(OwnTokenizer(named) if isinstance(named, str) else named))
    if config.chat_template is not None:
        file = Path(config.chat_template).expanduser()
        if not file.is_file():
            raise DataError(f"data.chat_template: there is no file {config.chat_template!r}")
        found.fast.chat_template = file.read_text(encoding="utf-8")
    return found


def _all_texts(rows: TextRows, config: DataConfig) -> Iterator[str]:
    """Whatever is text in some rows."""
    for column in text_columns(config):
        if column == config.messages:
            yield from (turn["content"] for chat in rows.chats(column) for turn in chat)
        elif rows.columns[column] and isinstance(rows.columns[column][0], list):
            yield from map(" ".join, rows.words(column))
        else:
            yield from rows.texts(column)


class ReadText(ReadColumns):
    """Text columns of some splits, and their tokeniser."""

    def __init__(self, tables: Tables, chosen: Mapping[str, Rows], own: OwnTokenizer | None) -> None:
        train = chosen["train"]
        super().__init__(tables, [rows.split for rows in chosen.values()], train.split)
        for column, where in text_columns(self.config).items():
            for split in self.names:
                self._refuse_unknown(column, where, tables.splits[split].features, split)
        self.tokenizer: Tokenizer = choose_tokenizer(self.config, own, lambda: self.text_rows(train))

    def text_rows(self, rows: Rows) -> TextRows:
        table = self.tables.splits[rows.split].select_columns(list(text_columns(self.config)))
        found = table.with_format("arrow")[:]
        columns = {name: entries(found[name], rows.ids) for name in found.column_names}
        return TextRows(columns, rows.ids.tolist(), rows.split)


def entries(column: Any, ids: NDArray[np.int64]) -> list[Any]:
    """Entries of a chunked column by row, chunk by chunk: arrow joins no more than 2 GiB of text."""
    order = np.argsort(ids, kind="stable")
    begins = np.cumsum([0, *map(len, column.chunks)])
    bounds = np.searchsorted(ids[order], begins)
    found: list[Any] = [None] * len(ids)
    for chunk, begin, (low, high) in zip(column.chunks, begins[:-1], pairwise(bounds), strict=True):
        places = order[low:high]
        for place, value in zip(places.tolist(), chunk.take(ids[places] - begin).to_pylist(), strict=True):
            found[place] = value
    return found
