"""Many runs, one after another or in parallel processes: each finished at most once, with progress over all."""

from __future__ import annotations

import json
import multiprocessing
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

import tutelage.recipe as recipes
from tutelage.engine.interrupt import Interrupted
from tutelage.recipe.schema import Recipe
from tutelage.runs.execute import distill
from tutelage.runs.folder import FolderError, differing_field
from tutelage.runs.result import read_result
from tutelage.untrusted import read_object, visible

Json = dict[str, Any]


def finish_run(recipe: Recipe, folder: Path) -> Json:
    """``result.json`` of the run of ``recipe`` in ``folder``: a finished one is read back, a half one is resumed, one
    that failed is tried again from its last checkpoint. Raises what the run raises."""
    return distill(recipe, folder=folder, resume=True, progress=False).result


def finished_result(recipe: Recipe, folder: Path) -> Json | None:
    """``result.json`` where the run of ``recipe`` in ``folder`` is done, else None.

    Raises:
        FolderError: the folder holds a run of another recipe.
    """
    saved = folder / "recipe.yaml"
    if not saved.exists():
        return None
    difference = differing_field(recipes.load_recipe(saved), recipe)
    if difference:
        raise FolderError(
            f"{folder} holds a run of another recipe ({difference} differs); give another folder"
        )
    result = read_result(folder)
    return result if result is not None and result["status"] == "done" else None


def run_batch(
    function: Callable[..., Json], calls: Sequence[tuple[Any, ...]], *, jobs: int = 1
) -> Iterator[tuple[int, Json | BrokenProcessPool]]:
    """``(position, function(*calls[position]))`` as each call ends.

    With ``jobs`` above 1 the calls run in that many fresh processes, so ``function`` and its arguments must be
    picklable, and a script that calls this needs ``if __name__ == "__main__":``. A process that dies gives its error
    in place of the results that are still missing; what ``function`` raises is raised here.

    Raises:
        ValueError: ``jobs`` is below 1.
    """
    if jobs < 1:
        raise ValueError(f"jobs is {jobs}; allowed: 1 and above")
    if jobs == 1 or len(calls) < 2:
        yield from ((position, function(*call)) for position, call in enumerate(calls))
        return
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])  # imported once for all workers
    with ProcessPoolExecutor(min(jobs, len(calls)), mp_context=context, initializer=_end_with_parent) as pool:
        waiting = {pool.submit(_call, function, call): position for position, call in enumerate(calls)}
        try:
            for future in as_completed(waiting):
                try:
                    yield waiting[future], future.result()
                except BrokenProcessPool as error:
                    yield waiting[future], error
        except BaseException:
            pool.shutdown(wait=True, cancel_futures=True)
            raise


def usable_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _call(function: Callable[..., Json], arguments: tuple[Any, ...]) -> Json:
    try:
        return function(*arguments)
    except Interrupted as stop:
        # It takes more than its message to make, so it cannot cross a process boundary.
        raise KeyboardInterrupt(str(stop)) from None


def _end_with_parent() -> None:
    """A worker whose parent was killed must not go on: the next call would find its run in use."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


class BatchProgress:
    """A bar over all runs on a terminal, and a line for each that ended; elsewhere the lines alone. All of it goes to
    standard error."""

    def __init__(self, title: str, total: int, *, show: bool = True, console: Console | None = None) -> None:
        self.title, self.total, self.ended, self.show = title, total, 0, show
        self.console = console or Console(stderr=True, soft_wrap=True, highlight=False)
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        live = show and self.console.is_terminal
        self._bar = Progress(
            *columns,
            TextColumn("left"),
            TimeRemainingColumn(),
            console=self.console,
            disable=not live,
            transient=True,
        )
        self._task = self._bar.add_task(title, total=total)

    def __enter__(self) -> BatchProgress:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def advance(self, line: str) -> None:
        """One run ended; ``line`` says which and how."""
        self.ended += 1
        if self.show:
            place = f"{self.ended:>{len(str(self.total))}}/{self.total}"
            self.console.print(visible(f"{self.title} {place}  {line}"), markup=False)
        self._bar.advance(self._task)


def read_json(path: Path) -> Json | None:
    """The object in a JSON file; None where there is no such file.

    Raises:
        FileError: the file is damaged.
    """
    try:
        return read_object(path)
    except FileNotFoundError:
        return None


def write_text(path: Path, text: str) -> None:
    """Write by rename: the file is complete, or as it was."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".tmp-{path.name}")
    beside.unlink(missing_ok=True)  # never written through a link that lies there
    beside.write_text(text, encoding="utf-8")
    beside.replace(path)


def write_json(path: Path, content: Json) -> None:
    """Write an object as JSON, by rename."""
    write_text(path, json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n")
