"""Text columns as packed rows for language models."""

from __future__ import annotations

from typing import Any

import numpy as np

from tutelage.data.chats import chat_documents, completion_documents
from tutelage.data.documents import Documents
from tutelage.data.source import DataError
from tutelage.data.splits import Rows, permutation
from tutelage.data.texts import ReadText, TextRows
from tutelage.data.tokenizer import Tokenizer
from tutelage.data.tokens import TokenSource
from tutelage.recipe.schema import DataConfig


class ReadCorpus(ReadText):
    """Text of some splits; a source of it is packed."""

    class_names: tuple[str, ...] | None = None

    @property
    def outputs(self) -> int:
        return self.tokenizer.size

    def source(self, rows: Rows) -> TokenSource:
        documents = make_documents(self.text_rows(rows), self.tokenizer, self.config)
        return pack_documents(documents, self.tokenizer, self.config, **self.travelling_of(rows))


def pack_documents(
    documents: Documents, tokenizer: Tokenizer, config: DataConfig, **more: Any
) -> TokenSource:
    """Documents in rows as the recipe has them; ``more`` is handed to `TokenSource`."""
    return TokenSource(documents, tokenizer, max_length=config.max_length, packing=config.packing, **more)


def make_documents(rows: TextRows, tokenizer: Tokenizer, config: DataConfig) -> Documents:
    """What the recipe's text columns become."""
    if config.messages is not None:
        return chat_documents(rows, config.messages, tokenizer)
    if config.prompt is not None:
        assert config.completion is not None
        return completion_documents(rows, config.prompt, config.completion, tokenizer)
    assert isinstance(config.text, str)
    return text_documents(rows, config.text, tokenizer)


def text_documents(rows: TextRows, column: str, tokenizer: Tokenizer) -> Documents:
    """Raw texts, each with the end-of-text token behind it; an empty text is an empty document."""
    texts = rows.texts(column)
    end = np.asarray([tokenizer.eos_id], dtype=np.int32)
    found = []
    for text, ids in zip(texts, tokenizer.encode(texts), strict=True):
        ended = len(ids) > 0 and ids[-1] == end[0]
        found.append(ids[:0] if not text else ids if ended else np.concatenate([ids, end]))
    return Documents.of(found)


def limited(source: TokenSource, part: str, split: str, config: DataConfig) -> TokenSource:
    """The rows that ``data.limit`` (of ``train``) or ``data.evaluation_limit`` keeps: the first of a seeded permutation
    of all packed rows.

    Raises:
        DataError: fewer training rows than ``data.limit``.
    """
    limit = config.limit if part == "train" else config.evaluation_limit
    if limit is None or (limit >= len(source) and part != "train"):
        return source
    if limit > len(source):
        raise DataError(
            f"data.limit is {limit}, but the training text fills {len(source)} rows of {config.max_length} tokens"
        )
    return source.keep(np.sort(permutation(len(source), config.seed, split)[:limit]))
