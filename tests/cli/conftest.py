"""Runs that are not run."""

from __future__ import annotations

import types
from pathlib import Path
from typing import Any

import pytest
from typed import Calls, stand_in

RESULT: dict[str, Any] = {
    "status": "done",
    "name": "kd",
    "train_seconds": 3.25,
    "test": {"accuracy": 0.9125, "loss": float("nan"), "accuracy[sex=1]": 0.5},
    "student": {"model": "digits:mlp-16", "parameters": 1234, "flops": 5_600_000, "latency_ms": 0.123},
    "teachers": {
        "teacher": {"model": "digits:cnn-4", "parameters": 2_000_000, "test": {"accuracy": 0.97, "loss": 0.1}}
    },
}
COMPARISON: dict[str, Any] = {
    "metric": "accuracy",
    "split": "test",
    "baseline": "none",
    "seeds": [0, 1],
    "teacher": {
        "model": "digits:cnn-4",
        "parameters": 2_000_000,
        "flops": None,
        "latency_ms": 1.5,
        "test": {"accuracy": 0.97},
    },
    "student": {"model": "digits:mlp-16", "parameters": 1234, "flops": 5_600_000, "latency_ms": 0.123},
    "methods": [
        {
            "name": "none",
            "options": {},
            "runs": [
                {"seed": 0, "status": "done", "error": None},
                {"seed": 1, "status": "done", "error": None},
            ],
            "mean": 0.9,
            "low": 0.88,
            "high": 0.92,
            "difference": None,
            "seconds": 3.2,
        },
        {
            "name": "kd",
            "options": {},
            "runs": [
                {"seed": 0, "status": "done", "error": None},
                {"seed": 1, "status": "failed", "error": "NaN in kd"},
            ],
            "mean": 0.915,
            "low": None,
            "high": None,
            "seconds": 180.0,
            "difference": {"mean": 0.015, "low": -0.004, "high": 0.034, "p": 0.1, "pairs": 1},
        },
    ],
}


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> types.SimpleNamespace:
    result = types.SimpleNamespace(folder=tmp_path / "here", result=RESULT)
    made = types.SimpleNamespace(
        distill=Calls(result),
        check=Calls({"method": "kd", "data": {"rows": 300}}),
        resume=Calls(result),
        compare=Calls(COMPARISON),
    )
    stand_in(monkeypatch, "tutelage.runs", distill=made.distill, check=made.check, resume=made.resume)
    stand_in(monkeypatch, "tutelage.runs.compare", compare=made.compare)
    return made
