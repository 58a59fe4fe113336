"""``analysis.json``, ``explain.json`` and tuned comparisons in the documented format, made up."""

from __future__ import annotations

import base64
import io
import json
import random
from pathlib import Path
from typing import Any

from PIL import Image

CALIBRATION = {
    "count": [0, 3, 40, 57],
    "confidence": [None, 0.4, 0.62, 0.95],
    "accuracy": [None, 0.0, 0.5, 0.9],
}


def picture(side: int = 8, seed: int = 0) -> str:
    """A colour picture of noise (which no packing makes smaller) as the analysis writes it."""
    noise = random.Random(seed).randbytes(3 * side * side)
    written = io.BytesIO()
    Image.frombytes("RGB", (side, side), noise).save(written, format="PNG")
    return "data:image/png;base64," + base64.b64encode(written.getvalue()).decode("ascii")


def analysis(classes: int = 10, *, examples: int = 12, side: int | None = 8) -> dict[str, Any]:
    """Of a student that takes some of each class for the next one, and a teacher that does so less often.

    ``side`` is the pictures'; none: rows are no pictures.
    """
    return {
        "split": "test",
        "classes": [f"class {i}" for i in range(classes)],
        "rows": 10 * classes,
        "student": _model(classes, wrong=3),
        "teacher": _model(classes, wrong=1),
        "agreement": [0.8] * classes,
        "examples": [
            {
                "row": 100 + i,
                "target": i % classes,
                "student": {"class": (i + 1) % classes, "confidence": 0.91},
                "teacher": {"class": i % classes, "confidence": 0.99},
                "picture": None if side is None else picture(side, i),
            }
            for i in range(examples)
        ],
    }


def _model(classes: int, wrong: int) -> dict[str, Any]:
    """Each class has 10 rows, the first has ``wrong`` wrong ones more than the others."""
    counts = [[0] * classes for _ in range(classes)]
    for i, row in enumerate(counts):
        row[(i + 1) % classes] = wrong * (2 if i == 0 else 1)
        row[i] = 10 - row[(i + 1) % classes]
    pairs = [[i, j, counts[i][j]] for i in range(classes) for j in [(i + 1) % classes]]
    return {
        "recall": [row[i] / 10 for i, row in enumerate(counts)],
        "confusion": counts if classes <= 50 else None,
        "confused": pairs[:20],
        "calibration": CALIBRATION,
    }


def explained(*teachers: str) -> dict[str, Any]:
    """Three layers of the student, two of each teacher."""
    theirs = {
        "model": "digits:mlp-64",
        "layers": ["layer1", "logits"],
        "cka": [[0.9, 0.4], [0.55, 0.5], [0.3, 0.8]],
    }
    return {
        "split": "test",
        "rows": 512,
        "student": {"model": "digits:mlp-16", "layers": ["layer1", "layer2", "logits"]},
        "teachers": dict.fromkeys(teachers or ("teacher",), theirs),
    }


def write_analysis(folder: Path, found: dict[str, Any], layers: dict[str, Any] | None = None) -> Path:
    (folder / "analysis.json").write_text(json.dumps(found), encoding="utf-8")
    if layers is not None:
        (folder / "explain.json").write_text(json.dumps(layers), encoding="utf-8")
    return folder


def tuning(*values: float | None, seed: int = 9) -> dict[str, Any]:
    """A search of two options; trials without a value failed, and the best was chosen."""
    trials: list[dict[str, Any]] = [
        {
            "number": i,
            "values": {"train.optimizer.lr": 0.05 * (i + 1), "method.temperature": 4.0 + i},
            "value": value,
            "seconds": 10.0,
            "error": None if value is not None else "FloatingPointError: loss is not finite",
        }
        for i, value in enumerate(values)
    ]
    scored = [trial for trial in trials if trial["value"] is not None]
    return {
        "ranges": {"train.optimizer.lr": [0.0125, 0.2], "method.temperature": [1.0, 8.0]},
        "seed": seed,
        "trials": trials,
        "chosen": max(scored, key=lambda trial: trial["value"])["values"] if scored else None,
        "seconds": 10.0 * len(trials),
    }


def tune_comparison(folder: Path, searches: dict[str, dict[str, Any]]) -> Path:
    """Adds what was searched, by method, and p values corrected for the number of methods."""
    path = folder / "comparison.json"
    saved = json.loads(path.read_text(encoding="utf-8"))
    differences = [method["difference"] for method in saved["methods"] if method["difference"]]
    for difference in differences:
        difference["p_adjusted"] = min(1.0, len(differences) * difference["p"])
    for method in saved["methods"]:
        method["tuning"] = searches.get(method["name"])
    saved["trials"] = max(len(search.get("trials", [])) for search in searches.values())
    path.write_text(json.dumps(saved), encoding="utf-8")
    return folder
