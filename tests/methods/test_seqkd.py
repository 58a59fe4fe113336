"""seqkd: what the teacher wrote is what the student learns, once, and whatever kills the run."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pandas
import pytest
import torch
from safetensors.torch import load_file

from killing import Killed, stop_after
from tutelage.data import open_data
from tutelage.data.tokens import TokenSource
from tutelage.engine.needs import PairingError
from tutelage.recipe import load_recipe
from tutelage.runs import RunResult, check, distill
from tutelage.teachers.local import LocalTeacher

SMALL = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
MODEL = {"model": "config:llama", "options": SMALL}
WRITING = {"max_new_tokens": 9, "beams": 2, "batch_size": 8}


def recipe(**changes: Any) -> dict[str, Any]:
    return {
        "version": 1,
        "task": "language-model",
        "data": {
            "path": "markov",
            "markov": {"rows": 60, "symbols": 8},
            "max_length": 12,
            "validation": 8,
            "test": 8,
        },
        "teacher": MODEL,
        "student": MODEL,
        "method": {"name": "seqkd", "prompt_tokens": 3, "generation": WRITING},
        "train": {"steps": 6, "batch_size": 8, "device": "cpu", "threads": 1, "checkpoint": {"every": 2}},
        "output": {"report": False},
    } | changes


def run(folder: Path, **options: Any) -> RunResult:
    return distill(recipe(), folder=folder, progress=False, **options)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> RunResult:
    return run(tmp_path_factory.mktemp("seqkd") / "run")


def assert_same_student(folder: Path, other: Path) -> None:
    wanted = load_file(other / "student" / "model.safetensors")
    found = load_file(folder / "student" / "model.safetensors")
    assert all(torch.equal(value, found[name]) for name, value in wanted.items())


def answers(folder: Path) -> dict[int, list[int]]:
    lines = (folder / "generated" / "teacher" / "part-0.jsonl").read_text().splitlines()
    found = [json.loads(line) for line in lines]
    assert max(Counter(line["prompt"] for line in found).values()) == 1
    return {line["prompt"]: line["tokens"] for line in found}


def test_a_text_for_every_training_row(finished: RunResult) -> None:
    result = finished.result
    assert result["texts"] == len(answers(finished.folder)) == 44
    assert result["written_tokens"] == sum(map(len, answers(finished.folder).values()))
    assert result["train_seconds"] > 0
    for part in ("test", "validation"):
        assert {"perplexity", "agreement", "acceptance"} <= result[part].keys()
        assert result["teachers"]["teacher"][part]["perplexity"] > 1
    shown = result["tables"]["the teacher's text"]
    assert len(shown["rows"]) == 8
    assert len(shown["rows"][0]) == len(shown["columns"])


def starts() -> list[list[int]]:
    """The first three tokens of every training row."""
    train = open_data(load_recipe(recipe()).data, "language-model").train
    rows = train.fetch(range(len(train))).inputs
    assert isinstance(rows, dict)
    found: list[list[int]] = rows["input_ids"][:, :3].tolist()
    return found


def documents_of(source: Any) -> list[list[int]]:
    assert isinstance(source, TokenSource)
    tokens, offsets = source.documents.tokens, source.documents.offsets
    return [part.tolist() for part in np.split(tokens, offsets[1:-1])]


class Seen:
    """What a student is trained on."""

    def on_step_end(self, trainer: Any) -> None:
        self.source: TokenSource = trainer.source
        assert trainer.method.config.name == "none"


def test_the_student_learns_prompts_and_what_the_teacher_wrote(finished: RunResult, tmp_path: Path) -> None:
    seen = Seen()
    run(tmp_path / "run", callbacks=[seen])
    written = answers(tmp_path / "run").values()
    assert documents_of(seen.source) == [
        [*start, *text] for start, text in zip(starts(), written, strict=True)
    ]
    documents = seen.source.documents
    assert documents.counted is None
    assert seen.source.layout.max_length == 12


@pytest.mark.parametrize("batches", [0, 2, 5])
def test_killed_while_the_teacher_writes(
    batches: int, finished: RunResult, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, left = LocalTeacher.generate, [batches]

    def mortal(*arguments: Any) -> Any:
        if left[0] == 0:
            raise Killed
        left[0] -= 1
        return plain(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(LocalTeacher, "generate", mortal)
        with pytest.raises(Killed):
            run(tmp_path / "run")
    run(tmp_path / "run", resume=True)
    assert answers(tmp_path / "run") == answers(finished.folder)
    assert_same_student(tmp_path / "run", finished.folder)


@pytest.mark.parametrize("step", [1, 3, 6])
def test_killed_while_the_student_trains(
    step: int, finished: RunResult, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stop_after(step, lambda kill: run(tmp_path / "run", callbacks=[kill]))
    monkeypatch.setattr(LocalTeacher, "generate", None)  # the texts are there: nobody writes
    run(tmp_path / "run", resume=True)
    assert_same_student(tmp_path / "run", finished.folder)


def in_pair(folder: str) -> None:
    """Runs in each of two processes."""
    distill(recipe(), folder=folder, progress=False)


def test_two_processes_share_the_writing_and_the_training(
    finished: RunResult, pair: Any, tmp_path: Path
) -> None:
    pair.run(in_pair, str(tmp_path / "run"))
    parts = [
        [json.loads(line) for line in path.read_text().splitlines()]
        for path in sorted((tmp_path / "run" / "generated" / "teacher").glob("part-*.jsonl"))
    ]
    assert len(parts) == 2
    assert {line["prompt"]: line["tokens"] for part in parts for line in part} == answers(finished.folder)
    wanted, found = (
        load_file(folder / "student" / "model.safetensors") for folder in (finished.folder, tmp_path / "run")
    )
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


def test_its_texts_are_a_data_set_that_a_recipe_reads(finished: RunResult) -> None:
    assert finished.result["datasets"] == {"generated": "datasets/generated"}
    folder = finished.folder / "datasets" / "generated"
    table = pandas.read_parquet(folder)
    assert len(table) == 44
    for row in table.itertuples():
        assert row.text == f"{row.prompt} {row.completion}".strip()
    reading = {"path": str(folder), "text": "text", "max_length": 12, "validation": None}
    reading |= {"tokenizer": str(finished.folder / "student")}
    data = open_data(load_recipe(recipe(data=reading, method="none", teacher=None)).data, "language-model")
    end = data.info.tokenizer.eos_id  # type: ignore[union-attr]
    wanted = [
        [*given, *written] + ([] if written[-1] == end else [end])
        for given, written in zip(starts(), answers(finished.folder).values(), strict=True)
    ]
    assert documents_of(data.train) == wanted


def questions(folder: Path, asking: str = "what is {0} and {0}?") -> dict[str, Any]:
    folder.mkdir()
    asked = [asking.format(number) for number in range(40)]
    told = [f"it is {2 * number}" for number in range(40)]
    pandas.DataFrame({"question": asked, "answer": told}).to_parquet(folder / "train.parquet")
    return {"path": str(folder), "prompt": "question", "completion": "answer", "tokenizer": {"train": 300}}


def test_of_completions_only_what_the_teacher_wrote_counts(tmp_path: Path) -> None:
    seen = Seen()
    data = questions(tmp_path / "data") | {"max_length": 64, "validation": None}
    values = recipe(data=data)
    done = distill(values, folder=tmp_path / "run", progress=False, callbacks=[seen])
    documents, texts = seen.source.documents, list(answers(done.folder).values())
    assert documents.counted is not None
    assert int(documents.counted.sum()) == sum(map(len, texts))
    table = pandas.read_parquet(done.folder / "datasets" / "generated")
    assert set(table.prompt) == {f"what is {number} and {number}?" for number in range(40)}
    assert done.result["test"] == {}


def test_what_it_cannot_work_with_is_said_before_anything_is_written(tmp_path: Path) -> None:
    data = questions(tmp_path / "data")
    stream = data | {"stream": True, "epoch_rows": 8, "validation": None, "max_length": 32}
    with pytest.raises(PairingError, match=r"leave data\.stream out"):
        check(recipe(data=stream))
    with pytest.raises(ValueError, match="no document of a training row gives a prompt"):
        check(recipe(data=questions(tmp_path / "unasked", "") | {"max_length": 32}))
    long = {"name": "seqkd", "generation": {"max_new_tokens": 5000}}
    with pytest.raises(ValueError, match="are more than the 2048 positions"):
        check(recipe(method=long))
    with pytest.raises(PairingError, match="one teacher; this recipe has 2"):
        check(recipe(teacher={"a": MODEL, "b": MODEL}))
    digits = {
        "data": {"path": "digits"},
        "teacher": {"model": "digits:mlp-8"},
        "student": {"model": "digits:mlp-8"},
    }
    with pytest.raises(PairingError, match="needs a teacher that writes text"):
        check(recipe(task="classification", **digits))
    assert not (tmp_path / "runs").exists()
