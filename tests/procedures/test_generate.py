"""Journalled texts: killed, torn, damaged or shared by two processes, they are those of a run that was left alone."""

from __future__ import annotations

import json
import signal
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from killing import Killed
from tutelage.data.documents import Documents
from tutelage.data.markov import _word_tokenizer
from tutelage.data.tokens import TokenSource
from tutelage.engine.generation import Generation, Prompt
from tutelage.engine.interrupt import Interrupted
from tutelage.engine.teacher import Teacher
from tutelage.procedures.generate import DamagedAnswersWarning, prompts_of, write_texts
from tutelage.procedures.run import Run
from tutelage.recipe import load_recipe
from tutelage.recipe.generation import GenerationConfig
from tutelage.runs.assemble import assemble
from tutelage.untrusted import FileError

SMALL = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
OPTIONS = GenerationConfig(max_new_tokens=5, do_sample=True, batch_size=4)
COUNT = 22


def run_in(folder: Path | None, seed: int = 0) -> Run:
    recipe = {
        "version": 1,
        "task": "language-model",
        "data": {"path": "markov", "markov": {"rows": 60, "symbols": 8}, "max_length": 12, "validation": 8},
        "teacher": {"model": "config:llama", "options": SMALL},
        "student": {"model": "config:llama", "options": SMALL},
        "method": "seqkd",
        "train": {"steps": 1, "device": "cpu", "threads": 1, "seed": seed},
    }
    return assemble(load_recipe(recipe)).procedure_run(folder, show_progress=False)


def prompts(count: int = COUNT) -> list[Prompt]:
    return [Prompt(2 * i, (i % 8, *range(i % 3))) for i in range(count)]


def written(folder: Path | None, options: GenerationConfig = OPTIONS, **changes: Any) -> list[Generation]:
    run = run_in(folder, **changes)
    return write_texts(run, "job", run.teachers["teacher"], prompts(), options)


def lines(folder: Path) -> list[bytes]:
    parts = sorted((folder / "generated" / "job").glob("part-*.jsonl"))
    return [line for path in parts for line in path.read_bytes().splitlines(keepends=True)]


def assert_once(folder: Path) -> None:
    """Every prompt has one line, and each file ends with a whole one."""
    found = Counter(json.loads(line)["prompt"] for line in lines(folder))
    assert found == Counter(prompt.id for prompt in prompts())
    assert all(line.endswith(b"\n") for line in lines(folder))


class Mortal:
    """A teacher that is killed at its n-th batch; it counts the prompts that it answered."""

    def __init__(self, teacher: Teacher, batches: int | None = None) -> None:
        self.spec, self.teacher, self.left, self.answered = teacher.spec, teacher, batches, 0

    def generate(self, given: Sequence[Prompt], options: GenerationConfig, seed: int) -> list[Generation]:
        if self.left == 0:
            raise Killed
        self.left = None if self.left is None else self.left - 1
        self.answered += len(given)
        return self.teacher.generate(given, options, seed)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Generation]]:
    folder = tmp_path_factory.mktemp("whole")
    return folder, written(folder)


def test_every_answer_is_on_disk_once_and_in_the_order_of_the_prompts(whole: Any) -> None:
    folder, answers = whole
    assert [answer.prompt for answer in answers] == [prompt.id for prompt in prompts()]
    assert_once(folder)
    assert written(None) == answers


def test_a_second_call_asks_for_nothing(whole: Any) -> None:
    folder, answers = whole
    before, run = lines(folder), run_in(folder)
    assert write_texts(run, "job", Mortal(run.teachers["teacher"], 0), prompts(), OPTIONS) == answers  # type: ignore[arg-type]
    assert lines(folder) == before


@pytest.mark.parametrize("batches", [0, 1, 3, 5])
def test_a_killed_job_goes_on_and_asks_for_nothing_twice(batches: int, whole: Any, tmp_path: Path) -> None:
    run = run_in(tmp_path)
    with pytest.raises(Killed):
        write_texts(run, "job", Mortal(run.teachers["teacher"], batches), prompts(), OPTIONS)  # type: ignore[arg-type]
    assert len(lines(tmp_path)) == 4 * batches
    run = run_in(tmp_path)
    teacher: Any = Mortal(run.teachers["teacher"])
    assert write_texts(run, "job", teacher, prompts(), OPTIONS) == whole[1]
    assert teacher.answered == COUNT - 4 * batches
    assert_once(tmp_path)


def test_a_job_that_is_asked_to_stop_ends_after_its_batch_and_goes_on(whole: Any, tmp_path: Path) -> None:
    run = run_in(tmp_path)
    plain = run.teachers["teacher"]

    class Asked(Mortal):
        def generate(self, *arguments: Any) -> list[Generation]:
            if self.answered == 4:
                signal.raise_signal(signal.SIGTERM)
            return super().generate(*arguments)

    asked: Any = Asked(plain)
    with pytest.raises(Interrupted, match="stopped by SIGTERM"):
        write_texts(run, "job", asked, prompts(), OPTIONS)
    assert len(lines(tmp_path)) == 8
    assert written(tmp_path) == whole[1]
    assert_once(tmp_path)


