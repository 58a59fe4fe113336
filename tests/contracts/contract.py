"""One short run on digits for any name of the catalogue."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tutelage import catalogue
from tutelage.runs import RunResult, distill

STEPS = 6
OPTIONS: dict[str, dict[str, Any]] = {
    "wa": {"steps": 2, "memory_size": 20},
    "crd": {"negatives": 16},
    "mcmi": {"epochs": 1, "batch_size": 16, "pictures": 1},
    "tgeo_kd": {"outer_every": 2, "warmup": 0.0},
    # A store holds the views of training alone; two ranks draw other dropout than one.
    "nd": {"means_transform": "train", "projection_dropout": 0.0},
}
"""Options without which a method does not fit into so short a run."""

_MASKED = {"decoder_width": 8, "decoder_depth": 1, "decoder_heads": 2, "finetune": {"steps": STEPS}}
OPTIONS |= {"dmae": _MASKED, "mae": _MASKED}
_VIT = {"patch_size": 2, "embed_dim": 8, "depth": 2, "num_heads": 2, "global_pool": "avg"}
_TRANSFORMERS = {
    "teacher": {"model": "timm:vit_tiny_patch16_224", "options": _VIT | {"embed_dim": 12}},
    "student": {"model": "timm:vit_tiny_patch16_224", "options": _VIT},
}
MODELS: dict[str, dict[str, Any]] = {"dmae": _TRANSFORMERS, "mae": _TRANSFORMERS}
"""Models of those that do not take just any."""


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
        **MODELS.get(name, {}),
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
