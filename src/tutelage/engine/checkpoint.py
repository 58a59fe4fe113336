"""Checkpoints that are complete or absent, and the lock that gives a run's folder to one process.

A checkpoint is a folder ``step-00000123``; `tutelage.engine.checkpoint_files` says what is in it. It is written to
``.tmp-…`` beside its place, synced to disk and renamed, so a process killed at any instant leaves the earlier set or
the new one.
"""

from __future__ import annotations

import re
import shutil
import uuid
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError

from tutelage.engine.checkpoint_files import (
    FORMAT,
    STATE,
    CheckpointError,
    DamagedCheckpointError,
    FileRecord,
    Manifest,
    Tensors,
    check_json,
    explained,
    read_json,
    read_manifest,
    read_tensors,
    storable,
    sync,
    verify,
    write_json,
    write_manifest,
    write_tensors,
)
from tutelage.engine.lock import FolderLock, RunLockedError, exclusive

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

__all__ = [
    "FORMAT",
    "CheckpointError",
    "CheckpointFolder",
    "DamagedCheckpointError",
    "Draft",
    "FolderLock",
    "RunLockedError",
    "Snapshot",
    "check_json",
]

_STEP = re.compile(r"step-(\d{8,})")


@dataclass(eq=False)
class Snapshot:
    """All that a run needs to go on from ``step``.

    Attributes:
        step: optimiser steps done.
        tensors: file stem → name → tensor; DTensors where they are sharded. Read back, plain ones lie on the CPU, each
            in memory of its own.
        state: plain JSON values: ``dict`` with string keys, ``list``, ``str``, ``bool``, ``None``, ``int`` of any size
            and finite ``float`` (exact).
    """

    step: int
    tensors: Tensors = field(default_factory=dict)
    state: dict[str, Any] = field(default_factory=dict)


@dataclass(eq=False)
class Draft:
    """A checkpoint that is being written, and the files that it has so far."""

    path: Path
    files: dict[str, FileRecord] = field(default_factory=dict)

    def write(self, snapshot: Snapshot) -> None:
        """Write what `prepared` gave."""
        self.files |= write_tensors(self.path, snapshot.tensors)
        self.files |= write_json(self.path, STATE, snapshot.state)


