"""Checkpoints that are complete or absent, and the lock that gives a run's folder to one process.

A checkpoint is a folder ``step-00000123``: one safetensors file a group of tensors, ``state.json``, and
``manifest.json`` with the format's version and every file's size and SHA-256. It is written to ``.tmp-…`` beside its
place, synced to disk and renamed, so a process killed at any instant leaves the earlier set or the new one.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import shutil
import uuid
import warnings
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.distributed.tensor import DTensor

from tutelage.engine.lock import FolderLock, RunLockedError, exclusive

__all__ = [
    "FORMAT",
    "CheckpointError",
    "CheckpointFolder",
    "DamagedCheckpointError",
    "FolderLock",
    "RunLockedError",
    "Snapshot",
    "check_json",
]

FORMAT = 1
"""Version of the layout on disk."""

_STEP = re.compile(r"step-(\d{8,})")
_STEM = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")
_STORABLE = frozenset(
    {
        torch.bool,
        torch.uint8,
        torch.uint16,
        torch.uint32,
        torch.uint64,
        torch.int8,
        torch.int16,
        torch.int32,
        torch.int64,
        torch.float16,
        torch.bfloat16,
        torch.float32,
        torch.float64,
        torch.complex64,
        torch.float8_e4m3fn,
        torch.float8_e4m3fnuz,
        torch.float8_e5m2,
        torch.float8_e5m2fnuz,
        torch.float8_e8m0fnu,
    }
)


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be written or read."""


class DamagedCheckpointError(CheckpointError):
    """A checkpoint whose files are not those that were written."""


@dataclass(eq=False)
class Snapshot:
    """All that a run needs to go on from ``step``.

    Attributes:
        step: optimiser steps done.
        tensors: file stem → name → tensor. Read back, they lie on the CPU, each in memory of its own.
        state: plain JSON values: ``dict`` with string keys, ``list``, ``str``, ``bool``, ``None``, ``int`` of any size
            and finite ``float`` (exact).
    """

    step: int
    tensors: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    state: dict[str, Any] = field(default_factory=dict)