@pytest.mark.parametrize("cut", [1, 2, 20, 60, 150, 400])
def test_a_line_that_a_kill_tore_is_written_again(cut: int, whole: Any, tmp_path: Path) -> None:
    """At any byte, so in the middle of a batch too."""
    written(tmp_path)
    part = tmp_path / "generated" / "job" / "part-0.jsonl"
    part.write_bytes(part.read_bytes()[:-cut])
    assert written(tmp_path) == whole[1]
    assert_once(tmp_path)


@pytest.mark.parametrize("damage", [b"\0" * 30 + b"\n", b"{}\n", b'{"prompt": [1], "crc32": 0}\n', b"[]\n"])
def test_a_damaged_line_is_left_out_and_its_text_written_anew(
    damage: bytes, whole: Any, tmp_path: Path
) -> None:
    written(tmp_path)
    part = tmp_path / "generated" / "job" / "part-0.jsonl"
    found = lines(tmp_path)
    part.write_bytes(b"".join([*found[:5], damage, *found[6:]]))
    with pytest.warns(DamagedAnswersWarning, match="1 damaged lines"):
        assert written(tmp_path) == whole[1]
    assert len(lines(tmp_path)) == COUNT + 1
    assert lines(tmp_path)[-1] == found[5]


def test_a_token_that_was_changed_on_disk_is_noticed(whole: Any, tmp_path: Path) -> None:
    written(tmp_path)
    part = tmp_path / "generated" / "job" / "part-0.jsonl"
    changed = json.loads(lines(tmp_path)[3])
    changed["tokens"][0] += 1
    found = lines(tmp_path)
    part.write_bytes(b"".join([*found[:3], json.dumps(changed).encode() + b"\n", *found[4:]]))
    with pytest.warns(DamagedAnswersWarning):
        assert written(tmp_path) == whole[1]


def test_texts_of_another_job_are_refused(whole: Any, tmp_path: Path) -> None:
    written(tmp_path)
    run = run_in(tmp_path)
    with pytest.raises(FileError, match=r"another job \(options differ\); remove the folder"):
        written(tmp_path, OPTIONS.model_copy(update={"temperature": 0.5}))
    with pytest.raises(FileError, match=r"\(seed, teacher differ\)"):
        written(tmp_path, seed=1)
    with pytest.raises(FileError, match=r"\(prompts differ\)"):
        write_texts(run, "job", run.teachers["teacher"], prompts(3), OPTIONS)


def in_pair(folder: str, batches: int | None = None) -> list[Generation] | str:
    """Runs in each of two processes."""
    run = run_in(Path(folder))
    teacher: Any = Mortal(run.teachers["teacher"], batches)
    try:
        return write_texts(run, "job", teacher, prompts(), OPTIONS)
    except Killed:
        return "killed"


def test_two_processes_write_what_one_does(whole: Any, pair: Any, tmp_path: Path) -> None:
    assert pair.run(in_pair, str(tmp_path)) == [whole[1]] * 2
    assert_once(tmp_path)
    assert len(list((tmp_path / "generated" / "job").glob("part-*.jsonl"))) == 2


def test_one_process_goes_on_with_what_two_began(whole: Any, pair: Any, tmp_path: Path) -> None:
    assert pair.run(in_pair, str(tmp_path), 1) == ["killed"] * 2
    assert len(lines(tmp_path)) == 8
    assert written(tmp_path) == whole[1]
    assert_once(tmp_path)


def source(
    packing: str, lengths: Sequence[int], counted: Sequence[Sequence[int]] | None = None
) -> TokenSource:
    """Documents of rising numbers, in rows of 8."""
    tokens = [np.arange(100 * d, 100 * d + length, dtype=np.int32) for d, length in enumerate(lengths)]
    marks = (
        None if counted is None else [np.isin(np.arange(n), c) for n, c in zip(lengths, counted, strict=True)]
    )
    return TokenSource(Documents.of(tokens, marks), _word_tokenizer(["a"]), max_length=8, packing=packing)


def test_prompts_of_raw_text_are_the_starts_of_pieces() -> None:
    found = prompts_of(source("wrapped", [5, 11, 1, 3]), 2)
    assert [prompt.tokens for prompt in found] == [(0, 1), (100, 101), (103, 104), (300, 301)]
    assert len({prompt.id for prompt in found}) == 4
    assert [prompt.tokens for prompt in prompts_of(source("none", [2, 4]), 9)] == [(0,), (100, 101, 102)]


def test_prompts_before_what_is_learnt_stand_before_its_first_token() -> None:
    rows = source("best_fit", [6, 10, 4, 3], [[3, 4, 5], [2, 3, 4, 5, 6, 7, 8, 9], [], [0, 1, 2]])
    assert sorted(prompt.tokens for prompt in prompts_of(rows, 1)) == [(0, 1, 2), (100, 101)]


def test_prompts_are_those_of_the_rows_that_are_kept() -> None:
    rows = source("none", [4, 5, 6])
    assert [prompt.tokens for prompt in prompts_of(rows.keep(np.array([2, 0])), 2)] == [(200, 201), (0, 1)]
    assert [prompt.id for prompt in prompts_of(rows.keep(np.array([2, 0])), 2)] == [2, 0]
