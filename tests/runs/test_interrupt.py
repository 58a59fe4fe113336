"""A real process, stopped by a signal at some step, then resumed: the same weights bit for bit."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from tutelage.runs import distill

RECIPE: dict[str, Any] = {
    "data": {
        "path": "digits",
        "limit": 300,
        "validation": 64,
        "test": 64,
        "views": [{"name": "crop", "padding": 1}],
        "workers": 1,
    },
    "teacher": {"model": "digits:cnn-8-16"},
    "student": {"model": "digits:cnn-4-8"},
    "method": "fitnet",
    "train": {
        "epochs": 30,
        "batch_size": 60,
        "optimizer": {"name": "adamw", "lr": 0.01},
        "device": "cpu",
        "threads": 1,
        "checkpoint": {"every": 3},
    },
    "output": {"report": False},
}  # fmt: skip


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    folder = distill(RECIPE, folder=tmp_path_factory.mktemp("whole") / "run", progress=False).folder
    return load_file(folder / "student" / "model.safetensors")


@pytest.mark.parametrize(
    ("number", "code"),
    [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGKILL, -signal.SIGKILL)],
    ids=["SIGTERM", "Ctrl-C", "kill -9"],
)
def test_stopped_and_resumed(number: int, code: int, whole: dict[str, torch.Tensor], tmp_path: Path) -> None:
    path, folder = tmp_path / "recipe.yaml", tmp_path / "run"
    path.write_text(yaml.safe_dump(RECIPE))
    command = [sys.executable, "-m", "tutelage", "run", str(path), "--dir", str(folder), "--no-progress"]
    process = subprocess.Popen(
        command, env=os.environ | {"OMP_NUM_THREADS": "1"}, stderr=subprocess.PIPE, text=True
    )
    wait_for_step(folder, 40, process)
    process.send_signal(number)
    _, message = process.communicate(timeout=60)
    assert process.returncode == code, message
    if number != signal.SIGKILL:
        assert "tutelage resume" in message
    assert not (folder / "student").exists()
    resumed = distill(folder / "recipe.yaml", folder=folder, resume=True, progress=False)
    found = load_file(folder / "student" / "model.safetensors")
    assert all(torch.equal(value, found[name]) for name, value in whole.items())
    steps = [json.loads(line)["step"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert steps == sorted(steps)
    assert resumed.result["steps"] == 150


def wait_for_step(folder: Path, step: int, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 90
    while time.monotonic() < deadline:
        assert process.poll() is None, process.communicate()[1]
        log = folder / "metrics.jsonl"
        lines = log.read_text().splitlines() if log.exists() else []
        if len(lines) > 1 and json.loads(lines[-2])["step"] >= step:
            return
        time.sleep(0.005)
    raise AssertionError("the run did not come so far")


def test_two_runs_into_one_folder(tmp_path: Path) -> None:
    from tutelage.engine.checkpoint import FolderLock, RunLockedError

    folder = tmp_path / "run"
    folder.mkdir()
    with FolderLock(folder), pytest.raises(RunLockedError, match=r"run"):
        distill(RECIPE, folder=folder, progress=False)
    assert not (folder / "recipe.yaml").exists()