class CheckpointFolder:
    """The checkpoints of one run.

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
        tensors = {stem: _storable(stem, group) for stem, group in snapshot.tensors.items()}
        check_json(snapshot.state, "state")
        final = self._path(snapshot.step)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with exclusive(self.folder):
                best_step = snapshot.step if best else self._best_step(before=snapshot.step)
                temporary = self._temporary()
                _write(temporary, snapshot.step, tensors, snapshot.state, best_step)
                self._place(temporary, final)
                self._prune(snapshot.step, best_step)
        except (OSError, SafetensorError) as error:
            self._recover()
            raise CheckpointError(
                f"the checkpoint of step {snapshot.step} could not be saved as {final}: {error}; "
                "earlier checkpoints are untouched. Free disk space or mend permissions, then resume the run"
            ) from error
        return final

    def load(self, step: int) -> Snapshot:
        """The checkpoint of a step.

        Raises:
            CheckpointError: there is none, it is damaged, or a newer version of the format wrote it.
        """
        path = self._path(step)
        if not path.is_dir():
            steps = ", ".join(map(str, self.steps())) or "none"
            raise CheckpointError(f"no checkpoint of step {step} in {self.folder}; steps there: {steps}")
        try:
            return _read(path)
        except OSError as error:
            raise DamagedCheckpointError(f"{path} cannot be read: {error}") from error

    def latest(self) -> Snapshot | None:
        """The newest complete checkpoint; none where nothing was saved. A damaged one is passed over with a warning.

        Raises:
            CheckpointError: all are damaged, or a newer version of the format wrote one.
        """
        reasons: list[str] = []
        for step in reversed(self.steps()):
            try:
                snapshot = self.load(step)
            except DamagedCheckpointError as error:
                reasons.append(str(error))
                continue
            for reason in reasons:
                warnings.warn(f"{reason}; going back to step {step}", stacklevel=2)
            return snapshot
        if reasons:
            listing = "\n".join(f"  {reason}" for reason in reasons)
            raise CheckpointError(
                f"no checkpoint in {self.folder} can be read:\n{listing}\nStart the run anew"
            )
        return None

    def best(self) -> Snapshot | None:
        """The checkpoint saved with ``best=True`` last, as the newest one remembers it; none where there is none.

        Raises:
            CheckpointError: it is gone or damaged.
        """
        step = self._best_step()
        return None if step is None else self.load(step)

    def _path(self, step: int) -> Path:
        return self.folder / f"step-{step:08d}"

    def _temporary(self) -> Path:
        return self.folder / f".tmp-{uuid.uuid4().hex}"

    def _best_step(self, before: int | None = None) -> int | None:
        # In the manifest, not in a file beside: what a run resumes from and what it holds for the best can't disagree.
        for step in reversed(self.steps()):
            if before is None or step < before:
                with suppress(DamagedCheckpointError):
                    best: int | None = _manifest(self._path(step))["best"]
                    return best
        return None

    def _place(self, temporary: Path, final: Path) -> None:
        old = self.folder / f".old-{final.name}"
        if final.exists():
            final.rename(old)  # killed here, `_recover` puts it back
        temporary.rename(final)
        _sync(self.folder)
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


def check_json(value: Any, path: str) -> None:
    """Refuse what JSON would not give back as it was.

    Raises:
        CheckpointError: names the path of the first such value, as in ``state.loader['epoch']``.
    """
    if isinstance(value, dict):
        for key, item in value.items():
            if not isinstance(key, str):
                raise CheckpointError(
                    f"{path} has the key {key!r}; JSON keeps text keys only, so turn it into a str"
                )
            check_json(item, f"{path}[{key!r}]")
    elif isinstance(value, list):
        for position, item in enumerate(value):
            check_json(item, f"{path}[{position}]")
    elif isinstance(value, float):
        if not math.isfinite(value):
            raise CheckpointError(f"{path} is {value}, which JSON does not have; store None or text instead")
    elif not isinstance(value, str | int | None):
        raise CheckpointError(
            f"{path} is a {type(value).__name__}; checkpoints keep dict, list, str, int, float, bool and None "
            "as JSON, and tensors in Snapshot.tensors"
        )


def _storable(stem: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """CPU tensors with memory of their own, as safetensors wants them."""
    if not _STEM.fullmatch(stem):
        raise CheckpointError(
            f"{stem!r} cannot name a file of tensors; use letters, digits, '_', '.' and '-'"
        )
    storages: set[int] = set()
    plain: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        reason = _refusal(name, tensor)
        if reason:
            raise CheckpointError(f"tensor {name!r} of {stem} {reason}")
        tensor = tensor.detach().resolve_conj().resolve_neg().cpu().contiguous()
        storage = tensor.untyped_storage().data_ptr()
        plain[name] = tensor.clone() if storage in storages else tensor
        storages.add(storage)
    return plain


def _refusal(name: str, tensor: Tensor) -> str | None:
    if name == "__metadata__":
        return "has a name that safetensors keeps for itself"
    if isinstance(tensor, DTensor):
        return "is sharded (DTensor); gather it with full_tensor() first"
    if tensor.dtype not in _STORABLE:
        return f"is {tensor.dtype}, which safetensors does not store; cast it"
    if tensor.layout is not torch.strided or tensor.is_meta:
        return f"({tensor.layout}, {tensor.device}) has no plain memory to store"
    return None


def _write(
    folder: Path, step: int, tensors: dict[str, dict[str, Tensor]], state: dict[str, Any], best: int | None
) -> None:
    folder.mkdir()
    for stem, group in tensors.items():
        save_file(group, folder / f"{stem}.safetensors")
    (folder / "state.json").write_bytes(_dump(state))
    files = {
        path.name: {"bytes": path.stat().st_size, "sha256": _hash(path)} for path in sorted(folder.iterdir())
    }
    manifest = {"format": FORMAT, "step": step, "best": best, "files": files}
    (folder / "manifest.json").write_bytes(_dump(manifest | {"checksum": _checksum(manifest)}))
    for path in folder.iterdir():
        _sync(path)
    _sync(folder)


def _read(folder: Path) -> Snapshot:
    manifest = _manifest(folder)
    for name, wanted in manifest["files"].items():
        path = folder / name
        if not path.is_file():
            raise DamagedCheckpointError(f"{folder} is damaged: {name} is missing")
        if (size := path.stat().st_size) != wanted["bytes"]:
            raise DamagedCheckpointError(
                f"{folder} is damaged: {name} has {size} bytes, not {wanted['bytes']}"
            )
        if _hash(path) != wanted["sha256"]:
            raise DamagedCheckpointError(
                f"{folder} is damaged: the content of {name} is not what was written"
            )
    stems = [Path(name) for name in manifest["files"] if name.endswith(".safetensors")]
    # load_file's tensors share one mapped file, at any alignment; cloned, they are as good as new ones.
    tensors = {
        path.stem: {name: tensor.clone() for name, tensor in load_file(folder / path).items()}
        for path in stems
    }
    return Snapshot(manifest["step"], tensors, json.loads((folder / "state.json").read_bytes()))


def _manifest(folder: Path) -> dict[str, Any]:
    path = folder / "manifest.json"
    try:
        manifest: dict[str, Any] = json.loads(path.read_bytes())
        intact = manifest.pop("checksum") == _checksum(manifest)
    except FileNotFoundError:
        raise DamagedCheckpointError(f"{folder} is damaged: manifest.json is missing") from None
    except (ValueError, TypeError, AttributeError, KeyError) as error:
        raise DamagedCheckpointError(
            f"{folder} is damaged: manifest.json is no manifest ({error})"
        ) from error
    if not intact:
        raise DamagedCheckpointError(
            f"{folder} is damaged: the content of manifest.json is not what was written"
        )
    if manifest["format"] > FORMAT:
        raise CheckpointError(
            f"{folder} has format {manifest['format']}; this tutelage reads up to {FORMAT}. Install a newer tutelage"
        )
    if folder.name != f"step-{manifest['step']:08d}":
        raise DamagedCheckpointError(
            f"{folder} is damaged: it holds the checkpoint of step {manifest['step']}"
        )
    return manifest


def _dump(value: Any) -> bytes:
    return json.dumps(value, allow_nan=False, separators=(",", ":")).encode()


def _checksum(manifest: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def _hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
