"""Whole sharded runs on two processes: stopped anywhere, resumed, and shipped as one process would ship them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from killing import KillAt, Killed
from tutelage.models import load_model
from tutelage.runs import distill


def recipe(method: str, **train: Any) -> dict[str, Any]:
    return {
        "data": {"path": "digits", "limit": 96, "validation": 32, "test": 41},
        "teacher": {"model": "digits:mlp-24"},
        "student": {"model": "digits:cnn-4-6"},
        "method": {"name": "fitnet", "hint_layer": 1} if method == "fitnet" else method,
        "train": {
            "steps": 8,
            "batch_size": 16,
            "device": "cpu",
            "threads": 1,
            "sharding": "fsdp",
            "checkpoint": {"every": 3},
            **train,
        },
        "output": {"report": True},
    }


def run(values: dict[str, Any], folder: str, kill_at: int | None = None, resume: bool = False) -> Any:
    """The student's weights, or nothing where the run was killed."""
    callbacks = [KillAt(kill_at)] if kill_at else []
    try:
        done = distill(values, folder=folder, progress=False, resume=resume, callbacks=callbacks)
    except Killed:
        return None
    return {name: value.clone() for name, value in done.student.state_dict().items()}


@pytest.mark.parametrize(("method", "train"), [("kd", {"ema": 0.5}), ("dml", {}), ("fitnet", {})])
def test_a_killed_sharded_run_ends_with_the_same_bits(
    method: str, train: dict[str, Any], pair: Any, tmp_path: Path
) -> None:
    values = recipe(method, **train)
    first, second = pair.run(run, values, str(tmp_path / "whole"))
    assert first.keys() == second.keys()
    assert all(torch.equal(value, second[name]) for name, value in first.items())
    assert pair.run(run, values, str(tmp_path / "run"), 5) == [None, None]
    resumed, _ = pair.run(run, values, str(tmp_path / "run"), None, True)
    assert all(torch.equal(value, resumed[name]) for name, value in first.items())
    saved = load_file(tmp_path / "run" / "student" / "model.safetensors")
    assert all(torch.equal(value, saved[name]) for name, value in first.items())
    alone = load_model(tmp_path / "run" / "student").module.state_dict()
    assert all(torch.equal(value, alone[name]) for name, value in first.items()), "one process loads it"
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["status"] == "done"
    assert result["student"]["flops"] > 0
    assert result["teachers"]["teacher"]["flops"] > 0
    if method == "dml":
        load_model(tmp_path / "run" / "teachers" / "teacher")
    suffixes = {path.suffix for path in (tmp_path / "run" / "checkpoints").rglob("*") if path.is_file()}
    assert suffixes == {".safetensors", ".json"}
