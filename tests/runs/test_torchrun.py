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

from tutelage.recipe import RecipeError, load_recipe
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


def test_one_process_shares_nothing_out_and_says_so(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="there is one process: nothing is shared out"):
        distill(recipe(sharding="fsdp", shard_teacher=True), folder=tmp_path / "run", progress=False)
    distill(recipe(), folder=tmp_path / "plain", progress=False)
    for name, value in weights(tmp_path / "plain").items():
        assert torch.equal(value, weights(tmp_path / "run")[name])


def test_fp16_is_refused_with_fsdp() -> None:
    with pytest.raises(RecipeError, match="precision=fp16 does not go with sharding=fsdp: use bf16"):
        load_recipe(recipe(sharding="fsdp", precision="fp16"))


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


SIGNALS_ITSELF = """
import os, pathlib, signal, sys
from tutelage.cli import main
from tutelage.engine.loop import Trainer

name, place = sys.argv[1], pathlib.Path(sys.argv[2])
sys.argv[1:] = sys.argv[3:]
after = Trainer._after_step

def _after_step(self):
    after(self)
    if self.step == 30 and os.environ["RANK"] == "1":
        place.write_text(str(os.getpid()))
        os.kill(os.getpid(), getattr(signal, name))

Trainer._after_step = _after_step
main()
"""

TORCHRUN = ("torch.distributed.run", "--standalone", "--nproc-per-node", "2")
ACCELERATE = ("accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1",
              "--mixed_precision", "no", "--dynamo_backend", "no")  # fmt: skip
"""What they start are processes; without a GPU these run on the CPU."""


def launch(*words: str, launcher: tuple[str, ...] = TORCHRUN) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", *launcher, *words]
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


@pytest.mark.slow
@pytest.mark.two_processes
@pytest.mark.parametrize(
    ("launcher", "sharding"), [(TORCHRUN, "fsdp"), (ACCELERATE, "ddp")], ids=["torchrun", "accelerate"]
)
def test_either_launcher_gives_the_student_of_one_process(
    launcher: tuple[str, ...], sharding: str, tmp_path: Path
) -> None:
    """One recipe; the files that a sharded run leaves are plain too."""
    values = recipe(sharding=sharding, shard_teacher=True)
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(values))
    command = ("-m", "tutelage", "run", str(tmp_path / "recipe.yaml"), "--dir", str(tmp_path / "two"))
    process = launch(*command, launcher=launcher)
    printed, message = end(process)
    assert process.returncode == 0, message
    assert printed.count(str(tmp_path / "two")) == 2, "one rank prints"
    values["train"]["sharding"] = "ddp"
    alone = distill(values, folder=tmp_path / "one", progress=False)
    assert_close(tmp_path / "two", tmp_path / "one")
    result = json.loads((tmp_path / "two" / "result.json").read_text())
    for model in ("student", "teacher"):
        mine, theirs = (
            found[model] if model == "student" else found["teachers"][model]
            for found in (result, alone.result)
        )
        assert (mine["parameters"], mine["flops"]) == (theirs["parameters"], theirs["flops"])


@pytest.mark.slow
@pytest.mark.two_processes
@pytest.mark.parametrize(("signal_name", "said"), [("SIGKILL", "closed"), ("SIGSTOP", "within 0.2 minutes")])
def test_a_rank_that_goes_silent_ends_the_run(
    signal_name: str, said: str, written: Path, tmp_path: Path
) -> None:
    """Killed, or hanging: the other says which rank it waits for, and the run goes on from its last checkpoint."""
    script, place, folder = tmp_path / "signals.py", tmp_path / "pid", tmp_path / "run"
    script.write_text(SIGNALS_ITSELF)
    words = ("run", str(written), "train.timeout=0.2", "--dir", str(folder), "--no-progress")
    process = launch(str(script), signal_name, str(place), *words)
    began = time.monotonic()
    while signal_name == "SIGSTOP" and not _failed(folder):
        assert time.monotonic() < began + 2 * LINGER, "the other rank hangs too"
        time.sleep(0.05)
    if signal_name == "SIGSTOP":  # else the launcher waits half a minute for it
        os.kill(int(place.read_text()), signal.SIGCONT)
    _, message = end(process)
    assert process.returncode != 0
    assert message.count("rank 1 of 2 went silent") == 1
    assert said in message
    assert "train.timeout" in message or signal_name == "SIGKILL"
    assert "SilentRankError" not in message, "no traceback of ours"
    result = json.loads((folder / "result.json").read_text())
    assert result["status"] == "failed"
    assert "went silent" in result["error"]
    assert list((folder / "checkpoints").glob("step-*"))
    assert not (folder / "student").exists()


def _failed(folder: Path) -> bool:
    found = folder / "result.json"
    return found.exists() and json.loads(found.read_text())["status"] == "failed"
