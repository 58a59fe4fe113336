"""Locks of the operating system: they end with the process that holds them, however it ends."""

from __future__ import annotations

import fcntl
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType

_held: set[int] = set()


def _forget() -> None:
    # A forked loader worker inherits the descriptor; it would keep the lock of a run that was killed.
    for descriptor in _held:
        os.close(descriptor)
    _held.clear()


os.register_at_fork(after_in_child=_forget)


class RunLockedError(RuntimeError):
    """Another process works in this folder."""


class FolderLock:
    """Hold a run's folder: ``with FolderLock(folder): …``. The lock is on ``<folder>/.lock``, which stays and says who
    holds or held it; a process that dies, by ``kill -9`` too, holds nothing any more.

    Raises:
        RunLockedError: on entering, where another process (or another lock of this one) holds the folder.
        OSError: on entering, where the folder cannot be written or its file system knows no locks.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = Path(folder)
        self._descriptor: int | None = None

    def __enter__(self) -> FolderLock:
        self.folder.mkdir(parents=True, exist_ok=True)
        # No link is followed: a folder from elsewhere could have the file that it names cut off and written over.
        descriptor = os.open(self.folder / ".lock", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.read(descriptor, 200).decode(errors="replace").strip()
            os.close(descriptor)
            raise RunLockedError(
                f"{self.folder} is in use by {holder or 'a process that has just started'}; "
                "wait for it or end it, or choose another output.dir"
            ) from None
        except OSError:
            os.close(descriptor)
            raise
        os.truncate(descriptor, 0)
        os.write(descriptor, f"pid {os.getpid()} on {socket.gethostname()}\n".encode())
        _held.add(descriptor)
        self._descriptor = descriptor
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # A forked child has closed its copy already, and the number may belong to another file by now.
        if self._descriptor in _held:
            _held.discard(self._descriptor)
            os.close(self._descriptor)
        self._descriptor = None


@contextmanager
def exclusive(folder: Path, *, wait: bool = True) -> Iterator[None]:
    """Hold a lock on the folder itself for a short piece of work.

    Raises:
        BlockingIOError: another holds it and ``wait`` is false.
    """
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        yield
    finally:
        os.close(descriptor)
