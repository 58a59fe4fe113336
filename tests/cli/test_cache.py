"""`tutelage cache`: what is handed on, what is printed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typed import tutelage

WORDS = [
    "cache",
    "digits",
    "teacher={model: digits:cnn-4}",
    "train.epochs=2",
    "train.device=cpu",
    "data.limit=64",
    "train.batch_size=16",
    "data.views=[{name: crop, padding: 1}]",
    "data.view_seed=0",
    "data.distinct_views=2",
    "--no-progress",
]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cache") / "store"
    done = tutelage(*WORDS, "--dir", str(folder), "cache.dtype=int8", "cache.shard_rows=50")
    assert done.exit_code == 0, done.output
    return folder


def test_the_verb_makes_a_store_and_says_what_it_cost(tmp_path: Path) -> None:
    done = tutelage(*WORDS, "--dir", str(tmp_path / "store"), "cache.dtype=float16")
    assert done.exit_code == 0, done.output
    for words in ("64 × 2 views", "dense logits, float16", "rows/s", "error logits.max", "error kl"):
        assert words in done.stdout
    assert done.stdout.splitlines()[-1].split() == ["store", str(tmp_path / "store")]


def test_a_second_call_reports_and_makes_nothing(made: Path) -> None:
    done = tutelage(*WORDS, "--dir", str(made), "cache.dtype=int8", "cache.shard_rows=50", "--json")
    found = json.loads(done.stdout)
    assert (found["rows"], found["views"], found["files"], found["made"]) == (64, 2, 3, 0)
    assert 0 < found["error"]["logits.mean"] < found["error"]["logits.max"]
    assert 0 <= found["metrics"]["validation"]["accuracy"] <= 1


def test_an_estimate_writes_nothing(tmp_path: Path) -> None:
    words = [*WORDS, "--dir", str(tmp_path / "store"), "--estimate"]
    done = tutelage(*words)
    assert done.exit_code == 0, done.output
    for wanted in ("Nothing was written", "size", "free on the disk", "time", "error kl"):
        assert wanted in done.stdout
    found = json.loads(tutelage(*words, "--json").stdout)
    assert found["bytes"] > 64 * 2 * 10 * 4
    assert found["seconds"] > 0
    assert list(tmp_path.iterdir()) == []


def test_verify_names_what_is_damaged(made: Path) -> None:
    done = tutelage("cache", "--verify", str(made))
    assert done.exit_code == 0
    assert "5 files, 0 damaged" in done.stdout
    shard = made / "shard-00001.safetensors"
    content = shard.read_bytes()
    shard.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    try:
        done = tutelage("cache", "--verify", str(made))
        assert done.exit_code == 1
        assert "shard-00001.safetensors: does not hold what was written" in done.stderr
        found = json.loads(tutelage("cache", "--verify", str(made), "--json").stdout)
        assert list(found["damaged"]) == ["shard-00001.safetensors"]
    finally:
        shard.write_bytes(content)


@pytest.mark.parametrize(
    ("words", "reason", "code"),
    [
        (["cache"], "give a recipe, or --verify STORE", 2),
        (["cache", "digits", "--verify", "x"], "give a recipe, or --verify STORE", 2),
        (["cache", "digits"], "give the store's folder by --dir", 2),
        (["cache", "--verify", "no/such"], "holds no store", 2),
        ([*WORDS, "--dir", "s", "cache.form=topk"], "form topk needs k", 2),
        ([*WORDS, "--dir", "s", "cache.k=3"], "k goes with form topk or sampled", 2),
        ([*WORDS, "--dir", "s", "cache.form=none", "cache.scale=log_probs"], "scale goes with form dense", 2),
        ([*WORDS, "--dir", "s", "cache.draw_temperature=2"], "draw_temperature goes with form sampled", 2),
        ([*WORDS, "--dir", "s", "cache.form=sampled", "cache.k=4"], "needs dense logits", 3),
        ([*WORDS, "--dir", "s", "--teacher", "x"], "the recipe has no teacher 'x'; there are teacher", 2),
        ([*WORDS, "--dir", "s", "teacher={store: no/such}"], "no/such holds no store", 2),
    ],
)
def test_what_cannot_be_is_one_message(
    words: list[str], reason: str, code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    done = tutelage(*words)
    assert (done.exit_code, "Traceback" in done.output) == (code, False), done.output
    assert reason in " ".join(done.output.replace("│", " ").split())
    assert list(tmp_path.iterdir()) == []


def test_a_store_is_no_teacher_to_store(made: Path, tmp_path: Path) -> None:
    words = [word for word in WORDS if not word.startswith("teacher=")]
    done = tutelage(*words, f"teacher={{store: {made}}}", "--dir", str(tmp_path / "again"))
    assert done.exit_code == 2
    assert "is a store already" in done.stderr
