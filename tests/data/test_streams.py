"""Streams: the windows of a data set, gone on with from anywhere."""

from __future__ import annotations

import json
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch

from support import fetched
from tutelage.data import Data, DataError, open_data
from tutelage.data.streams import TokenStream, Window
from tutelage.recipe.schema import DataConfig


@pytest.fixture
def shards(parquet: Any, sentences: list[str]) -> Path:
    """260 documents in three files of unequal length, and a validation file."""
    path = Path()
    for number, (first, last) in enumerate([(0, 90), (90, 100), (100, 260)]):
        path = parquet(
            {"text": sentences[first:last], "other": [0] * (last - first)}, f"data/train-{number}.parquet"
        )
    parquet({"text": sentences[300:340], "other": [0] * 40}, "data/validation-0.parquet")
    return path.parent


def opened(path: Path, **options: Any) -> Data:
    settings: dict[str, Any] = {"validation": None, "tokenizer": {"train": 400}, "max_length": 64}
    settings |= {"stream": True, "window": 50, "epoch_rows": 40, "text": "text"}
    return open_data(DataConfig(path=str(path), **settings | options), "language-model")


def stream(path: Path, **options: Any) -> TokenStream:
    found = opened(path, **options).stream
    assert found is not None
    return found


def contents(window: Window) -> tuple[int, list[int], list[list[int]]]:
    batch = fetched(window.source, range(len(window.source)))
    return window.number, window.source.ids.tolist(), batch["input_ids"].tolist()


def test_windows_hold_every_document_and_the_data_begins_anew(shards: Path, sentences: list[str]) -> None:
    source = stream(shards)
    windows = list(islice(source.windows(), 13))
    assert [window.number for window in windows] == list(range(13))
    per_pass = 6  # 260 documents: five windows of 50 and one of 10
    tokens = sum(len(ids) + 1 for ids in source.tokenizer.encode(sentences[:260]))
    assert sum(window.source.tokens for window in windows[:per_pass]) == tokens
    ids = [row for window in windows[:per_pass] for row in window.source.ids.tolist()]
    assert ids == list(range(len(ids)))
    for number in range(13 - per_pass):
        assert contents(windows[number])[1:] == contents(windows[number + per_pass])[1:]


@pytest.mark.parametrize("options", [{}, {"validation": 30, "test": 7}, {"packing": "wrapped"}])
def test_a_stream_goes_on_from_any_window(shards: Path, options: dict[str, Any]) -> None:
    """Reading was ended in the middle of a window: a stream that is opened again goes on from what was written down."""
    straight = [contents(window) for window in islice(stream(shards, **options).windows(), 14)]
    states = [json.dumps(window.state) for window in islice(stream(shards, **options).windows(), 9)]
    for number, state in enumerate(states):
        again = stream(shards, **options).windows(json.loads(state))
        assert [contents(window) for window in islice(again, 5)] == straight[number : number + 5]


def test_two_readers_of_one_stream_do_not_meet(shards: Path) -> None:
    source = stream(shards)
    one, other = source.windows(), source.windows()
    straight = [contents(window) for window in islice(source.windows(), 8)]
    assert [contents(next(one)) for _ in range(3)] == straight[:3]
    assert [contents(next(other)) for _ in range(8)] == straight
    assert [contents(next(one)) for _ in range(5)] == straight[3:]


def test_held_out_documents_are_the_first_and_never_train(shards: Path, sentences: list[str]) -> None:
    data = opened(shards, validation=30, test=7, packing="none", max_length=512)
    assert data.stream is not None

    def texts(source: Any) -> set[str]:
        batch = fetched(source, range(len(source)))
        tokenizer = data.info.tokenizer
        assert tokenizer is not None
        return {tokenizer.decode(ids, special=False) for ids in batch["input_ids"].tolist()}

    assert texts(data.test) == set(sentences[:7])
    assert texts(data.validation) == set(sentences[7:37])
    windows = list(islice(data.stream.windows(), 5))
    assert set().union(*(texts(window.source) for window in windows)) == set(sentences[37:260])


def test_the_description_and_the_example_rows(shards: Path) -> None:
    data = opened(shards, validation="validation", evaluation_limit=5)
    described = json.loads(json.dumps(data.describe()))
    assert described["rows"] == {"train": 40, "validation": 5}
    assert data.stream is not None
    first = next(data.stream.windows())
    assert torch.equal(fetched(data.train, [0, 1])["input_ids"], fetched(first.source, [0, 1])["input_ids"])
    marks = {
        opened(shards, **options).describe()["fingerprint"]
        for options in (
            {},
            {"window": 51},
            {"max_length": 65},
            {"validation": 3},
            {"tokenizer": {"train": 401}},
        )
    }
    assert len(marks) == 5


def test_empty_documents_are_passed_over(parquet: Any, sentences: list[str]) -> None:
    path = parquet({"text": ["", *sentences[:50], *[""] * 30, *sentences[50:80]]})
    windows = list(islice(stream(path, window=20).windows(), 10))
    assert [window.number for window in windows] == list(range(10))
    assert contents(windows[5])[1:] == contents(windows[0])[1:]


def test_windows_in_which_nothing_is_learnt_are_passed_over(parquet: Any, sentences: list[str]) -> None:
    """Questions that fill a row, so that their answers are cut off."""
    long = " ".join(sentences[:40])
    questions = [long if 50 <= row < 100 else sentences[row] for row in range(150)]
    path = parquet({"question": questions, "answer": sentences[150:300]})
    source = stream(path, text=None, prompt="question", completion="answer")
    first, second = islice(source.windows(), 2)
    assert [first.number, second.number] == [0, 1]
    assert second.state["document"] == 100
    path = parquet({"question": [long] * 60, "answer": sentences[:60]}, "long/train.parquet").parent
    with pytest.raises(
        DataError, match=r"nothing that counts is in its first 64 tokens \(data\.max_length\)"
    ):
        stream(path, text=None, prompt="question", completion="answer")


def test_what_cannot_be_streamed_is_named(parquet: Any, shards: Path) -> None:
    with pytest.raises(
        DataError, match=r"data.validation: there is no split 'dev'; the data has train, validation"
    ):
        opened(shards, validation="dev")
    with pytest.raises(
        DataError, match=r"data.text: split 'train' has no column 'texts'.*did you mean 'text'"
    ):
        opened(shards, text="texts")
    with pytest.raises(DataError, match="row 1 of column 'text', split 'train', is missing"):
        opened(parquet({"text": ["some words here", None]}))
    with pytest.raises(DataError, match=r"the split 'train' .* has no documents after the first 900"):
        opened(shards, validation=900)
    late = parquet({"text": [f"document {row}" for row in range(60)] + [None]}, "late.parquet")
    with pytest.raises(DataError, match="row 60 of column 'text'"):
        list(islice(stream(late, validation=5, window=10, tokenizer=saved(shards)).windows(), 7))
    for twice in ({"validation": "train"}, {"validation": "validation", "test": "validation"}):
        with pytest.raises(DataError, match="is named twice among"):
            opened(shards, **twice)
    empty = parquet({"text": [""] * 30}, "empty.parquet")
    with pytest.raises(DataError, match="no text"):
        opened(empty, tokenizer=saved(shards))


def saved(shards: Path) -> str:
    folder = shards.parent / "tokenizer"
    found = opened(shards).info.tokenizer
    assert found is not None
    found.save(folder)
    return str(folder)
