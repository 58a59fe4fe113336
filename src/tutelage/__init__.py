"""Make a small model from a big one. Importing this package does not import torch."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tutelage.engine.loop import Trainer
    from tutelage.runs import RunResult, check, distill, resume

_HOMES = {
    "RunResult": "tutelage.runs",
    "Trainer": "tutelage.engine.loop",
    "check": "tutelage.runs",
    "distill": "tutelage.runs",
    "resume": "tutelage.runs",
}

__all__ = ["RunResult", "Trainer", "check", "distill", "resume"]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'tutelage' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
