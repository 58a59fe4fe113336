"""Tokenisers: trained on the spot, written and read, and compared."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as parquet_files
import pytest

from tutelage.data import DataError
from tutelage.data.tokenizer import (
    END_OF_TEXT,
    Tokenizer,
    load_tokenizer,
    train_tokenizer,
    vocabulary_difference,
)


def copied(tokenizer: Tokenizer, folder: Path) -> Tokenizer:
    tokenizer.save(folder)
    return load_tokenizer(str(folder))


def test_a_trained_one_gives_back_any_text(tokenizer: Tokenizer, sentences: list[str]) -> None:
    texts = [sentences[0], "", "Ünlike ány — other\n\ttext 🙂", "x" * 5000]
    assert [tokenizer.decode(ids.tolist()) for ids in tokenizer.encode(texts)] == texts
    assert tokenizer.size == len(tokenizer.fast) == len(tokenizer.tokens) == 600
    assert tokenizer.tokens[tokenizer.eos_id] == END_OF_TEXT
    assert tokenizer.encode(texts)[0].dtype == np.int32
    assert len(tokenizer.encode(texts)[0]) < len(sentences[0]) / 2


def test_the_same_texts_and_size_give_the_same_one(sentences: list[str], tokenizer: Tokenizer) -> None:
    again = train_tokenizer(sentences, 600)
    assert again.fingerprint == tokenizer.fingerprint
    assert again.tokens == tokenizer.tokens
    assert train_tokenizer(sentences, 500).fingerprint != tokenizer.fingerprint
    assert train_tokenizer(sentences[1:], 600).fingerprint != tokenizer.fingerprint


def test_the_number_of_threads_does_not_matter(data_root: Path) -> None:
    """One thread in a process of its own: the number is read when the first tokeniser is trained."""
    file = next((data_root / "tiny_shakespeare").glob("test-*"))
    script = (
        "import sys, pyarrow.parquet as p; from tutelage.data.tokenizer import train_tokenizer; "
        "print(train_tokenizer(p.read_table(sys.argv[1])['text'].to_pylist() * 2, 2048).fingerprint)"
    )
    alone = subprocess.run(
        [sys.executable, "-c", script, str(file)],
        env={**os.environ, "RAYON_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    texts = parquet_files.read_table(file)["text"].to_pylist() * 2
    assert alone.stdout.strip() == train_tokenizer(texts, 2048).fingerprint


def test_too_little_text_is_refused(sentences: list[str]) -> None:
    with pytest.raises(
        DataError, match=r"gives \d+ tokens, not the 50000 of data.tokenizer.train; set it to at most"
    ):
        train_tokenizer(sentences, 50_000)


def test_one_that_was_written_and_read_is_the_same(tokenizer: Tokenizer, tmp_path: Path) -> None:
    again = copied(tokenizer, tmp_path)
    assert again.fingerprint == tokenizer.fingerprint
    assert vocabulary_difference(again, tokenizer) is None
    assert (again.eos_id, again.pad_id, again.place) == (tokenizer.eos_id, tokenizer.pad_id, str(tmp_path))


def test_what_was_tokenised_before_leaves_the_fingerprint(tokenizer: Tokenizer, tmp_path: Path) -> None:
    again = copied(tokenizer, tmp_path)
    again.encode_inputs(["some words"], None, 4)
    assert again.fingerprint == tokenizer.fingerprint


def test_an_added_token_counts(tokenizer: Tokenizer, tmp_path: Path) -> None:
    again = copied(tokenizer, tmp_path)
    again.fast.add_tokens(["<|user|>"])
    found = Tokenizer(again.fast)
    assert found.size == 601
    assert found.tokens[600] == "<|user|>"
    assert found.fingerprint != tokenizer.fingerprint
    assert vocabulary_difference(found, tokenizer) == (
        "601 tokens against 600; from id 600 on only ours: '<|user|>'"
    )
    assert vocabulary_difference(tokenizer, found) == (
        "600 tokens against 601; from id 600 on only theirs: '<|user|>'"
    )


def test_the_first_tokens_that_differ_are_named(sentences: list[str], tokenizer: Tokenizer) -> None:
    other = train_tokenizer(sentences[:100], 600)
    found = vocabulary_difference(tokenizer, other)
    first = next(number for number in range(600) if tokenizer.tokens[number] != other.tokens[number])
    assert found is not None
    assert found.startswith(f"id {first} is {tokenizer.tokens[first]!r} against {other.tokens[first]!r}, id ")
    assert " more" in found


def test_ids_that_no_token_has_are_counted() -> None:
    """A vocabulary with a hole: its model has an output for the last id all the same."""
    import tokenizers
    import transformers

    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "b": 5}, unk_token="a"))
    found = Tokenizer(transformers.PreTrainedTokenizerFast(tokenizer_object=backend))
    assert found.size == 6
    assert found.tokens == ("a", None, None, None, None, "b")


def test_places_that_hold_none(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"holds no tokeniser: there is none of tokenizer\.json"):
        load_tokenizer(str(tmp_path))
    with pytest.raises(DataError, match="there is no such folder"):
        load_tokenizer(str(tmp_path / "missing"))
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(DataError, match="cannot be had"):
        load_tokenizer(str(tmp_path))
    with pytest.raises(DataError, match="'nobody/nothing' cannot be had"):
        load_tokenizer("nobody/nothing")


def test_one_without_an_end_of_text_token_says_so(tokenizer: Tokenizer, tmp_path: Path) -> None:
    again = copied(tokenizer, tmp_path)
    again.fast.eos_token = None
    with pytest.raises(DataError, match=r"has no end-of-text token \(eos_token\)"):
        _ = again.eos_id


def test_shakespeare_is_read_whole(data_root: Path) -> None:
    file = next((data_root / "tiny_shakespeare").glob("validation-*"))
    text = parquet_files.read_table(file)["text"][0].as_py()
    found = train_tokenizer([text], 2048)
    assert found.decode(found.encode([text])[0].tolist()) == text
