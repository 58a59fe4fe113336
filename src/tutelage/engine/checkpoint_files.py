"""The folder of one checkpoint: safetensors and JSON, and ``manifest.json`` with the size and SHA-256 of each file."""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, TypeVar

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.distributed.tensor import DTensor

from tutelage.engine.writing import file_sha256

T = TypeVar("T")
Tensors = dict[str, dict[str, Tensor]]
"""File stem → name → tensor."""

FORMAT = 2
"""Version of the layout on disk. 2 may hold a folder ``sharded``; 1 is otherwise the same."""
MANIFEST = "manifest.json"
STATE = "state.json"

STORABLE = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (
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
    )
}
"""What safetensors keeps bit for bit, by name."""

_STEM = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be written or read."""


class DamagedCheckpointError(CheckpointError):
    """A checkpoint whose files are not those that were written."""


class FileRecord(BaseModel):
    """What the manifest says of a file."""

    model_config = ConfigDict(strict=True, extra="forbid")

    bytes: int = Field(ge=0)
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")


# One level of folder at most, and no part that begins with a dot: no name leads out of the checkpoint.
FileName = Annotated[str, Field(pattern=r"^(sharded/)?[A-Za-z0-9_][A-Za-z0-9_.-]*$")]


class Manifest(BaseModel):
    """``step``, the step of the best checkpoint at that time, and every other file by its path."""

    model_config = ConfigDict(strict=True, extra="forbid")

    format: int
    step: int = Field(ge=0)
    best: int | None = Field(ge=0)
    files: dict[FileName, FileRecord]


# -- writing ------------------------------------------------------------------------------------------------------


def storable(stem: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """CPU tensors with memory of their own, as safetensors wants them.

    Raises:
        CheckpointError: a name or a tensor that cannot be stored.
    """
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
        return "is sharded (DTensor); its ranks save it together (engine/sharded.py)"
    if tensor.dtype not in STORABLE.values():
        return f"is {tensor.dtype}, which safetensors does not store; cast it"
    if tensor.layout is not torch.strided or tensor.is_meta:
        return f"({tensor.layout}, {tensor.device}) has no plain memory to store"
    return None


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


def write_tensors(folder: Path, tensors: Tensors) -> dict[str, FileRecord]:
    """One file a stem, synced to disk."""
    records = {}
    for stem, group in tensors.items():
        path = folder / f"{stem}.safetensors"
        save_file(group, path)
        records[path.name] = synced(path)
    return records


def write_json(folder: Path, name: str, value: Any) -> dict[str, FileRecord]:
    """A JSON file, synced to disk."""
    path = folder / name
    path.write_bytes(json.dumps(value, allow_nan=False, separators=(",", ":")).encode())
    return {name: synced(path)}


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """The last file of a checkpoint; the folders are synced with it."""
    content = manifest.model_dump()
    write_json(folder, MANIFEST, content | {"checksum": checksum(content)})
    for inner in folder.iterdir():
        if inner.is_dir():
            sync(inner)
    sync(folder)


def synced(path: Path) -> FileRecord:
    """Flush a file to disk; its size and SHA-256."""
    sync(path)
    return FileRecord(bytes=path.stat().st_size, sha256=file_sha256(path))


def sync(path: Path) -> None:
    """Flush a file or a folder to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# -- reading ------------------------------------------------------------------------------------------------------


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a checkpoint.

    Raises:
        DamagedCheckpointError: it is missing, or not what was written.
        CheckpointError: a newer version of the format wrote it.
    """
    try:
        content = json.loads((folder / MANIFEST).read_bytes())
        intact = content.pop("checksum") == checksum(content)
    except FileNotFoundError:
        raise damaged(folder, f"{MANIFEST} is missing") from None
    except (ValueError, TypeError, AttributeError, KeyError, RecursionError) as error:
        raise damaged(folder, f"{MANIFEST} is no manifest ({error})") from error
    if not intact:
        raise damaged(folder, f"the content of {MANIFEST} is not what was written")
    version = content.get("format")
    if isinstance(version, int) and version > FORMAT:
        raise CheckpointError(
            f"{folder} has format {version}; this tutelage reads up to {FORMAT}. Install a newer tutelage"
        )
    try:
        manifest = Manifest.model_validate(content)
    except ValidationError as error:
        raise damaged(folder, f"{MANIFEST} is no manifest ({error.errors()[0]['msg']})") from error
    if folder.name != f"step-{manifest.step:08d}":
        raise damaged(folder, f"it holds the checkpoint of step {manifest.step}")
    return manifest


def verify(folder: Path, manifest: Manifest) -> None:
    """Hold every file against its size and checksum.

    Raises:
        DamagedCheckpointError: one is missing or changed.
    """
    for name, wanted in manifest.files.items():
        path = folder / name
        if not path.is_file():
            raise damaged(folder, f"{name} is missing")
        if (size := path.stat().st_size) != wanted.bytes:
            raise damaged(folder, f"{name} has {size} bytes, not {wanted.bytes}")
        if file_sha256(path) != wanted.sha256:
            raise damaged(folder, f"the content of {name} is not what was written")


def read_tensors(folder: Path, manifest: Manifest) -> Tensors:
    """All plain tensors, on the CPU."""
    names = [name for name in manifest.files if name.endswith(".safetensors") and "/" not in name]
    # load_file's tensors share one mapped file, at any alignment; cloned, they are as good as new ones.
    return {
        Path(name).stem: {key: tensor.clone() for key, tensor in load_file(folder / name).items()}
        for name in names
    }


def read_json(folder: Path, name: str) -> dict[str, Any]:
    """An object from one of a checkpoint's JSON files."""
    value = json.loads((folder / name).read_bytes())
    if not isinstance(value, dict):
        raise ValueError(f"{name} holds no object")
    return value


def explained(folder: Path, read: Callable[[], T]) -> T:
    """What ``read`` gives.

    Raises:
        DamagedCheckpointError: it cannot; so a file that a checksum covers, but which nobody could have written, is
            damage too.
    """
    try:
        return read()
    except OSError as error:
        raise DamagedCheckpointError(f"{folder} cannot be read: {error}") from error
    except (SafetensorError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise damaged(folder, f"{type(error).__name__}: {error}") from error


def damaged(folder: Path, reason: str) -> DamagedCheckpointError:
    return DamagedCheckpointError(f"{folder} is damaged: {reason}")


def checksum(content: Mapping[str, Any]) -> str:
    """Of the manifest's content itself."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
