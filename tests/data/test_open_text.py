"""open_data of text for language models: which documents train, which rows are kept, what is said of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from support import fetched
from tutelage.data import Data, DataError, open_data
from tutelage.data.texts import entries
from tutelage.data.tokenizer import OwnTokenizer, Tokenizer
from tutelage.data.tokens import TokenSource
from tutelage.engine.loading import Loader, ShuffleSampler
from tutelage.recipe.schema import DataConfig


def opened(path: Path, own: OwnTokenizer | None = None, task: str = "language-model", **options: Any) -> Data:
    settings: dict[str, Any] = {"text": "text", "max_length": 64}
    if own is None:
        settings["tokenizer"] = {"train": 400}
    return open_data(DataConfig(path=str(path), **settings | options), task, own)


def rows_of(data: Data) -> TokenSource:
    assert isinstance(data.train, TokenSource)
    return data.train


@pytest.fixture
def book(parquet: Any, sentences: list[str]) -> Path:
    kinds = ["prose", "verse"]
    path: Path = parquet({"text": sentences[:300], "kind": [kinds[n % 2] for n in range(300)]})
    return path


@pytest.mark.parametrize("ids", [[3, 0, 8, 4, 4], [], [8], list(range(9))])
def test_entries_come_from_their_chunks_in_the_order_asked_for(ids: list[int]) -> None:
    """Each chunk is read by itself, since together they may hold more text than arrow can join."""
    arrow = pytest.importorskip("pyarrow")
    column = arrow.chunked_array([["a", "b", "c"], [], ["d"], ["e", "f", "g", None, "i"]], arrow.string())
    wanted = [["a", "b", "c", "d", "e", "f", "g", None, "i"][row] for row in ids]
    assert entries(column, np.array(ids, dtype=np.int64)) == wanted


def texts(data: Data, source: Any) -> set[str]:
    """Documents of a source in which each has a row."""
    assert data.info.tokenizer is not None
    ids = fetched(source, range(len(source)))["input_ids"].tolist()
    return {data.info.tokenizer.decode(row, special=False) for row in ids}


def test_documents_are_held_out_before_they_are_packed(book: Path, sentences: list[str]) -> None:
    data = opened(book, packing="none", max_length=512, validation=0.1, test=20)
    found = [texts(data, source) for source in (data.train, data.validation, data.test)]
    assert [len(part) for part in found] == [250, 30, 20]
    assert set.union(*found) == set(sentences[:300])
    packed = opened(book, validation=0.1, test=20)
    assert len(packed.train) < 250
    assert rows_of(packed).ids.tolist() == list(range(len(packed.train)))


def test_limits_count_packed_rows_and_a_larger_one_keeps_the_same(book: Path) -> None:
    whole = opened(book)
    few, more = opened(book, limit=10, evaluation_limit=2), opened(book, limit=30, evaluation_limit=10_000)
    assert (len(few.train), len(few.validation or [])) == (10, 2)
    assert len(more.validation or []) == len(whole.validation or [])
    ids = [set(rows_of(data).ids.tolist()) for data in (few, more, whole)]
    assert ids[0] < ids[1] < ids[2]
    assert sorted(ids[0]) != list(range(10))
    row = int(rows_of(few).ids[3])
    assert torch.equal(fetched(few.train, [3])["input_ids"], fetched(whole.train, [row])["input_ids"])
    assert rows_of(few).packing_fingerprint == rows_of(whole).packing_fingerprint
    with pytest.raises(
        DataError, match=r"data\.limit is 99999, but the training text fills \d+ rows of 64 tokens"
    ):
        opened(book, limit=99_999)


def test_the_description_counts_tokens(book: Path) -> None:
    data = opened(book)
    described = json.loads(json.dumps(data.describe()))
    tokenizer = data.info.tokenizer
    assert tokenizer is not None
    assert described["tokenizer"] == tokenizer.fingerprint
    filled = sum(int(rows_of(data).row_lengths[row]) for row in range(len(data.train)))
    assert described["tokens"]["train"] == filled
    assert described["fill"]["train"] == pytest.approx(filled / (64 * len(data.train)), abs=1e-4)
    assert (data.info.outputs, data.info.input_shape, data.info.mean) == (400, (64,), None)
    cut = opened(book, packing="none").describe()["lost_tokens"]["train"]
    assert cut + opened(book, packing="none").describe()["tokens"]["train"] == filled


def test_rows_of_one_kind(book: Path) -> None:
    data = opened(book, columns=("kind",))
    batch = fetched(data.train, range(len(data.train)))
    assert set(batch["kind"].tolist()) == {0, 1}
    assert rows_of(data).names == {"kind": ("prose", "verse")}


def test_the_students_own_tokeniser_reads_where_the_recipe_names_none(
    book: Path, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    tokenizer.save(tmp_path / "student")
    data = opened(book, OwnTokenizer(str(tmp_path / "student")))
    assert data.info.tokenizer is not None
    assert data.info.tokenizer.fingerprint == tokenizer.fingerprint
    assert opened(book, OwnTokenizer("nobody/nothing"), tokenizer={"train": 300}).info.outputs == 300
    with pytest.raises(DataError, match=r"the student brings none: set data\.tokenizer"):
        open_data(DataConfig(path=str(book), text="text"), "language-model")


def test_its_revision_and_trust_reach_the_students_own_tokeniser_alone(
    book: Path, tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def from_pretrained(place: str, **options: Any) -> Any:
        asked.append((place, options))
        return tokenizer.fast

    monkeypatch.setattr("transformers.AutoTokenizer.from_pretrained", from_pretrained)
    own = OwnTokenizer("someone/student", "v2", trust_remote_code=True)
    opened(book, own)
    opened(book, own, tokenizer="someone/else")
    stream: dict[str, Any] = {"stream": True, "epoch_rows": 4, "validation": 4}
    opened(book, own, **stream)
    trusted = {"revision": "v2", "trust_remote_code": True}
    assert asked == [
        ("someone/student", trusted),
        ("someone/else", {"revision": None, "trust_remote_code": False}),
        ("someone/student", trusted),
    ]


def test_the_tokeniser_is_trained_on_training_rows_alone(parquet: Any, sentences: list[str]) -> None:
    parquet({"text": sentences[:200]}, "one/train-0.parquet")
    parquet({"text": sentences[200:210]}, "one/test-0.parquet")
    parquet({"text": sentences[:200]}, "other/train-0.parquet")
    path = parquet({"text": ["zebra " * 400]}, "other/test-0.parquet")
    marks = [opened(path.parent.parent / name).describe()["tokenizer"] for name in ("one", "other")]
    assert marks[0] == marks[1]


@pytest.mark.parametrize(
    ("options", "task", "said"),
    [
        ({"text": "words"}, "language-model", "data.text: split 'train' of .* has no column 'words'"),
        ({"text": None, "tokenizer": None}, "language-model", "language-model needs text: set data.text"),
        ({"text": ("text", "kind")}, "language-model", "names a pair of columns, text, kind"),
        (
            {"target": "kind"},
            "language-model",
            "data.target is 'kind', but language-model learns the text itself",
        ),
        ({"text": None, "messages": "text"}, "classification", "data.messages are for language-model"),
        ({"label_noise": 0.1}, "language-model", "the task is language-model: leave it out"),
        ({"imbalance": {"ratio": 2}}, "language-model", "data.imbalance needs class ids"),
        (
            {"stream": True, "epoch_rows": 5, "validation": None},
            "classification",
            "data.stream is for language-model",
        ),
        ({"text": None, "tokenizer": None}, "token-classification", "needs data.text, the column with lists"),
    ],
)
def test_what_does_not_fit_the_task(book: Path, options: dict[str, Any], task: str, said: str) -> None:
    with pytest.raises(DataError, match=said):
        opened(book, task=task, **options)


@pytest.mark.parametrize(
    ("task", "options"),
    [
        ("classification", {}),
        ("language-model", {"stream": True, "epoch_rows": 5, "validation": None}),
    ],
)
def test_digits_are_no_text(task: str, options: dict[str, Any]) -> None:
    with pytest.raises(DataError, match=r"data\.text is 'text', but `digits` is 8×8 images"):
        open_data(DataConfig(path="digits", text="text", **options), task)


def test_json_lines_are_read(sentences: list[str], tmp_path: Path) -> None:
    lines = [json.dumps({"text": text}) for text in sentences[:100]]
    (tmp_path / "rows.jsonl").write_text("\n".join(lines))
    assert len(opened(tmp_path / "rows.jsonl", packing="none").train) == 90


def test_shakespeare_in_packed_rows(data_root: Path) -> None:
    config = DataConfig(
        path=str(data_root / "tiny_shakespeare"),
        text="text",
        validation="validation",
        tokenizer={"train": 2048},
        max_length=128,
    )
    data = open_data(config, "language-model")
    described = data.describe()
    assert described["tokens"]["train"] > 300_000
    assert min(described["fill"].values()) > 0.99
    loader = Loader(data.train, ShuffleSampler(len(data.train), 0), batch_size=8)
    batch = next(loader.steps(5))[0]
    assert batch.target is not None
    assert batch.target.shape == (8, 128)
