"""Run and comparison folders in the documented format, filled with made-up figures."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

import yaml

RECIPE: dict[str, Any] = {
    "version": 1,
    "task": "classification",
    "data": {"path": "uoft-cs/cifar10", "image": "img", "target": "label", "train": "train", "limit": 5000},
    "teacher": {"recipe": "teachers/cifar10-resnet32x4.yaml"},
    "student": {"model": "cifar:resnet8x4"},
    "method": [{"name": "nkd", "weight": 1.0, "gamma": 1.5, "temperature": 1.0}],
    "train": {
        "epochs": 12,
        "batch_size": 128,
        "optimizer": {"name": "sgd", "lr": 0.05, "weight_decay": 0.0005, "momentum": 0.9},
        "schedule": {"name": "cosine", "warmup": 0.05},
        "precision": "fp32",
        "seed": 0,
    },
    "evaluation": {"every": 1, "batch_size": 256},
}
ENVIRONMENT: dict[str, Any] = {
    "python": "3.11.7",
    "tutelage": "0.1.0",
    "torch": "2.14.1",
    "platform": "Linux-6.1-x86_64",
    "cpu": "A CPU",
    "device": "cpu",
    "threads": 2,
    "commit": "0123456789abcdef0123456789abcdef01234567",
    "packages": {"timm": "1.0.20", "numpy": "2.4.6"},
}
DATA: dict[str, Any] = {
    "path": "uoft-cs/cifar10",
    "revision": None,
    "rows": {"train": 4500, "validation": 500, "test": 10000},
    "fingerprint": "9f2c" * 16,
}
STUDENT = {"model": "cifar:resnet8x4", "parameters": 1_233_540, "flops": 354_000_000, "latency_ms": 2.31}
TEACHER: dict[str, Any] = {
    "model": "cifar:resnet32x4",
    "parameters": 7_433_860,
    "flops": 2_173_000_000,
    "latency_ms": 9.87,
    "test": {"accuracy": 0.9312, "top5": 0.9975, "loss": 0.264, "calibration_error": 0.031},
}


def result(**changes: Any) -> dict[str, Any]:
    """A finished run's ``result.json``."""
    whole = {
        "status": "done",
        "error": None,
        "name": "nkd",
        "methods": ["nkd"],
        "seed": 0,
        "steps": 432,
        "epochs": 12,
        "seconds": 214.2,
        "train_seconds": 187.4,
        "validation": {
            "accuracy": 0.918,
            "top5": 0.99,
            "loss": 0.31,
            "calibration_error": 0.024,
            "agreement": 0.94,
        },
        "test": {
            "accuracy": 0.9132,
            "top5": 0.9941,
            "loss": 0.322,
            "calibration_error": 0.021,
            "agreement": 0.938,
        },
        "best": {"step": 396, "metric": "accuracy", "value": 0.92},
        "student": STUDENT,
        "teachers": {"teacher": TEACHER},
        "data": DATA,
        "tables": {},
        "versions": {"tutelage": "0.1.0"},
    }
    return whole | changes


def metrics(
    seed: int = 0,
    epochs: int = 12,
    per_epoch: int = 36,
    final: float = 0.918,
    terms: tuple[str, ...] = ("label", "nkd"),
) -> list[dict[str, Any]]:
    """Lines of ``metrics.jsonl`` of a run that learns."""
    draw = random.Random(seed)
    lines: list[dict[str, Any]] = []
    for step in range(1, epochs * per_epoch + 1):
        done = step / (epochs * per_epoch)
        values = {
            term: (2.3 / (i + 1)) * math.exp(-3 * done) + 0.12 + 0.06 * draw.random()
            for i, term in enumerate(terms)
        }
        lines.append(
            {
                "kind": "train",
                "step": step,
                "epoch": 1 + (step - 1) // per_epoch,
                "loss": sum(values.values()),
                "terms": values,
                "lr": {"main": 0.05 * 0.5 * (1 + math.cos(math.pi * done))},
                "grad_norm": 1.5 + 0.3 * draw.random(),
                "samples_per_second": 2900 + 200 * draw.random(),
                "seconds": 0.4 * step,
                "memory_mb": 210.0,
            }
        )
        if step % per_epoch == 0:
            accuracy = final - 0.5 * math.exp(-5 * done) + 0.008 * (draw.random() - 0.5)
            values = {
                "accuracy": accuracy,
                "loss": 1.4 - 1.2 * accuracy,
                "calibration_error": 0.09 * math.exp(-2 * done),
                "agreement": min(accuracy + 0.02, 1),
            }
            lines.append(
                {
                    "kind": "evaluation",
                    "split": "validation",
                    "step": step,
                    "epoch": step // per_epoch,
                    "metrics": values,
                }
            )
    return lines


