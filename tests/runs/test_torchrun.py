"""Runs on two processes: the same student as on one, one set of files, and no rank left waiting."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from torch import Tensor

from tutelage.runs import distill

LINGER = 60
"""Seconds after which a launch that has not ended hangs."""


def recipe(method: str = "kd", **train: Any) -> dict[str, Any]:
    """Models without BatchNorm and dropout; 101 test and 33 validation rows do not divide by 2."""
    return {
        "data": {"path": "digits", "limit": 200, "validation": 33, "test": 101},
        "teacher": {"model": "digits:mlp-24"},
        "student": {"model": "digits:mlp-12"},
        "method": {"name": "fitnet", "hint_layer": 1} if method == "fitnet" else method,
        "train": {"epochs": 2, "batch_size": 32, "device": "cpu", "threads": 1, **train},
        "output": {"report": False},
    }


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def weights(folder: Path) -> dict[str, Tensor]:
    found: dict[str, Tensor] = load_file(folder / "student" / "model.safetensors")
    return found


def assert_close(folder: Path, other: Path) -> None:
    """The same lines to 1e-5, but for what is measured in seconds and megabytes; the same weights."""
    mine, theirs = lines(folder), lines(other)
    assert [(line["kind"], line.get("split"), line["step"]) for line in mine] == [
        (line["kind"], line.get("split"), line["step"]) for line in theirs
    ]
    for left, right in zip(mine, theirs, strict=True):
        for key in {"loss", "terms", "metrics"} & left.keys():
            assert left[key] == pytest.approx(right[key], rel=1e-5, abs=1e-5), (left, right)
    for name, value in weights(folder).items():
        torch.testing.assert_close(value, weights(other)[name], rtol=1e-5, atol=1e-5)


# What runs in both processes of the pair; each gives what can be sent back.


@contextmanager
def teachers_in(folder: str) -> Iterator[None]:
    before = os.environ.get("TUTELAGE_TEACHERS")
    os.environ["TUTELAGE_TEACHERS"] = folder
    try:
        yield
    finally:
        os.environ.pop("TUTELAGE_TEACHERS")
        if before is not None:
            os.environ["TUTELAGE_TEACHERS"] = before


def run(values: dict[str, Any], folder: str, resume: bool = False, teachers: str = "") -> dict[str, Any]:
    with teachers_in(teachers):
        done = distill(values, folder=folder, resume=resume, progress=False)
    return {"result": done.result, "weights": {k: v.clone() for k, v in done.student.state_dict().items()}}


def refused(values: dict[str, Any], folder: str) -> str:
    try:
        distill(values, folder=folder, progress=False)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "not refused"


@pytest.mark.parametrize("method", ["kd", "nkd", "fitnet"])
def test_two_processes_give_the_student_of_one(method: str, pair: Any, tmp_path: Path) -> None:
    alone = distill(recipe(method), folder=tmp_path / "one", progress=False)
    first, second = pair.run(run, recipe(method), str(tmp_path / "two"))
    assert_close(tmp_path / "two", tmp_path / "one")
    assert {path.relative_to(tmp_path / "one") for path in (tmp_path / "one").rglob("*")} == {
        path.relative_to(tmp_path / "two") for path in (tmp_path / "two").rglob("*")
    }
    assert first["result"] == second["result"] == json.loads((tmp_path / "two" / "result.json").read_text())
    for name, value in weights(tmp_path / "two").items():
        assert torch.equal(first["weights"][name], value)
        assert torch.equal(second["weights"][name], value)
    for split in ("validation", "test"):
        for metric in ("accuracy", "top5", "agreement"):
            assert first["result"][split][metric] == alone.result[split][metric], "a share of whole rows"


def test_a_teacher_from_a_recipe_is_trained_once_by_both(pair: Any, tmp_path: Path) -> None:
    (tmp_path / "teacher.yaml").write_text(yaml.safe_dump(recipe("none", epochs=1)))
    taught = recipe() | {"teacher": {"recipe": str(tmp_path / "teacher.yaml")}}
    teachers = tmp_path / "teachers"
    first, second = pair.run(run, taught, str(tmp_path / "two"), False, str(teachers))
    (made,) = [path for path in teachers.iterdir() if (path / "result.json").exists()]
    assert first["result"]["teachers"] == second["result"]["teachers"]
    stamp = (made / "result.json").stat().st_mtime_ns
    pair.run(run, taught | {"method": "nkd"}, str(tmp_path / "again"), False, str(teachers))
    assert (made / "result.json").stat().st_mtime_ns == stamp
    from_run = recipe() | {"teacher": {"run": str(made)}}
    pair.run(run, from_run, str(tmp_path / "from run"))
    assert_close(tmp_path / "from run", tmp_path / "two")


def test_a_procedure_keeps_its_journal_once(pair: Any, tmp_path: Path) -> None:
    small = recipe("wa", epochs=1, batch_size=10)
    small["teacher"] = None
    first, second = pair.run(run, small, str(tmp_path / "two"))
    alone = distill(small, folder=tmp_path / "one", progress=False)
    assert first["result"]["tables"] == second["result"]["tables"]
    assert first["result"]["test"] == pytest.approx(alone.result["test"], abs=1e-5)


def test_a_finished_run_is_read_back_by_both(pair: Any, tmp_path: Path) -> None:
    first, _ = pair.run(run, recipe(), str(tmp_path / "run"))
    stamps = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")}
    for again in pair.run(run, recipe(), str(tmp_path / "run"), True):
        assert again["result"] == first["result"]
        assert all(torch.equal(value, first["weights"][name]) for name, value in again["weights"].items())
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")} == stamps


def test_what_rank_0_refuses_stops_both(pair: Any, tmp_path: Path) -> None:
    distill(recipe(), folder=tmp_path / "run", progress=False)
    first, second = pair.run(refused, recipe(), str(tmp_path / "run"))
    assert first.startswith("FolderError: ")
    assert second.startswith("RankError: FolderError on rank 0: ")
    assert "already holds this run" in second
    for found in pair.run(refused, recipe(batch_size=33), str(tmp_path / "odd")):
        assert "33 does not divide into 2 ranks" in found
    assert not (tmp_path / "odd").exists()


# The launcher itself.

FAILS_ON_RANK_1 = """
import os
from tutelage.cli import main
from tutelage.data import DataError
from tutelage.engine.loop import Trainer

