"""A table of decoded images that all loader processes fill and read."""

from __future__ import annotations

import mmap
import os
import tempfile
import weakref
from multiprocessing import reduction
from typing import Any

import numpy as np
import torch
from torch import Tensor

LARGEST = 2**30
"""Bytes above which a split is decoded anew in every epoch."""


class SharedRows:
    """uint8 rows ``[rows, *shape]`` in memory that processes share, filled as they are read; pages that nobody wrote
    take no memory.

    It lies in an unnamed file in memory (a temporary file where the system has none), not in /dev/shm, which containers
    keep small. Forked processes inherit it; spawned ones get the file handed over.
    """

    def __init__(self, rows: int, shape: tuple[int, ...], handle: int | None = None) -> None:
        self.rows, self.shape = rows, shape
        size = rows * (int(np.prod(shape)) + 1)
        self._handle = _new_file(size) if handle is None else handle
        self._close = weakref.finalize(self, os.close, self._handle)
        everything = np.frombuffer(mmap.mmap(self._handle, size), dtype=np.uint8)
        self._filled = torch.from_numpy(everything[:rows])
        self._values = torch.from_numpy(everything[rows:].reshape(rows, *shape))

    @staticmethod
    def fits(rows: int, shape: tuple[int, ...]) -> bool:
        return rows * int(np.prod(shape)) <= LARGEST

    def missing(self, rows: Tensor) -> Tensor:
        """Those of ``rows`` that are not there yet."""
        return rows[self._filled[rows] == 0]

    def put(self, rows: Tensor, values: Tensor) -> None:
        self._values[rows] = values
        self._filled[rows] = 1

    def get(self, rows: Tensor) -> Tensor:
        return self._values.index_select(0, rows)

    def __reduce__(self) -> tuple[Any, ...]:
        return _received, (self.rows, self.shape, reduction.DupFd(self._handle))


def _received(rows: int, shape: tuple[int, ...], handle: Any) -> SharedRows:
    return SharedRows(rows, shape, handle.detach())


def _new_file(size: int) -> int:
    if hasattr(os, "memfd_create"):
        handle = os.memfd_create("tutelage-images")
    else:
        with tempfile.TemporaryFile() as file:
            handle = os.dup(file.fileno())
    os.ftruncate(handle, size)
    return handle
