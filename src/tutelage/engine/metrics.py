"""Every figure as a JSON line, and to trackers by name."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tutelage.engine.writing import write_whole, writing

if TYPE_CHECKING:
    from tutelage.engine.loop import Trainer


def step_record(trainer: Trainer, totals: dict[str, Tensor], norm: Tensor) -> dict[str, Any]:
    """The figures of the step just done: a function of the step, not of when one looks."""
    *terms, norm_value = torch.stack([*totals.values(), norm.to(torch.float32)]).tolist()
    seconds = trainer.progress.seconds
    return {
        "step": trainer.step,
        "epoch": (trainer.step - 1) // trainer.loader.steps_per_epoch + 1,
        "loss": math.fsum(terms),
        "terms": dict(zip(totals, terms, strict=True)),
        "lr": {name: optim.lr for name, optim in trainer.optimizers.items()},
        "grad_norm": norm_value,
        "samples_per_second": trainer.step * trainer.config.batch_size / seconds if seconds else 0.0,
        "seconds": seconds,
        "memory_mb": _memory_mb(trainer.runtime.device),
    }


class MetricsLog:
    """Callback that writes ``metrics.jsonl``, and to trackers, which `check_trackers` has found. On resume, lines of
    later steps are dropped first."""

    def __init__(self, folder: Path, trackers: tuple[str, ...] = ()) -> None:
        self.path = folder / "metrics.jsonl"
        self._trackers = [_tracker(name, folder) for name in trackers]

    def on_fit_start(self, trainer: Trainer) -> None:
        # Test metrics come after the last step: they will be measured anew.
        lines = read_metrics(self.path)
        kept = [line for line in lines if line["step"] <= trainer.step and line.get("split") != "test"]
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(self.path, "".join(json.dumps(line) + "\n" for line in kept))

    def on_step_end(self, trainer: Trainer) -> None:
        if trainer.record:
            self.write({"kind": "train", **trainer.record})

    def on_evaluation(self, trainer: Trainer, metrics: dict[str, float]) -> None:
        self.evaluation("validation", trainer.step, trainer.epoch, metrics)

    def evaluation(self, split: str, step: int, epoch: int, metrics: dict[str, float]) -> None:
        self.write({"kind": "evaluation", "split": split, "step": step, "epoch": epoch, "metrics": metrics})

    def write(self, line: dict[str, Any]) -> None:
        with writing(self.path), self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        values = _flat(line)
        for tracker in self._trackers:
            tracker.log(values, step=line["step"])

    def close(self) -> None:
        for tracker in self._trackers:
            tracker.finish()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Lines of a metrics file; a last line torn by a kill is left out.

    Raises:
        ValueError: another line is damaged.
    """
    if not path.exists():
        return []
    lines = path.read_bytes().splitlines()
    found = []
    for i, line in enumerate(lines):
        try:
            figures = json.loads(line)
        except (ValueError, RecursionError):
            figures = None
        if isinstance(figures, dict) and isinstance(figures.get("step"), int):
            found.append(figures)
        elif i < len(lines) - 1:
            shown = line[:60].decode(errors="replace")
            raise ValueError(f"{path}, line {i + 1} is damaged: {shown!r}; remove the line")
    return found


def _flat(line: dict[str, Any]) -> dict[str, float]:
    split = line.get("split", "train")
    values: dict[str, float] = {}
    for key, value in line.items():
        if isinstance(value, dict):
            values |= {f"{split}/{key}/{inner}": number for inner, number in value.items()}
        elif isinstance(value, (int, float)) and key != "step":
            values[f"{split}/{key}"] = value
    return values


def check_trackers(names: Sequence[str]) -> None:
    """Raises ValueError where a tracker's package is not installed."""
    if not names:
        return
    from accelerate.tracking import get_available_trackers

    installed = [getattr(kind, "value", kind) for kind in get_available_trackers()]
    missing = [name for name in names if name not in installed]
    if missing:
        raise ValueError(
            f"output.trackers has {', '.join(missing)}, which {'is' if len(missing) == 1 else 'are'} not installed; "
            f"pip install {' '.join(missing)}, or leave it out"
        )


def _tracker(name: str, folder: Path) -> Any:
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS

    tracker_class = LOGGER_TYPE_TO_CLASS[name]
    if tracker_class.requires_logging_directory:
        tracker = tracker_class(name, logging_dir=str(folder))
    else:
        tracker = tracker_class(folder.name)
    if hasattr(tracker, "start"):
        tracker.start()
    return tracker


def _memory_mb(device: torch.device) -> float:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)
