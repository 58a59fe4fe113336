"""Text and tokenisers that tests share."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pandas
import pytest

from tutelage.data.tokenizer import Tokenizer, train_tokenizer


@pytest.fixture(scope="session")
def sentences() -> list[str]:
    """400 sentences of 3 to 60 words that were never written before."""
    draw = random.Random(0)
    syllables = ["ka", "lo", "mi", "ren", "tu", "sha", "vel", "do", "pir", "an", "os", "gri"]
    words = ["".join(draw.choices(syllables, k=draw.randint(1, 4))) for _ in range(600)]
    return [" ".join(draw.choices(words, k=draw.randint(3, 60))).capitalize() + "." for _ in range(400)]


@pytest.fixture(scope="session")
def tokenizer(sentences: list[str]) -> Tokenizer:
    """A byte-level BPE of 600 tokens."""
    return train_tokenizer(sentences, 600)


@pytest.fixture
def parquet(tmp_path: Path) -> Any:
    """Writes columns to a parquet file of the test's own folder."""

    def write(columns: dict[str, list[Any]], name: str = "rows.parquet") -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        pandas.DataFrame(columns).to_parquet(path)
        return path

    return write
