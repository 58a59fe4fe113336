"""One short run on digits for any name of the catalogue."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tutelage import catalogue
from tutelage.runs import RunResult, distill

STEPS = 6
OPTIONS: dict[str, dict[str, Any]] = {"wa": {"steps": 2, "memory_size": 20}, "crd": {"negatives": 16}}
"""Options without which a method does not fit into so short a run."""


def recipe(name: str, **train: Any) -> dict[str, Any]:
    values: dict[str, Any] = {
        "steps": STEPS,
        "batch_size": 16,
        "optimizer": {"name": "sgd", "lr": 0.05},
        "device": "cpu",
        "threads": 1,
        "checkpoint": {"every": 2},
    }
    values |= train
    return {
        "data": {
            "path": "digits",
            "limit": 64,
            "validation": 32,
            "test": 40,
            "views": [{"name": "crop", "padding": 1}],
        },
        "teacher": {"model": "digits:cnn-6-8"},
        "student": {"model": "digits:cnn-4-6"},
        "method": {"name": name, **OPTIONS.get(name, {})},
        "train": values,
        "output": {"report": False},
    }


def run(name: str, folder: Path, *, callbacks: Any = (), resume: bool = False, **train: Any) -> RunResult:
    return distill(recipe(name, **train), folder=folder, progress=False, callbacks=callbacks, resume=resume)


def losses(folder: Path) -> list[float]:
    """Every recorded loss of a run, those of a procedure's stages one after the other."""
    found: list[float] = []
    for path in sorted(folder.rglob("metrics.jsonl")):
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        found += [line["loss"] for line in lines if line["kind"] == "train"]
    return found


NAMES = catalogue.names()
