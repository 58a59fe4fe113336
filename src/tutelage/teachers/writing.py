"""Stores, written: shard by shard, by any number of processes at once, each shard complete or absent.

A shard is a fixed range of the store's rows, and its bytes depend on the plan alone. So a writer that is killed loses
the shard it was at; the next one takes what is whole and goes on, and the store comes out the same.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
from safetensors.torch import save
from torch import Tensor

from tutelage.engine.types import Outputs
from tutelage.engine.writing import file_sha256
from tutelage.teachers.forms import Column, Columns
from tutelage.teachers.manifest import (
    IDS,
    MANIFEST,
    PLAN,
    Manifest,
    Plan,
    ShardRecord,
    SplitMetrics,
    StoreError,
    difference,
    read_part,
    record_name,
    shard_name,
    text_of,
    write_part,
    write_whole,
)
from tutelage.teachers.measuring import ErrorMeter
from tutelage.teachers.store import layout_of, read_ids

LOCK = ".lock"
_POLL_SECONDS = 0.2
_CHECKSUM = "0" * 64
_HEADER = 8
"""Bytes that a safetensors file begins with, and what its header is filled up to a multiple of."""

Answer = Callable[[Tensor, Tensor], tuple[Tensor, Outputs]]
"""From the ranks of rows among the ascending ids and their views, both ``[rows]``: their ids, and the teacher's
outputs."""
Report = Callable[[int], None]
"""Told after every batch how many rows are done in all."""


class StoreWriter:
    """One process that works on a store; others may do so at the same time.

    Args:
        folder: empty, missing, or a store of the same plan, half-written, finished or damaged.
        plan: what the store is to be.
        ids: of the rows, ascending.

    Raises:
        StoreError: the folder holds something else, or a store of another plan: the field that differs is named.
    """

    def __init__(self, folder: Path, plan: Plan, ids: Tensor) -> None:
        self.folder, self.plan, self.ids = Path(folder), plan, ids
        self.layout = layout_of(plan)
        self.done = 0
        """Rows that are known to be stored."""
        self.made: list[int] = []
        """Shards that this process wrote."""
        check_folder(self.folder, plan)
        _check_space(self)

    def fill(self, answer: Answer, *, first: int, report: Report, stop: Callable[[], bool]) -> bool:
        """Write what is missing. It takes turns with other processes, and takes over what one that died has left.

        Args:
            first: where to begin among the shards, so that several processes do not begin with the same.
            stop: asked after every batch whether to leave.

        Returns:
            Whether all shards are there; not so where it was stopped.

        Raises:
            StoreError: the disk has no room for what is missing, or an output cannot be stored.
            OSError: the disk refuses.
        """
        self._begin()
        pending = [*range(first, self.plan.shards), *range(min(first, self.plan.shards))]
        while pending:
            held = []
            for shard in pending:
                if stop():
                    return False
                with self._claim(shard) as mine:
                    if not mine:
                        held.append(shard)
                    elif self.record(shard) is not None:
                        self._count(shard, report)
                    elif not self._write(shard, answer, report, stop):
                        return False
            if held:
                time.sleep(_POLL_SECONDS)
            pending = held
        return True

    def finish(self, measure: Callable[[], dict[str, SplitMetrics]]) -> Manifest:
        """The manifest, written once all shards are there. ``measure`` gives the teacher's own metrics."""
        with self._claim(self.plan.shards, wait=True):
            records = [self.record(shard, trusted=True) for shard in range(self.plan.shards)]
            missing = [shard_name(shard) for shard, record in enumerate(records) if record is None]
            if missing:
                raise StoreError(
                    f"{self.folder}: {', '.join(missing[:3])} vanished while the store was written"
                )
            shards = tuple(record for record in records if record is not None)
            with suppress(FileNotFoundError, StoreError):
                found = read_part(Manifest, self.folder / MANIFEST)
                if found.shards == shards and difference(found.plan, self.plan) is None:
                    return found
            manifest = Manifest(plan=self.plan, shards=shards, metrics=measure())
            write_part(self.folder / MANIFEST, manifest)
            return manifest

    def record(self, shard: int, *, trusted: bool = False) -> ShardRecord | None:
        """What is known of a shard; none where it is missing, or not what was written.

        Args:
            trusted: its size alone is held against its record, not its checksum.
        """
        path = self.folder / shard_name(shard)
        try:
            record = read_part(ShardRecord, self.folder / record_name(shard))
            same = path.stat().st_size == record.bytes and record.rows == len(self.plan.span(shard))
            return record if same and (trusted or file_sha256(path) == record.sha256) else None
        except (FileNotFoundError, StoreError):
            return None

    def _begin(self) -> None:
        """Make the folder, and say what it is to hold."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with self._claim(self.plan.shards, wait=True):
            check_folder(self.folder, self.plan)  # again: another process may have begun here
            if not self._has_ids():
                write_whole(self.folder / IDS, save({"index": self.ids}))
            if not self._has_plan():
                write_part(self.folder / PLAN, self.plan)

    def _has_ids(self) -> bool:
        try:
            return len(read_ids(self.folder, self.plan)) == len(self.ids)
        except StoreError:
            return False

    def _has_plan(self) -> bool:
        try:
            return difference(read_part(Plan, self.folder / PLAN), self.plan) is None
        except (FileNotFoundError, StoreError):
            return False

    def _count(self, shard: int, report: Report) -> None:
        self.done += len(self.plan.span(shard))
        report(self.done)

    def _write(self, shard: int, answer: Answer, report: Report, stop: Callable[[], bool]) -> bool:
        """One shard; whether it was ended."""
        span, size = self.plan.span(shard), self.plan.batch_size
        columns = _empty(self.layout.columns, len(span))
        meter = ErrorMeter(self.layout, self.plan.task) if shard == 0 else None
        before = self.done
        for start in range(span.start, span.stop, size):
            places = torch.arange(start, min(start + size, span.stop))
            rank, view = places % self.plan.data.rows, places // self.plan.data.rows
            index, outputs = answer(rank, view)
            encoded = self.layout.encode(outputs, index, view)
            if meter:
                meter.update(outputs, encoded)
            rows = slice(start - span.start, start - span.start + len(places))
            for name, column in encoded.items():
                columns[name][rows] = column.cpu()
            report(before + rows.stop)
            if stop():
                return False
        self._place(shard, columns, meter.result() if meter else {})
        self.done = before + len(span)
        self.made.append(shard)
        return True

    def _place(self, shard: int, columns: Columns, error: dict[str, float]) -> None:
        content = save(columns, metadata={"tutelage": self.plan.mark(shard)})
        record = ShardRecord(
            rows=len(self.plan.span(shard)),
            bytes=len(content),
            sha256=hashlib.sha256(content).hexdigest(),
            error=error,
        )
        write_whole(self.folder / shard_name(shard), content)
        write_part(self.folder / record_name(shard), record)

    @contextmanager
    def _claim(self, number: int, *, wait: bool = False) -> Iterator[bool]:
        """Hold one byte of the lock file: a shard's number, or behind them the one for the folder as a whole. It ends
        with the process, however that ends; children do not inherit it."""
        descriptor = os.open(self.folder / LOCK, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB), 1, number)
        except (BlockingIOError, PermissionError):
            os.close(descriptor)
            yield False
            return
        try:
            yield True
        finally:
            os.close(descriptor)


def check_folder(folder: Path, plan: Plan) -> None:
    """Whether a store may be made, or gone on with, in a folder. Nothing is written.

    Raises:
        StoreError: it may not.
    """
    if folder.exists() and not folder.is_dir():
        raise StoreError(f"{folder} is a file; give a folder for the store")
    found = _found_plan(folder)
    if found is None:
        others = [path.name for path in folder.glob("*") if not path.name.startswith((LOCK, ".tmp-"))]
        strange = sorted(set(others) - {IDS, PLAN, MANIFEST})
        if strange:
            raise StoreError(f"{folder} is not empty and holds no store ({strange[0]}); give another --dir")
        return
    differing = difference(found, plan)
    if differing:
        field, theirs, ours = differing
        raise StoreError(
            f"{folder} holds a store of something else: {field} is {_short(theirs)} there and {_short(ours)} here; "
            "give another --dir"
        )
    if found.made_by != plan.made_by:
        changes = [
            f"{name} {found.made_by.get(name)} → {ours}"
            for name, ours in plan.made_by.items()
            if found.made_by.get(name) != ours
        ]
        warnings.warn(
            f"{folder} was begun elsewhere ({', '.join(changes)}): further shards may differ in their last bits",
            stacklevel=2,
        )


def _found_plan(folder: Path) -> Plan | None:
    """The plan of the store in a folder; from the manifest, where its own file is damaged."""
    damage: StoreError | None = None
    try:
        return read_part(Plan, folder / PLAN)
    except FileNotFoundError:
        pass
    except StoreError as error:
        damage = error
    try:
        return read_part(Manifest, folder / MANIFEST).plan
    except FileNotFoundError:
        pass
    except StoreError as error:
        damage = damage or error
    if damage and not any(folder.glob("shard-*")):
        return None  # nothing is lost with it
    if damage:
        raise StoreError(f"{damage}; if it cannot, remove the folder")
    return None


def store_bytes(plan: Plan, error: dict[str, float], metrics: dict[str, SplitMetrics]) -> int:
    """Size of the finished store, all files together.

    Args:
        error, metrics: as the manifest will have them; only how long they are written counts.
    """
    sizes = {rows: _shard_bytes(plan, rows) for rows in {len(plan.span(s)) for s in (0, plan.shards - 1)}}
    records = tuple(
        ShardRecord(
            rows=len(plan.span(s)),
            bytes=sizes[len(plan.span(s))],
            sha256=_CHECKSUM,
            error={} if s else error,
        )
        for s in range(plan.shards)
    )
    manifest = Manifest(plan=plan, shards=records, metrics=metrics)
    ids = _file_bytes({"index": Column(torch.int64, ())}, plan.data.rows, None)
    notes = sum(len(text_of(part).encode()) for part in (plan, manifest, *records))
    return sum(record.bytes for record in records) + ids + notes


def _shard_bytes(plan: Plan, rows: int) -> int:
    return _file_bytes(layout_of(plan).columns, rows, plan.mark(0))


def _file_bytes(columns: dict[str, Column], rows: int, mark: str | None) -> int:
    """Size of a safetensors file: a length, the header in JSON filled up with spaces, and the tensors."""
    header: dict[str, object] = {"__metadata__": {"tutelage": mark}} if mark else {}
    end = 0
    for name, column in sorted(columns.items(), key=lambda item: (-item[1].dtype.itemsize, item[0])):
        begin, end = end, end + rows * column.dtype.itemsize * torch.Size(column.shape).numel()
        header[name] = {
            "dtype": _TYPE_NAMES[column.dtype],
            "shape": [rows, *column.shape],
            "data_offsets": [begin, end],
        }
    length = len(json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode())
    return _HEADER + -(-length // _HEADER) * _HEADER + end


_TYPE_NAMES = {
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.int8: "I8",
    torch.uint16: "U16",
    torch.int32: "I32",
    torch.int64: "I64",
}


def free_bytes(folder: Path) -> int:
    """Free space where a folder is or will be."""
    nearest = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    return shutil.disk_usage(nearest).free


def _check_space(writer: StoreWriter) -> None:
    plan = writer.plan
    missing = [shard for shard in range(plan.shards) if writer.record(shard, trusted=True) is None]
    wanted = sum(_shard_bytes(plan, len(plan.span(shard))) for shard in missing)
    free = free_bytes(writer.folder)
    if wanted > free:
        raise StoreError(
            f"{writer.folder}: the store needs {wanted / 1e6:,.4g} MB more, the disk has {free / 1e6:,.4g} MB; "
            "free some, take a smaller cache.dtype, cache.form=topk, or fewer data.distinct_views"
        )


def _empty(columns: dict[str, Column], rows: int) -> Columns:
    return {name: torch.empty((rows, *column.shape), dtype=column.dtype) for name, column in columns.items()}


def _short(value: object) -> str:
    text = json.dumps(value)
    return text if len(text) <= 80 else f"{text[:76]} …"
