"""Text for encoders: labels of texts and pairs, tags of words."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from support import fetched
from tutelage.data import Data, DataError, open_data, targets
from tutelage.data.encoded import TaggedSource
from tutelage.recipe.schema import DataConfig


@pytest.fixture
def pieces(tmp_path: Path) -> str:
    """A small BERT tokeniser: lower case, word pieces, types for pairs."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import BertTokenizerFast

    words = ["[PAD]", "[CLS]", "[SEP]", "[UNK]", "a", "cat", "dog", "sat", "on", "mat", "##s", "the", "."]
    backend = Tokenizer(models.WordPiece({word: n for n, word in enumerate(words)}, unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer()
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.post_processor = processors.BertProcessing(("[SEP]", 2), ("[CLS]", 1))
    BertTokenizerFast(tokenizer_object=backend).save_pretrained(tmp_path / "pieces")
    return str(tmp_path / "pieces")


def opened(path: Path, task: str = "classification", **options: Any) -> Data:
    return open_data(DataConfig(path=str(path), validation=None, **options), task)


def test_texts_are_padded_to_the_longest_of_the_batch(parquet: Any, pieces: str) -> None:
    path = parquet({"text": ["the cats", "a dog sat on the mat.", "."], "label": ["x", "y", "x"]})
    data = opened(path, text="text", tokenizer=pieces)
    batch = fetched(data.train, [0, 2])
    assert {name: batch[name].tolist() for name in ("input_ids", "token_type_ids", "attention_mask")} == {
        "input_ids": [[1, 11, 5, 10, 2], [1, 12, 2, 0, 0]],
        "token_type_ids": [[0] * 5, [0] * 5],
        "attention_mask": [[1] * 5, [1, 1, 1, 0, 0]],
    }
    assert batch["target"].tolist() == [0, 0]
    assert batch["index"].tolist() == [0, 2]
    assert (data.info.outputs, data.info.class_names, data.info.input_shape) == (2, ["x", "y"], ())
    assert data.info.tokenizer is not None
    assert data.describe()["tokenizer"] == data.info.tokenizer.fingerprint


def test_pairs_have_types_and_are_cut_where_they_are_too_long(parquet: Any, pieces: str) -> None:
    path = parquet({"one": ["the cat", "a cat"], "two": ["sat", "on the mat on the mat"], "label": [0, 1]})
    data = opened(path, text=("one", "two"), tokenizer=pieces, max_length=8)
    batch = fetched(data.train, [0, 1])
    assert batch["input_ids"].tolist() == [[1, 11, 5, 2, 7, 2, 0, 0], [1, 4, 5, 2, 8, 11, 9, 2]]
    assert batch["token_type_ids"].tolist() == [[0, 0, 0, 0, 1, 1, 0, 0], [0, 0, 0, 0, 1, 1, 1, 1]]
    assert batch["attention_mask"].sum(1).tolist() == [6, 8]


def test_columns_numbers_and_wrong_labels_travel_as_with_other_rows(parquet: Any, pieces: str) -> None:
    columns = {"text": ["a cat"] * 40, "label": [0, 1] * 20, "domain": ["web", "book"] * 20}
    path = parquet({**columns, "score": [row / 10 for row in range(40)]})
    data = opened(path, text="text", tokenizer=pieces, target="label", columns=("domain",), label_noise=0.5)
    assert data.train.fetch([0, 1]).columns["domain"].tolist() == [1, 0]
    assert 5 < int((targets(data.train) != torch.tensor([0, 1] * 20)).sum()) < 35
    numbers = opened(path, "regression", text="text", tokenizer=pieces, target="score")
    assert fetched(numbers.train, [7])["target"].tolist() == [[pytest.approx(0.7)]]


def test_a_word_has_its_tag_at_its_first_piece(parquet: Any, pieces: str) -> None:
    path = parquet(
        {
            "words": [["the", "cats", "sat"], ["dogs"], ["a", "dog", "on", "the", "mats"]],
            "tags": [["O", "B", "O"], ["B"], ["O", "B", "O", "O", "B"]],
        }
    )
    data = opened(path, "token-classification", text="words", tokenizer=pieces, max_length=6)
    batch = fetched(data.train, [0, 1, 2])
    none = -100
    assert batch["input_ids"].tolist() == [
        [1, 11, 5, 10, 7, 2],
        [1, 6, 10, 2, 0, 0],
        [1, 4, 6, 8, 11, 2],
    ]
    assert batch["target"].tolist() == [
        [none, 1, 0, none, 1, none],
        [none, 0, none, none, none, none],
        [none, 1, 0, 1, 1, none],
    ]
    assert torch.equal(batch["mask"], batch["target"] != none)
    assert (data.info.outputs, data.info.class_names) == (2, ["B", "O"])
    assert {"target", "mask", "index"} <= data.info.fields


def test_spaces_are_kept_where_tokens_hold_them(data_root: Path) -> None:
    """A byte-level tokeniser reads the words as it reads them in a sentence."""
    config = DataConfig(
        path=str(data_root / "wikiann" / "en"),
        text="tokens",
        tokenizer={"train": 2048},
        limit=300,
        evaluation_limit=20,
        validation="validation",
        columns=(),
    )
    data = open_data(config, "token-classification")
    assert data.info.class_names == ["O", "B-PER", "I-PER", "B-ORG", "I-ORG", "B-LOC", "I-LOC"]
    assert isinstance(data.train, TaggedSource)
    assert data.info.tokenizer is not None
    import pyarrow.parquet as parquet_files

    table = parquet_files.read_table(next((data_root / "wikiann" / "en").glob("train-*")))
    batch = fetched(data.train, range(20))
    for row, number in enumerate(batch["index"].tolist()):
        words, tags = table["tokens"][number].as_py(), table["ner_tags"][number].as_py()
        length = int(batch["attention_mask"][row].sum())
        assert data.info.tokenizer.decode(batch["input_ids"][row, :length].tolist()) == " ".join(words)
        assert batch["target"][row][batch["mask"][row]].tolist() == tags


def test_sst2_is_read_as_it_is(data_root: Path) -> None:
    config = DataConfig(
        path=str(data_root / "sst2"),
        text="sentence",
        tokenizer={"train": 2048},
        validation="validation",
        limit=200,
        evaluation_limit=50,
    )
    data = open_data(config, "classification")
    assert (len(data.train), len(data.validation or []), data.info.outputs) == (200, 50, 2)
    assert set(targets(data.train).tolist()) == {0, 1}


@pytest.mark.parametrize(
    ("columns", "said"),
    [
        (
            {"words": [["a"], ["a", "cat"]], "tags": [[1], [0]]},
            "row 1 of column 'words', split 'train', has 2 words and 1 tags",
        ),
        ({"words": [["a"], []], "tags": [[0], [1]]}, "row 1 of column 'words'.* allowed: a list of words"),
        (
            {"words": ["a", "cat"], "tags": [[0], [1]]},
            "row 0 of column 'words'.*is 'a'; allowed: a list of words",
        ),
        (
            {"words": [["a"], ["cat"]], "tags": [[0], [-1]]},
            "entry 0 of row 1 of column 'tags'.*is the label -1",
        ),
        (
            {"words": [["a"], ["cat"]], "tags": [0, 1]},
            "column 'tags' of split 'train' holds int64, not a list of tags",
        ),
        (
            {"words": [["a"], ["cat"]], "kind": [[0], [1]]},
            "set data.target to the column with the words' tags",
        ),
    ],
)
def test_words_and_tags_that_do_not_fit(
    parquet: Any, pieces: str, columns: dict[str, Any], said: str
) -> None:
    with pytest.raises(DataError, match=said):
        opened(parquet(columns), "token-classification", text="words", tokenizer=pieces)


def test_a_row_without_text_is_named(parquet: Any, pieces: str) -> None:
    path = parquet({"text": ["a", None, "b"], "label": [0, 1, 0]})
    with pytest.raises(DataError, match="row 1 of column 'text', split 'train', is missing; allowed: text"):
        opened(path, text="text", tokenizer=pieces)