after = Trainer._after_step

def _after_step(self):
    if self.step == 3 and os.environ["RANK"] == "1":
        raise DataError("rank 1 has had enough")
    after(self)

Trainer._after_step = _after_step
main()
"""


def launch(*words: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *words]
    return subprocess.Popen(
        command,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def end(process: subprocess.Popen[str]) -> tuple[str, str]:
    try:
        return process.communicate(timeout=LINGER)
    except subprocess.TimeoutExpired:
        process.kill()
        raise AssertionError(f"it hangs: {process.communicate()[1]}") from None


@pytest.fixture
def written(tmp_path: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe(epochs=60, checkpoint={"every": 7})))
    return path


@pytest.mark.two_processes
def test_stopped_by_sigterm_and_resumed(pair: Any, written: Path, tmp_path: Path) -> None:
    """The launcher hands the signal on; both ranks stop at one step, and one says so."""
    process = launch("-m", "tutelage", "run", str(written), "--dir", str(tmp_path / "run"))
    deadline = time.monotonic() + LINGER
    while not (tmp_path / "run" / "metrics.jsonl").exists() or len(lines(tmp_path / "run")) < 5:
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.005)
    process.send_signal(signal.SIGTERM)
    _, message = end(process)
    assert process.returncode != 0
    assert message.count("stopped: by SIGTERM after step") == 1
    assert json.loads((tmp_path / "run" / "result.json").read_text())["status"] == "stopped"
    assert not (tmp_path / "run" / "student").exists()
    values = yaml.safe_load(written.read_text())
    pair.run(run, values, str(tmp_path / "run"), True)
    pair.run(run, values, str(tmp_path / "whole"))
    for name, value in weights(tmp_path / "whole").items():
        assert torch.equal(value, weights(tmp_path / "run")[name])
    steps = [(line["kind"], line["step"], line.get("split")) for line in lines(tmp_path / "run")]
    assert len(set(steps)) == len(steps)
    assert not list((tmp_path / "run").rglob(".tmp-*"))


@pytest.mark.slow
@pytest.mark.two_processes
def test_a_wrong_recipe_is_said_once(written: Path, tmp_path: Path) -> None:
    process = launch("-m", "tutelage", "run", str(written), "method=kdd", "--dir", str(tmp_path / "run"))
    printed, message = end(process)
    assert process.returncode == 1, "the launcher's own code"
    assert printed == ""
    assert message.count("unknown method 'kdd'") == 1
    assert "exitcode  : 2" in message
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
@pytest.mark.two_processes
def test_one_rank_that_fails_ends_the_other(written: Path, tmp_path: Path) -> None:
    script = tmp_path / "fails.py"
    script.write_text(FAILS_ON_RANK_1)
    process = launch(str(script), "run", str(written), "--dir", str(tmp_path / "run"), "--no-progress")
    printed, message = end(process)
    assert process.returncode != 0
    assert printed == ""
    assert message.count("rank 1 has had enough") == 1
    assert "closed by peer" not in message