class CheckpointFolder:
    """The checkpoints of one run, as one process sees them; `tutelage.engine.sharded` is for several.

    Args:
        folder: made by the first ``save``. Leftovers of a killed process are removed when it is opened, unless
            another process is saving there right now.
        keep: newest checkpoints kept, at least 1; the best one is kept besides.
    """

    def __init__(self, folder: Path, keep: int) -> None:
        if keep < 1:
            raise ValueError(f"keep={keep}: at least one checkpoint must be kept")
        self.folder = Path(folder)
        self.keep = keep
        if self.folder.exists() and not self.folder.is_dir():
            raise CheckpointError(f"{self.folder} is not a folder; checkpoints need one")
        self._recover()

    def steps(self) -> list[int]:
        """Steps that have a checkpoint, ascending; a damaged one counts until it is read."""
        if not self.folder.is_dir():
            return []
        matches = (_STEP.fullmatch(path.name) for path in self.folder.iterdir())
        return sorted(int(match[1]) for match in matches if match)

    def save(self, snapshot: Snapshot, *, best: bool = False) -> Path:
        """Write a checkpoint, then delete those that are no longer kept.

        One of the same step is replaced. Those of later steps are deleted: a run only goes back where they were
        damaged, and will make them anew.

        Args:
            best: this is the best one so far.

        Raises:
            CheckpointError: something cannot be stored, or the disk refuses; earlier checkpoints are untouched.
        """
        ready = prepared(snapshot)
        with self.draft(snapshot.step, best=best) as draft:
            draft.write(ready)
        return self._path(snapshot.step)

    @contextmanager
    def draft(self, step: int, *, best: bool) -> Iterator[Draft]:
        """A checkpoint to write into; where the block ends well it takes its place.

        Raises:
            CheckpointError: the disk refuses; earlier checkpoints are untouched.
        """
        final = self._path(step)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with exclusive(self.folder):
                best_step = step if best else self._best_step(before=step)
                draft = Draft(self._temporary())
                draft.path.mkdir()
                yield draft
                write_manifest(
                    draft.path, Manifest(format=FORMAT, step=step, best=best_step, files=draft.files)
                )
                self._place(draft.path, final)
                self._prune(step, best_step)
        except CheckpointError:
            self._recover()
            raise
        except (OSError, SafetensorError) as error:
            self._recover()
            raise unsaved(step, final, error) from error

    def newest(self) -> int | None:
        """The step of the newest checkpoint that is whole; none where nothing was saved. A damaged one is passed over
        with a warning.

        Raises:
            CheckpointError: all are damaged, or a newer version of the format wrote one.
        """
        reasons: list[str] = []
        for step in reversed(self.steps()):
            try:
                self._verified(step)
            except DamagedCheckpointError as error:
                reasons.append(str(error))
                continue
            for reason in reasons:
                warnings.warn(f"{reason}; going back to step {step}", stacklevel=2)
            return step
        if reasons:
            listing = "\n".join(f"  {reason}" for reason in reasons)
            raise CheckpointError(
                f"no checkpoint in {self.folder} can be read:\n{listing}\nStart the run anew"
            )
        return None

    def load(self, step: int, *, mesh: DeviceMesh | None = None, verified: bool = False) -> Snapshot:
        """The checkpoint of a step.

        Args:
            mesh: what sharded tensors are spread over, however many ranks wrote them; none: they come whole.
            verified: its checksums were held against its files already.

        Raises:
            CheckpointError: there is none, it is damaged, or a newer version of the format wrote it.
        """
        from tutelage.engine.sharded import read_shards

        path = self._path(step)
        manifest = read_manifest(path) if verified and path.is_dir() else self._verified(step)

        def read() -> Snapshot:
            tensors = read_tensors(path, manifest)
            for stem, group in read_shards(path, manifest, mesh).items():
                tensors.setdefault(stem, {}).update(group)
            return Snapshot(manifest.step, tensors, read_json(path, STATE))

        return explained(path, read)

    def latest(self) -> Snapshot | None:
        """The newest checkpoint that is whole; see `newest`."""
        step = self.newest()
        return None if step is None else self.load(step, verified=True)

    def best(self) -> Snapshot | None:
        """The checkpoint saved with ``best=True`` last, as the newest one remembers it; none where there is none.

        Raises:
            CheckpointError: it is gone or damaged.
        """
        step = self._best_step()
        return None if step is None else self.load(step)

    def _verified(self, step: int) -> Manifest:
        path = self._path(step)
        if not path.is_dir():
            steps = ", ".join(map(str, self.steps())) or "none"
            raise CheckpointError(f"no checkpoint of step {step} in {self.folder}; steps there: {steps}")

        def read() -> Manifest:
            manifest = read_manifest(path)
            verify(path, manifest)
            return manifest

        return explained(path, read)

    def _path(self, step: int) -> Path:
        return self.folder / f"step-{step:08d}"

    def _temporary(self) -> Path:
        return self.folder / f".tmp-{uuid.uuid4().hex}"

    def _best_step(self, before: int | None = None) -> int | None:
        # In the manifest, not in a file beside: what a run resumes from and what it holds for the best can't disagree.
        for step in reversed(self.steps()):
            if before is None or step < before:
                with suppress(DamagedCheckpointError):
                    return read_manifest(self._path(step)).best
        return None

    def _place(self, temporary: Path, final: Path) -> None:
        old = self.folder / f".old-{final.name}"
        if final.exists():
            final.rename(old)  # killed here, `_recover` puts it back
        temporary.rename(final)
        sync(self.folder)
        if old.exists():
            self._discard(old)

    def _prune(self, newest: int, best: int | None) -> None:
        steps = self.steps()
        newest_kept = sorted(step for step in steps if step <= newest)[-self.keep :]
        for step in steps:
            if step != best and step not in newest_kept:
                self._discard(self._path(step))

    def _discard(self, path: Path) -> None:
        # Renamed first: a checkpoint is never seen half deleted.
        gone = self._temporary()
        path.rename(gone)
        shutil.rmtree(gone)

    def _recover(self) -> None:
        """Remove what a killed or failed save left. What can't be removed does no harm: no reader looks at it."""
        if not self.folder.is_dir():
            return
        with suppress(OSError), exclusive(self.folder, wait=False):
            for old in self.folder.glob(".old-step-*"):
                final = self.folder / old.name.removeprefix(".old-")
                old.rename(self._temporary() if final.exists() else final)
            for leftover in self.folder.glob(".tmp-*"):
                shutil.rmtree(leftover, ignore_errors=True)


def prepared(snapshot: Snapshot) -> Snapshot:
    """The snapshot as it is stored: on the CPU, each tensor in memory of its own.

    Raises:
        CheckpointError: names what cannot be stored. Nothing is written yet.
    """
    check_json(snapshot.state, "state")
    tensors = {stem: storable(stem, group) for stem, group in snapshot.tensors.items()}
    return Snapshot(snapshot.step, tensors, snapshot.state)


def unsaved(step: int, final: Path, reason: object) -> CheckpointError:
    return CheckpointError(
        f"the checkpoint of step {step} could not be saved as {final}: {reason}; "
        "earlier checkpoints are untouched. Free disk space or mend permissions, then resume the run"
    )
