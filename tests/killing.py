"""Stops a run at a step, or inside a save, as a kill would."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import pytest

import tutelage.procedures.run as journal
from tutelage.engine import checkpoint_files


class Killed(BaseException):
    """Stands for a kill: nothing catches it."""


class KillAt:
    """Ends a run at its n-th step, counted over all Trainers, with nothing saved."""

    def __init__(self, step: int) -> None:
        self.left = step

    def on_step_end(self, trainer: Any) -> None:
        self.left -= 1
        if self.left == 0:
            raise Killed


def stop_after(step: int, start: Callable[[KillAt], Any]) -> None:
    with pytest.raises(Killed):
        start(KillAt(step))


class DiskChanges:
    """Counts what a run does to the files of checkpoints and journal, and ends it at the n-th such change: in the
    middle of it where something is written, else before it.

    Every call that makes, writes, flushes, moves or removes something counts. Once dead it does nothing more.
    """

    CALLS: ClassVar[list[tuple[Any, str]]] = [
        (Path, "mkdir"),
        (Path, "write_bytes"),
        (Path, "write_text"),
        (Path, "rename"),
        (Path, "replace"),
        (checkpoint_files, "sync"),
        (checkpoint_files, "save_file"),
        (journal, "save_file"),
        (shutil, "rmtree"),
    ]
    PLACES: ClassVar[set[str]] = {"checkpoints", "once"}

    def __init__(self, kill_at: int | None = None) -> None:
        self.kill_at = kill_at
        self.seen: list[str] = []
        """Where each change was: ``checkpoints`` or ``once`` (the journal)."""
        self._patch = pytest.MonkeyPatch()

    def __enter__(self) -> DiskChanges:
        for owner, name in self.CALLS:
            self._patch.setattr(owner, name, self._watched(getattr(owner, name)))
        return self

    def __exit__(self, *_: object) -> None:
        self._patch.undo()

    def _watched(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def watched(*arguments: Any, **options: Any) -> Any:
            path = next(each for each in arguments if isinstance(each, Path))
            if place := self.PLACES & set(path.parts):
                self.seen += place
                if len(self.seen) == self.kill_at:
                    _half(path, call, arguments)
                if self.kill_at is not None and len(self.seen) >= self.kill_at:
                    raise Killed
            return call(*arguments, **options)

        return watched


def _half(path: Path, call: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    """Begin to write what would have been written."""
    if call.__name__ in ("write_text", "write_bytes"):
        call(path, arguments[1][: len(arguments[1]) // 2])
    elif call.__name__ == "save_file":
        with path.open("wb") as file:
            file.write(b"half of it")
