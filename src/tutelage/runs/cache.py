"""From a recipe to a store of its teacher's outputs."""

from __future__ import annotations

import time
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from tutelage.data import Data
from tutelage.engine.interrupt import Interrupted, StopRequest
from tutelage.engine.progress import rows_progress
from tutelage.runs.cache_job import CacheJob
from tutelage.runs.execute import RecipeSource, cpu_threads, load_source
from tutelage.runs.teachers import teacher_configs
from tutelage.teachers.manifest import Manifest
from tutelage.teachers.writing import StoreWriter, check_folder, free_bytes, store_bytes


class CacheInterrupted(Interrupted):
    """The store is not finished; what is written stays."""

    def __init__(self, number: int, folder: Path, rows: int, total: int) -> None:
        super().__init__(number, rows)
        self.args = (
            f"stopped with {rows} of {total} rows in {folder}; the same command goes on from the last whole file",
        )


@dataclass(frozen=True)
class CacheResult:
    """A finished store.

    Attributes:
        made: shards that this call wrote; none: all was there and whole.
        seconds: that it took.
        bytes: size of all its files.
    """

    folder: Path
    manifest: Manifest
    made: tuple[int, ...]
    made_rows: int
    seconds: float
    bytes: int


@dataclass(frozen=True)
class Estimate:
    """What a store would take, in all: bytes of its files, and seconds of the processes here, from a few batches.
    ``error`` is what its form loses on those, as `tutelage.teachers.measuring.ErrorMeter` names it."""

    rows: int
    views: int
    files: int
    bytes: int
    free: int
    seconds: float
    rows_per_second: float
    error: dict[str, float]


def cache(
    recipe: RecipeSource,
    folder: Path | str,
    *,
    teacher: str | None = None,
    data: Data | None = None,
    progress: bool | None = None,
) -> CacheResult:
    """Store the teacher's outputs for every view that a run of the recipe draws of every training row.

    A store that was begun is gone on with, one that is damaged is mended, a whole one is only read. Several processes
    may work on one.

    Args:
        folder: the store's.
        teacher: which one, where the recipe has several.
        data: rows from Python, in place of the recipe's.
        progress: show it; left out: yes, in the first process.

    Raises:
        StoreError: the folder holds another store, the disk has no room, or an output cannot be stored.
        PairingError, ValueError: what a run of the recipe would refuse, or a method that no store can serve.
        CacheInterrupted: asked to stop.
    """
    loaded, title = load_source(recipe)
    with cpu_threads(loaded.train.threads):
        if any(config.recipe for config in teacher_configs(loaded).values()):
            CacheJob.of(
                loaded, teacher, dry=True, show_progress=False
            )  # what is wrong shows before a teacher is trained
        job = CacheJob.of(loaded, teacher, data, dry=False, show_progress=progress)
        runtime = job.assembly.runtime
        writer = StoreWriter(Path(folder), job.plan, job.ids)
        shown = rows_progress(
            f"caching {title}", job.plan.total, visible=runtime.is_main and progress is not False
        )
        started = time.perf_counter()
        with closing(shown), StopRequest(runtime) as stop:
            done = writer.fill(
                job.answer,
                first=runtime.rank * job.plan.shards // runtime.world,
                report=shown.update,
                stop=lambda: stop.signal != 0,
            )
        if not done:
            raise CacheInterrupted(stop.signal, Path(folder), writer.done, job.plan.total)
        seconds = time.perf_counter() - started
        rows = sum(len(job.plan.span(shard)) for shard in writer.made)
        manifest = writer.finish(job.metrics)
        size = sum(file.stat().st_size for file in Path(folder).iterdir())
        return CacheResult(Path(folder), manifest, tuple(writer.made), rows, seconds, size)


def estimate(
    recipe: RecipeSource, folder: Path | str, *, teacher: str | None = None, data: Data | None = None
) -> Estimate:
    """What `cache` would take; nothing is written. A teacher that would be trained first has random weights here, and
    its training is not counted.

    Raises:
        StoreError, PairingError, ValueError: what `cache` would refuse, a full disk excepted.
    """
    loaded, _ = load_source(recipe)
    with cpu_threads(loaded.train.threads):
        job = CacheJob.of(loaded, teacher, data, dry=True)
        if not job.trained_first:
            check_folder(Path(folder), job.plan)
        rate, error = job.trial()
        held_out = sum(len(source) for source in job.held_out.values())
        return Estimate(
            rows=job.plan.data.rows,
            views=job.plan.views.number,
            files=job.plan.shards,
            bytes=store_bytes(job.plan, error, job.metrics_unmeasured()),
            free=free_bytes(Path(folder)),
            seconds=(job.plan.total + held_out) / rate / job.assembly.runtime.world,
            rows_per_second=rate,
            error=error,
        )
