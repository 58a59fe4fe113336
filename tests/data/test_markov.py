"""A language made on the spot: as its sources say, the same every time, and nothing but tokens."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tutelage.data import DataError, open_data
from tutelage.recipe.schema import DataConfig

pytest.importorskip("transformers")
SOURCES = [
    {"name": "sure", "order": 1, "share": 3, "concentration": 0.01},
    {"name": "noise", "order": 0, "share": 1, "concentration": 1000.0},
]


def config(**changes: Any) -> DataConfig:
    language = {"symbols": 12, "rows": 400, "sources": SOURCES, **changes.pop("markov", {})}
    options = {"path": "markov", "max_length": 20, "validation": 50, "test": 50, "markov": language}
    return DataConfig.model_validate(options | changes)


def test_rows_are_sequences_of_symbols() -> None:
    data = open_data(config(), "language-model")
    assert (len(data.train), data.info.outputs, data.info.input_shape) == (300, 13, (20,))
    batch = data.train.fetch([0, 5])
    assert isinstance(batch.inputs, dict)
    ids, target = batch.inputs["input_ids"], batch.target
    assert target is not None
    assert int(ids.max()) < 12
    assert torch.equal(target[:, :-1], ids[:, 1:])
    assert target[:, -1].tolist() == [-100, -100]
    assert data.info.tokenizer is not None
    assert data.info.tokenizer.decode(ids[0, :2].tolist()) == f"s{ids[0, 0]} s{ids[0, 1]}"


def test_the_same_seed_gives_the_same_language_and_another_another() -> None:
    first, again, other = (
        open_data(config(seed=seed), "language-model").train.fetch(range(300)) for seed in (1, 1, 2)
    )
    assert isinstance(first.inputs, dict)
    assert isinstance(again.inputs, dict)
    assert isinstance(other.inputs, dict)
    assert torch.equal(first.inputs["input_ids"], again.inputs["input_ids"])
    assert not torch.equal(first.inputs["input_ids"], other.inputs["input_ids"])


def test_shares_and_certainty_are_those_asked_for() -> None:
    data = open_data(config(columns=["source"]), "language-model")
    batch = data.train.fetch(range(300))
    assert isinstance(batch.inputs, dict)
    source, ids = batch.columns["source"], batch.inputs["input_ids"]
    assert float((source == 0).float().mean()) == pytest.approx(0.75, abs=0.06)

    def certainty(rows: torch.Tensor) -> float:
        """How often the commonest successor of a symbol follows it."""
        pairs = torch.zeros(12, 12)
        pairs.index_put_((rows[:, :-1].flatten(), rows[:, 1:].flatten()), torch.ones(()), accumulate=True)
        return float(pairs.amax(1).sum() / pairs.sum())

    assert certainty(ids[source == 0]) > 0.8
    assert certainty(ids[source == 1]) < 0.25


def test_tags_name_the_source() -> None:
    data = open_data(config(markov={"tagged": True}, columns=["source"]), "language-model")
    batch = data.train.fetch(range(100))
    assert isinstance(batch.inputs, dict)
    assert data.info.outputs == 15
    assert torch.equal(batch.inputs["input_ids"][:, 0], batch.columns["source"] + 12)


def test_what_it_has_not_is_refused() -> None:
    with pytest.raises(DataError, match="the task is classification"):
        open_data(config(), "classification")
    with pytest.raises(DataError, match="column 'source' alone"):
        open_data(config(columns=["topic"]), "language-model")
    with pytest.raises(ValueError, match="each needs its own"):
        config(markov={"sources": [SOURCES[0], SOURCES[0]]})
    with pytest.raises(ValueError, match="goes with path: markov"):
        DataConfig.model_validate({"path": "digits", "markov": {}})
    with pytest.raises(ValueError, match="lower symbols"):
        config(markov={"symbols": 1000, "sources": [{"name": "a", "order": 2}]})
