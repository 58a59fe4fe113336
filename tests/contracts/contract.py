"""One short run for any name of the catalogue: on digits, or of language models on a language made on the spot."""

from __future__ import annotations

import copy
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
    "miniplm": {"reference_share": 0.5},
    "ddk": {"domain": "source", "interval": 2},
    # Fewer tokens than a micro-batch has.
    "sinkd": {"most_tokens": 9, "scale": 0.1},
    "seqkd": {"prompt_tokens": 2, "generation": {"beams": 2, "max_new_tokens": 6}},
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

TASKS = ("classification", "language-model")
"""What methods are held to here, each on the first that its ``Needs.tasks`` name."""
_IMAGES: dict[str, Any] = {
    "data": {
        "path": "digits",
        "limit": 64,
        "validation": 32,
        "test": 40,
        "views": [{"name": "crop", "padding": 1}],
    },
    "teacher": {"model": "digits:cnn-6-8"},
    "student": {"model": "digits:cnn-4-6"},
}
_SIZES = {"num_attention_heads": 2, "num_hidden_layers": 1}
_TOKENS: dict[str, Any] = {
    "task": "language-model",
    "data": {
        "path": "markov",
        "markov": {"symbols": 12, "rows": 136, "sources": [{"name": "a"}, {"name": "b", "order": 2}]},
        "columns": ["source"],
        "max_length": 8,
        "validation": 32,
        "test": 40,
    },
    "teacher": {
        "model": "config:llama",
        "options": _SIZES | {"hidden_size": 16, "intermediate_size": 32},
    },
    "student": {"model": "config:llama", "options": _SIZES | {"hidden_size": 8, "intermediate_size": 16}},
}


def tasks_of(name: str) -> list[str]:
    """Those of `TASKS` that a method, or several with ``+`` between them, is defined for; its own first one first."""
    needs = [catalogue.load(part).needs.tasks for part in name.split("+")]
    return [task for task in needs[0] if task in TASKS and all(task in other for other in needs)]


def on_tokens(name: str) -> bool:
    """Whether a method's run here is one of a language model."""
    return tasks_of(name)[0] == "language-model"


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
        **copy.deepcopy(_TOKENS if on_tokens(name) else _IMAGES),
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
