"""Progress on the screen: a live bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text

if TYPE_CHECKING:
    from tutelage.engine.loop import Trainer

_SECONDS_BETWEEN_LINES = 5.0


def progress(label: str, console: Console | None = None) -> object:
    """The display that fits where output goes."""
    console = console or Console(stderr=True)
    return LiveProgress(label, console) if console.is_terminal else PlainProgress(label, console)


class LiveProgress:
    """A bar with time left, rows a second, every term and memory."""

    def __init__(self, label: str, console: Console) -> None:
        self.label = label
        self.bar = Progress(
            TextColumn("[bold]{task.description}"),
            BarColumn(bar_width=24),
            TextColumn("{task.completed}/{task.total}"),
            TimeRemainingColumn(),
            _Figures(),
            console=console,
            transient=True,
        )

    def on_fit_start(self, trainer: Trainer) -> None:
        self.task = self.bar.add_task(
            self.label, total=trainer.total_steps, completed=trainer.step, figures=""
        )
        self.bar.start()

    def on_step_end(self, trainer: Trainer) -> None:
        self.bar.update(self.task, completed=trainer.step)
        if trainer.record:
            self.bar.update(self.task, figures=figures(trainer.record, trainer.progress.metrics))

    def on_fit_end(self, trainer: Trainer) -> None:
        self.close()

    def close(self) -> None:
        self.bar.stop()


class PlainProgress:
    """A line now and then, where no terminal redraws."""

    def __init__(self, label: str, console: Console) -> None:
        self.label, self.console = label, console
        self._last = time.monotonic()

    def on_step_end(self, trainer: Trainer) -> None:
        now = time.monotonic()
        done = trainer.step == trainer.total_steps
        if trainer.record is None or (now - self._last < _SECONDS_BETWEEN_LINES and not done):
            return
        self._last = now
        seconds = trainer.progress.seconds
        left = seconds / trainer.step * (trainer.total_steps - trainer.step)
        self.console.print(
            f"{self.label}: step {trainer.step}/{trainer.total_steps}, {left:.0f} s left, "
            f"{figures(trainer.record, trainer.progress.metrics)}",
            highlight=False,
            soft_wrap=True,
            markup=False,
        )

    def close(self) -> None:
        """Nothing stays open."""


def figures(record: dict[str, Any], metrics: dict[str, float]) -> str:
    """Terms, speed, memory and the last evaluation in one line."""
    parts = [f"loss {record['loss']:.4g}"]
    if len(record["terms"]) > 1:
        parts.append("(" + " ".join(f"{name} {value:.3g}" for name, value in record["terms"].items()) + ")")
    parts.append(f"{record['samples_per_second']:.0f} samples/s")
    parts.append(f"{record['memory_mb']:.0f} MB")
    parts += [f"{name} {value:.4g}" for name, value in list(metrics.items())[:2]]
    return " ".join(parts)


class _Figures(ProgressColumn):
    def render(self, task: Task) -> Text:
        return Text(task.fields["figures"], style="dim")


def rows_progress(label: str, total: int, *, visible: bool = True) -> RowsProgress:
    """The display of work that is a number of rows."""
    return RowsProgress(label, total, Console(stderr=True, quiet=not visible))


class RowsProgress:
    """A bar with rows a second and time left on a terminal, a line now and then elsewhere."""

    def __init__(self, label: str, total: int, console: Console) -> None:
        self.label, self.total, self.console = label, total, console
        self._last = time.monotonic()
        self.bar = Progress(
            TextColumn("[bold]{task.description}"),
            BarColumn(bar_width=24),
            TextColumn("{task.completed}/{task.total} rows"),
            TimeRemainingColumn(),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self.task = self.bar.add_task(label, total=total)
        self.bar.start()

    def update(self, done: int) -> None:
        """So many rows are done."""
        self.bar.update(self.task, completed=done)
        now = time.monotonic()
        if not self.console.is_terminal and now - self._last >= _SECONDS_BETWEEN_LINES:
            self._last = now
            self.console.print(
                f"{self.label}: {done}/{self.total} rows", highlight=False, soft_wrap=True, markup=False
            )

    def close(self) -> None:
        self.bar.stop()
