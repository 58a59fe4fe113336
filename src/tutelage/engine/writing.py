"""Files of a run that are written whole or not at all, and what is said where the disk refuses."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError


class UnwrittenError(RuntimeError):
    """A file that the disk did not take."""


def file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Name the file (or folder) that the block writes where the disk refuses: it is full, read-only or broken.

    Raises:
        UnwrittenError: in place of the disk's own error.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise UnwrittenError(
            f"{path} could not be written: {error}; free disk space or mend permissions, then resume the run"
        ) from error


def write_whole(path: Path, text: str) -> None:
    """Write a text file beside its place and rename it: it is complete, or as it was.

    Raises:
        UnwrittenError: the disk refuses; nothing is left beside it.
    """
    beside = path.with_name(f".tmp-{path.name}")
    with writing(path):
        try:
            beside.unlink(missing_ok=True)  # never written through a link that lies there
            beside.write_text(text, encoding="utf-8")
            beside.replace(path)
        except OSError:
            with suppress(OSError):
                beside.unlink(missing_ok=True)
            raise


def append(path: Path, content: bytes) -> None:
    """Write behind what a file holds, and wait until the disk has it. A kill may leave a part of it.

    Raises:
        UnwrittenError: the disk refuses.
    """
    with writing(path), path.open("ab") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