def write_run(
    folder: Path,
    *,
    recipe: dict[str, Any] | None = None,
    lines: list[dict[str, Any]] | None = None,
    **changes: Any,
) -> Path:
    """A whole run folder."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "recipe.yaml").write_text(
        yaml.safe_dump(RECIPE if recipe is None else recipe, sort_keys=False), encoding="utf-8"
    )
    (folder / "environment.json").write_text(json.dumps(ENVIRONMENT), encoding="utf-8")
    rows = metrics() if lines is None else lines
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    (folder / "result.json").write_text(json.dumps(result(**changes)), encoding="utf-8")
    return folder


def write_comparison(
    folder: Path,
    *,
    means: dict[str, float] | None = None,
    seeds: int = 5,
    failed: dict[tuple[str, int], str] | None = None,
    **changes: Any,
) -> Path:
    """A comparison folder with a run folder for every run that did not fail."""
    failed = failed or {}
    means = means or {"none": 0.899, "kd": 0.9105, "nkd": 0.9142}
    draw = random.Random(1)
    methods: list[dict[str, Any]] = []
    for i, (name, mean) in enumerate(means.items()):
        runs = [
            _member(folder, name, seed, mean + 0.004 * (draw.random() - 0.5), i, failed.get((name, seed)))
            for seed in range(seeds)
        ]
        methods.append(_summary(name, runs, methods[0] if methods else None))
    folder.mkdir(parents=True, exist_ok=True)
    content = {
        "version": 1,
        "recipe": RECIPE,
        "metric": "accuracy",
        "higher_is_better": True,
        "baseline": next(iter(means)),
        "seeds": list(range(seeds)),
        "teacher": TEACHER,
        "student": STUDENT,
        "methods": methods,
        "environment": ENVIRONMENT,
        "seconds": 812.0,
    }
    (folder / "comparison.json").write_text(json.dumps(content | changes), encoding="utf-8")
    return folder


def _member(
    folder: Path, name: str, seed: int, value: float, position: int, error: str | None
) -> dict[str, Any]:
    place = f"{position}/seed-{seed}"
    if error is not None:
        return {
            "seed": seed,
            "status": "failed",
            "value": None,
            "metrics": {},
            "seconds": 1.0,
            "folder": place,
            "error": error,
        }
    found = {
        "accuracy": value,
        "loss": 1.5 - 1.3 * value,
        "calibration_error": 0.02 + 0.01 * position,
        "agreement": value + 0.02,
    }
    seconds = 31.0 + 9.0 * position + seed
    lines = metrics(seed + 10 * position, epochs=12, per_epoch=4, final=value)
    write_run(
        folder / place, lines=lines, name=name, methods=[name], seed=seed, test=found, train_seconds=seconds
    )
    return {
        "seed": seed,
        "status": "done",
        "value": value,
        "metrics": found,
        "seconds": seconds,
        "folder": place,
        "error": None,
    }


def _summary(name: str, runs: list[dict[str, Any]], baseline: dict[str, Any] | None) -> dict[str, Any]:
    values = {run["seed"]: run["value"] for run in runs if run["value"] is not None}
    mean, low, high = _spread(list(values.values()))
    times = [run["seconds"] for run in runs if run["value"] is not None]
    summary: dict[str, Any] = {
        "name": name,
        "options": {},
        "runs": runs,
        "mean": mean,
        "low": low,
        "high": high,
        "difference": None,
    }
    if baseline is not None:
        before = {run["seed"]: run["value"] for run in baseline["runs"]}
        pairs = [value - before[seed] for seed, value in values.items() if before[seed] is not None]
        middle, below, above = _spread(pairs)
        if middle is not None:
            summary["difference"] = {
                "mean": middle,
                "low": below,
                "high": above,
                "p": 0.0004 if below and above and below * above > 0 else 0.21,
            }
    return summary | {"seconds": sum(times) / len(times) if times else None}


def _spread(values: list[float]) -> tuple[float | None, float | None, float | None]:
    if not values:
        return None, None, None
    mean = sum(values) / len(values)
    if len(values) < 2:
        return mean, None, None
    reach = 2.78 * (sum((v - mean) ** 2 for v in values) / (len(values) - 1) / len(values)) ** 0.5
    return mean, mean - reach, mean + reach
