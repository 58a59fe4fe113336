"""Scores of a corpus: what they are, shards that are taken over, and scores of something else that are refused."""

from __future__ import annotations

import json
import os
import signal
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import tutelage.procedures.scoring as scoring
from tutelage.data import TokenSource
from tutelage.data.documents import Documents
from tutelage.engine.interrupt import Interrupted
from tutelage.procedures.run import Run
from tutelage.procedures.scoring import Scores, check_scores, counted_rows, score_rows
from tutelage.recipe import load_recipe
from tutelage.runs.assemble import assemble
from tutelage.teachers.manifest import write_whole
from tutelage.untrusted import FileError

ROWS = 90
LLAMA = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}


def work(seed: int = 0, **data: Any) -> Run:
    markov = {"symbols": 8, "rows": ROWS, "sources": [{"name": "a"}]}
    recipe = {
        "task": "language-model",
        "data": {"path": "markov", "markov": markov, "max_length": 12, "validation": None} | data,
        "teacher": {"model": "config:llama", "options": LLAMA},
        "student": {"model": "config:llama", "options": LLAMA},
        "method": "miniplm",
        "train": {
            "steps": 1,
            "batch_size": 8,
            "optimizer": {"name": "sgd", "lr": 0.1},
            "device": "cpu",
            "seed": seed,
        },
    }
    return assemble(load_recipe(recipe)).procedure_run(None, show_progress=False)


def scored(folder: Path | None, made: Run | None = None, batch_size: int = 2) -> Scores:
    with closing(made or work()) as run:
        teacher: Any = run.teachers["teacher"]
        train: Any = run.data.train
        return score_rows(run, teacher, train, folder, batch_size=batch_size)


def test_a_row_s_score_is_the_sum_over_its_tokens_that_count() -> None:
    run = work()
    found = scored(None, run)
    batch = run.data.train.fetch(range(ROWS))
    teacher: Any = run.teachers["teacher"]
    assert batch.target is not None
    assert batch.mask is not None
    assert batch.index is not None
    nll = F.cross_entropy(
        teacher.outputs(batch).logits.double().transpose(1, 2),
        batch.target,
        reduction="none",
        ignore_index=-100,
    )
    torch.testing.assert_close(found.nll, nll.sum(1), rtol=1e-5, atol=1e-5)
    assert torch.equal(found.tokens, batch.mask.sum(1))
    assert torch.equal(found.ids, batch.index)
    torch.testing.assert_close(found.per_row(normalise=True), found.nll / found.tokens)
    assert torch.equal(found.per_row(normalise=False), found.nll)


