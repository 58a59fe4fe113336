"""Type a command line, in this process or a fresh one; stand-ins for what verbs call."""

from __future__ import annotations

import subprocess
import sys
import types
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from tutelage.cli.app import app


def tutelage(*words: str) -> Result:
    return CliRunner().invoke(app, list(words), prog_name="tutelage", env={"COLUMNS": "200"})


def in_a_process(code: str) -> str:
    """Run Python in a fresh process, where nothing is imported yet."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return done.stdout


def stand_in(monkeypatch: pytest.MonkeyPatch, module: str, **members: Any) -> None:
    """Put a module with these members where a verb looks for it."""
    made = types.ModuleType(module)
    for name, member in members.items():
        setattr(made, name, member)
    parent, _, last = module.rpartition(".")
    monkeypatch.setitem(sys.modules, module, made)
    monkeypatch.setattr(sys.modules[parent], last, made, raising=False)


class Calls:
    """A function that notes its calls, says something on standard output, and returns or raises."""

    def __init__(self, outcome: Any) -> None:
        self.outcome, self.calls = outcome, list[tuple[tuple[Any, ...], dict[str, Any]]]()

    def __call__(self, *args: Any, **options: Any) -> Any:
        self.calls.append((args, options))
        print("chatter from deep inside")
        if isinstance(self.outcome, Exception):
            raise self.outcome
        return self.outcome
