"""`tutelage compare` with two workers against one that has all threads."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path

import torch

from benchmarks.harness import Bar, Benchmark, Sides, Skipped

_WORKERS = 2
_SEEDS = 5


def compare(teachers: tempfile.TemporaryDirectory[str], *options: str) -> None:
    """One comparison. The first trains its teacher and keeps it in the folder, the others reuse it."""
    with tempfile.TemporaryDirectory() as folder:
        arguments = [
            *("-m", "tutelage", "compare", "digits", "--methods", "none,kd,nkd", "--seeds", str(_SEEDS)),
            *("--dir", str(Path(folder, "comparison")), "--no-progress", *options),
        ]
        environment = os.environ | {"TUTELAGE_TEACHERS": teachers.name}
        subprocess.run([sys.executable, *arguments], env=environment, check=True, stdout=subprocess.DEVNULL)


def workers(device: torch.device) -> Sides:
    if device.type != "cpu":
        raise Skipped("runs on an accelerator share it, and go one after another")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if cores < _WORKERS:
        raise Skipped(f"{_WORKERS} workers need as many cores")
    teachers = tempfile.TemporaryDirectory()
    ours = partial(compare, teachers, "--jobs", str(_WORKERS))
    ours()
    return Sides(
        ours,
        partial(compare, teachers, "--jobs", "1", f"train.threads={cores}"),
        note=f"{cores} cores",
    )


BENCHMARKS = [
    Benchmark(
        "compare.workers",
        f"`tutelage compare digits` with none, kd and nkd, {_SEEDS} seeds, `--jobs {_WORKERS}`, one thread a run",
        "the same with `--jobs 1` and all threads",
        Bar(1 / 1.15),
        workers,
        slow=True,
    )
]
