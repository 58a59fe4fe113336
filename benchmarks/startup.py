"""What one waits for before anything happens: imports, and the command line's help. Each in a fresh process."""

from __future__ import annotations

import subprocess
import sys
from functools import partial

import torch

from benchmarks.harness import Bar, Benchmark, Sides


def python(*arguments: str) -> None:
    subprocess.run([sys.executable, *arguments], check=True, stdout=subprocess.DEVNULL)


def imports(device: torch.device, *, statement: str) -> Sides:
    return Sides(partial(python, "-c", statement), partial(python, "-c", "import torch"))


def help_text(device: torch.device) -> Sides:
    return Sides(partial(python, "-m", "tutelage", "--help"))


BENCHMARKS = [
    Benchmark(
        f"import.{name}",
        f"`{statement}` in a fresh process",
        "`import torch`",
        Bar(1.15),
        partial(imports, statement=statement),
    )
    for name, statement in {
        "tutelage": "import tutelage",
        "functional": "from tutelage.functional import nkd_loss",
    }.items()
] + [Benchmark("import.help", "`tutelage --help` in a fresh process", "nothing", Bar(1.0, "s"), help_text)]
