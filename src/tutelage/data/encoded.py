"""Text for encoders: a label a row, or a tag a word."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tutelage.data.columns import ListColumn, class_ids
from tutelage.data.ragged import ranges, spread
from tutelage.data.source import ArraySource, DataError, digest, tensor_digest
from tutelage.data.splits import Rows
from tutelage.data.tables import Tables
from tutelage.data.texts import ReadText
from tutelage.data.tokenizer import OwnTokenizer
from tutelage.data.tokens import IGNORED
from tutelage.engine.types import Batch, Inputs

_TAGS = ("ner_tags", "pos_tags", "tags", "labels")


class EncodedSource(ArraySource):
    """Texts as an encoder's keywords: ``input_ids`` and ``attention_mask``, and ``token_type_ids`` where the tokeniser
    makes them, ``[rows, length]`` int64, padded on the right to the longest row of the batch.

    Args:
        inputs: by keyword, a row's values each.
        pad_id: fills ``input_ids``; the others are filled with 0.
        shared: as `ArraySource` takes it.
    """

    constant = False

    def __init__(self, inputs: Mapping[str, Sequence[NDArray[np.int32]]], pad_id: int, **shared: Any) -> None:
        super().__init__(**shared)
        lengths = [len(row) for row in inputs["input_ids"]]
        self.offsets = np.cumsum([0, *lengths], dtype=np.int64)
        self.flat = {name: np.concatenate(rows) for name, rows in inputs.items()}
        self.pad_id = pad_id

    def inputs(self, rows: Tensor) -> Inputs:
        here, places = self._places(rows)
        fillers = {"input_ids": self.pad_id}
        found = {
            name: spread(values[here], places, fillers.get(name, 0)) for name, values in self.flat.items()
        }
        return {**found, "attention_mask": torch.from_numpy(places.astype(np.int64))}

    def _places(self, rows: Tensor) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
        """Positions of the rows' tokens, and which places ``[rows, longest]`` they fill."""
        first = self.offsets[rows.numpy()]
        lengths = self.offsets[rows.numpy() + 1] - first
        return ranges(first, lengths), np.arange(lengths.max()) < lengths[:, None]


class TaggedSource(EncodedSource):
    """As `EncodedSource`, with a class id at the first piece of each word: ``target`` ``[rows, length]`` int64, -100
    elsewhere, and ``mask``, True where there is one.

    Args:
        tags: a row's class ids each, one a token, -100 where none.
    """

    def __init__(
        self,
        inputs: Mapping[str, Sequence[NDArray[np.int32]]],
        tags: Sequence[NDArray[np.int64]],
        pad_id: int,
        **shared: Any,
    ) -> None:
        super().__init__(inputs, pad_id, target=None, **shared)
        self.tags = np.concatenate(tags)
        self.fields |= {"target", "mask"}

    def fetch(self, positions: Sequence[int]) -> Batch:
        here, places = self._places(torch.as_tensor(positions, dtype=torch.int64))
        target = spread(self.tags[here], places, IGNORED)
        return super().fetch(positions).replace(target=target, mask=target != IGNORED)


class ReadEncoded(ReadText):
    """Texts, or pairs of texts, and their targets."""

    def __init__(self, tables: Tables, chosen: Mapping[str, Rows], own: OwnTokenizer | None) -> None:
        super().__init__(tables, chosen, own)
        self.outputs, self.class_names, self.targets = self._targets(chosen["train"].split)

    def source(self, rows: Rows) -> EncodedSource:
        text, config = self.text_rows(rows), self.config
        columns = (config.text,) if isinstance(config.text, str) else config.text
        assert columns is not None
        sides = [text.texts(column) for column in columns]
        inputs = self.tokenizer.encode_inputs(
            sides[0], sides[1] if len(sides) == 2 else None, config.max_length
        )
        target = self.targets[rows.split]
        return EncodedSource(
            inputs,
            self.tokenizer.pad_id,
            index=torch.from_numpy(rows.ids),
            target=target[torch.from_numpy(rows.ids)],
            fingerprint=self._mark(rows, target),
            **self.travelling_of(rows),
        )

    def _mark(self, rows: Rows, target: Tensor) -> str:
        """The fingerprint of some rows."""
        config = self.config
        return digest(
            [
                [
                    self.tables.fingerprint,
                    rows.split,
                    tensor_digest(torch.from_numpy(rows.ids)),
                    self.tables.task,
                ],
                [config.text, config.target, config.columns, config.max_length, self.tokenizer.fingerprint],
                [tensor_digest(target), self.class_names],
            ]
        )


class ReadTagged(ReadEncoded):
    """Lists of words, and the tag of each word."""

    def _targets(self, train: str) -> tuple[int, tuple[str, ...] | None, dict[str, Tensor]]:
        """Classes, their names, and the tags of all words by split, one row after the other."""
        wanted = self.config.target if self.config.target is not None else self._tag_column()
        if not isinstance(wanted, str):
            raise DataError(f"token-classification has one column of tags; data.target names {len(wanted)}")
        columns = {split: self._tags(split, wanted) for split in self.names}
        self.offsets = {split: column.offsets for split, column in columns.items()}
        labels = class_ids(columns, train)
        return labels.classes, labels.names, labels.ids

    def _tag_column(self) -> str:
        import datasets

        found: list[str] = [
            name
            for name, kind in self.features.items()
            if isinstance(getattr(kind, "feature", None), datasets.ClassLabel)
        ]
        found = found if len(found) == 1 else [name for name in self.features if name in _TAGS]
        if len(found) != 1:
            raise DataError(
                f"set data.target to the column with the words' tags; columns: {', '.join(self.features)}"
            )
        return found[0]

    def _tags(self, split: str, name: str) -> ListColumn:
        import pyarrow as pa

        column = self._column(split, name, "data.target")
        if not (pa.types.is_list(column.values.type) or pa.types.is_large_list(column.values.type)):
            raise DataError(
                f"data.target: column {name!r} of split {split!r} holds {column.values.type}, not a list of tags a row"
            )
        column.refuse_missing()
        lists = column.values.combine_chunks()
        lengths = lists.value_lengths().to_numpy(zero_copy_only=False)
        inside = getattr(self.tables.splits[split].features[name], "feature", None)
        names = getattr(inside, "names", None)
        return ListColumn(
            name,
            split,
            pa.chunked_array([lists.flatten()]),
            tuple(names) if names else None,
            np.cumsum([0, *lengths], dtype=np.int64),
        )

    def source(self, rows: Rows) -> TaggedSource:
        assert isinstance(self.config.text, str)
        text = self.text_rows(rows)
        words = text.words(self.config.text)
        offsets, tags = self.offsets[rows.split], self.targets[rows.split].numpy()
        lengths = np.diff(offsets)[rows.ids]
        for position, (row, length) in enumerate(zip(words, lengths.tolist(), strict=True)):
            if len(row) != length:
                raise text.fault(position, self.config.text, f"has {len(row)} words and {length} tags")
        inputs, first = self.tokenizer.encode_words(words, self.config.max_length)
        targets = [
            np.where(word >= 0, tags[offset + np.maximum(word, 0)], IGNORED)
            for word, offset in zip(first, offsets[rows.ids].tolist(), strict=True)
        ]
        return TaggedSource(
            inputs,
            targets,
            self.tokenizer.pad_id,
            index=torch.from_numpy(rows.ids),
            fingerprint=self._mark(rows, self.targets[rows.split]),
            **self.travelling_of(rows),
        )