def test_shards_hold_the_same_and_are_not_scored_again(tmp_path: Path) -> None:
    first = scored(tmp_path)
    assert len(list(tmp_path.glob("shard-*.safetensors"))) == -(-ROWS // 32)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    again = scored(tmp_path)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == before
    alone = scored(None)
    for name in ("ids", "nll", "tokens"):
        assert torch.equal(getattr(first, name), getattr(again, name))
        assert torch.equal(getattr(first, name), getattr(alone, name))
    assert again.seconds == first.seconds


class Killed(BaseException):
    pass


@pytest.mark.parametrize("kill", range(6))
def test_a_kill_at_any_file_loses_no_other_shard_and_changes_no_score(
    kill: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each shard is two files; the first one written is the plan."""
    whole = scored(tmp_path / "whole")
    written: list[Path] = []

    def killing(path: Path, content: bytes) -> None:
        if len(written) == kill:
            path.write_bytes(content[: len(content) // 2])  # worse than a kill: half of it in place
            raise Killed
        written.append(path)
        write_whole(path, content)

    monkeypatch.setattr(scoring, "write_whole", killing)
    with pytest.raises(Killed):
        scored(tmp_path / "run")
    kept = [
        path for path in written if path.suffix == ".safetensors" and path.with_suffix(".json") in written
    ]
    before = {path: path.stat().st_mtime_ns for path in kept}
    monkeypatch.setattr(scoring, "write_whole", write_whole)
    if kill == 0:
        (tmp_path / "run" / scoring.PLAN).unlink()
    resumed = scored(tmp_path / "run")
    assert torch.equal(resumed.nll, whole.nll)
    assert {path: path.stat().st_mtime_ns for path in kept} == before
    for path in sorted((tmp_path / "whole").glob("*.safetensors")):
        assert path.read_bytes() == (tmp_path / "run" / path.name).read_bytes()


def test_a_wish_to_stop_is_heard_after_a_shard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stopping(path: Path, content: bytes) -> None:
        write_whole(path, content)
        if path.suffix == ".safetensors":
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(scoring, "write_whole", stopping)
    with pytest.raises(Interrupted):
        scored(tmp_path)
    assert len(list(tmp_path.glob("shard-*.json"))) == 1
    monkeypatch.undo()
    assert torch.equal(scored(tmp_path).nll, scored(None).nll)


def test_a_shard_that_was_changed_is_scored_anew(tmp_path: Path) -> None:
    first = scored(tmp_path)
    shard = tmp_path / "shard-00001.safetensors"
    content = bytearray(shard.read_bytes())
    content[-3] ^= 1
    shard.write_bytes(bytes(content))
    assert torch.equal(scored(tmp_path).nll, first.nll)


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"seed": 1}, "model"),
        ({"max_length": 10}, "max_length"),
        ({"packing": "none"}, "packing"),
        ({"limit": 50}, "rows"),
    ],
)
def test_scores_of_something_else_are_refused_by_name(
    changes: dict[str, Any], field: str, tmp_path: Path
) -> None:
    scored(tmp_path)
    with pytest.raises(FileError, match=rf"holds scores of something else: {field} is .* there and .* here"):
        scored(tmp_path, work(**changes))
    with pytest.raises(FileError, match="batch_size is 2 there and 4 here"):
        scored(tmp_path, batch_size=4)


def test_another_tokeniser_is_named(tmp_path: Path) -> None:
    scored(tmp_path)
    plan = json.loads((tmp_path / scoring.PLAN).read_text())
    (tmp_path / scoring.PLAN).write_text(json.dumps(plan | {"tokenizer": "0" * 64}))
    with pytest.raises(FileError, match="tokenizer is '0000"):
        scored(tmp_path)


def test_rows_in_which_nothing_counts_are_told_apart() -> None:
    run = work()
    assert run.data.info.tokenizer is not None
    documents = Documents.of([np.array(ids, dtype=np.int32) for ids in ([5], [5, 6, 7], [4], [1, 2], [3])])
    source = TokenSource(documents, run.data.info.tokenizer, max_length=4, packing="none")
    found = counted_rows(source)
    assert found.ids.tolist() == [1, 3]
    assert counted_rows(found) is found
    with pytest.raises(ValueError, match="none of 2 rows has a token that counts"):
        counted_rows(source.keep(np.array([0, 4])))


def test_scores_of_something_else_are_found_before_any_is_made(tmp_path: Path) -> None:
    run, other = work(), work(seed=1)
    teacher: Any = run.teachers["teacher"]
    train: Any = run.data.train
    check_scores(run, teacher, train, tmp_path / "new", batch_size=2)
    assert list(tmp_path.iterdir()) == []
    scored(tmp_path)
    check_scores(run, teacher, train, tmp_path, batch_size=2)
    unlike: Any = other.teachers["teacher"]
    with pytest.raises(FileError, match="scores of something else: model is"):
        check_scores(other, unlike, train, tmp_path, batch_size=2)


def in_a_pair(folder: str) -> tuple[list[float], int]:
    found = scored(Path(folder))
    return found.nll.tolist(), len(list(Path(folder).glob("*.safetensors")))


def test_ranks_share_the_shards_and_give_those_of_one_process(pair: Any, tmp_path: Path) -> None:
    alone = scored(tmp_path / "one")
    for nll, shards in pair.run(in_a_pair, str(tmp_path / "two")):
        assert nll == alone.nll.tolist()
        assert shards == 3
    for path in sorted((tmp_path / "one").glob("*.safetensors")):
        assert path.read_bytes() == (tmp_path / "two" / path.name).read_bytes()


def test_a_score_that_is_not_finite_names_its_row(tmp_path: Path) -> None:
    run = work()
    teacher: Any = run.teachers["teacher"]
    teacher.held.model.get_output_embeddings().weight.data.fill_(torch.nan)
    row = int(run.data.train.fetch([0]).index[0])  # type: ignore[index]
    with pytest.raises(ValueError, match=rf"row {row} has the score nan under teacher"):
        scored(tmp_path, run)
    assert not list(tmp_path.glob("shard-*"))
