"""Counter-based random numbers: each is a pure function of (key, block, index, view, stream), for many rows at once.

Philox4x64-10 of Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011: ten rounds of
multiplication turn a 256-bit counter and a 128-bit key into four 64-bit words. The words of a row are those of
``numpy.random.Philox(counter=[0, index, view, stream], key=[seed, salt])``. All is done on the CPU, so that every
device gets the same bits.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

Words = NDArray[np.uint64]
Ids = NDArray[np.int64]

_MULTIPLIERS = np.array([[0xD2E7470EE14C6C93], [0xCA5A826395121157]], dtype=np.uint64)
_WEYL = np.array([[0x9E3779B97F4A7C15], [0xBB67AE8584CAA73B]], dtype=np.uint64)
_STEPS: Words = _WEYL * np.array(range(10), dtype=np.uint64)
_HALF = np.uint64(32)
_LOW = np.uint64(0xFFFFFFFF)
_BY_LOW, _BY_HIGH = _MULTIPLIERS & _LOW, _MULTIPLIERS >> _HALF
_LONG = 64
"""Blocks of a row above which numpy's own generator, made anew for each row, is the faster one."""
_CHUNK = 16384
"""Numbers of a field that are worked on at once: larger arrays cost more in page faults than in arithmetic."""


@dataclass(frozen=True)
class Counter:
    """Where rows' numbers come from.

    Attributes:
        index, view: two ids of each row, ``[rows]`` int64.
        seed, salt: the key.
        stream: tells apart what else is drawn for the same rows.
    """

    index: Ids
    view: Ids
    seed: int
    salt: int = 0
    stream: int = 0

    def words(self, count: int) -> Words:
        """Random 64-bit words ``[rows, count]``."""
        blocks = -(-count // 4)
        drawn = self._words_by_row(count) if blocks > _LONG else self._words_at_once(blocks)
        return drawn[:, :count]

    def uniform(self, count: int) -> NDArray[np.float64]:
        """Numbers ``[rows, count]`` in [0, 1), of 53 random bits each."""
        numbers: NDArray[np.float64] = (self.words(count) >> np.uint64(11)).astype(np.float64) * 2.0**-53
        return numbers

    def uniform_field(self, shape: tuple[int, ...]) -> NDArray[np.float32]:
        """Numbers ``[rows, *shape]`` in [0, 1), of 24 random bits each."""
        size = math.prod(shape)
        numbers = np.empty((len(self.index), size), dtype=np.float32)
        for rows, part in self._parts(size):
            np.multiply(part._halves(size) >> np.uint32(8), np.float32(2.0**-24), out=numbers[rows])
        return numbers.reshape(-1, *shape)

    def normal_field(self, shape: tuple[int, ...]) -> NDArray[np.float32]:
        """Standard normal numbers ``[rows, *shape]`` by Box and Muller's transform of 32 random bits each."""
        size = math.prod(shape)
        pairs = -(-size // 2)
        numbers = np.empty((len(self.index), 2 * pairs), dtype=np.float32)
        for rows, part in self._parts(size):
            bits = part._halves(2 * pairs).astype(np.float32)
            # The half keeps the logarithm finite: the chance is in [2**-33, 1].
            chance = (bits[:, :pairs] + np.float32(0.5)) * np.float32(2.0**-32)
            radius = np.sqrt(np.float32(-2.0) * np.log(chance))
            angle = bits[:, pairs:] * np.float32(math.tau * 2.0**-32)
            np.multiply(radius, np.cos(angle), out=numbers[rows, :pairs])
            np.multiply(radius, np.sin(angle), out=numbers[rows, pairs:])
        return numbers[:, :size].reshape(-1, *shape)

    def _parts(self, size: int) -> Iterator[tuple[slice, Counter]]:
        step = max(1, _CHUNK // max(1, size))
        for start in range(0, len(self.index), step):
            rows = slice(start, start + step)
            yield rows, replace(self, index=self.index[rows], view=self.view[rows])

    def _halves(self, count: int) -> NDArray[np.uint32]:
        return np.ascontiguousarray(self.words(-(-count // 2))).view(np.uint32)[:, :count]

    def _words_by_row(self, count: int) -> Words:
        key = np.array([self.seed, self.salt], dtype=np.uint64)
        drawn = np.empty((len(self.index), count), dtype=np.uint64)
        for row, (index, view) in enumerate(
            zip(self.index.view(np.uint64), self.view.view(np.uint64), strict=True)
        ):
            counter = np.array([0, index, view, self.stream], dtype=np.uint64)
            drawn[row] = np.random.Philox(counter=counter, key=key).random_raw(count)
        return drawn

    def _words_at_once(self, blocks: int) -> Words:
        rows = len(self.index)
        counters = np.empty((4, rows, blocks), dtype=np.uint64)
        counters[0] = np.arange(1, blocks + 1, dtype=np.uint64)  # numpy counts up before its first block
        counters[1] = self.index.view(np.uint64)[:, None]
        counters[2] = self.view.view(np.uint64)[:, None]
        counters[3] = self.stream
        key = np.array([[self.seed], [self.salt]], dtype=np.uint64)
        drawn = philox(counters.reshape(4, -1), key)
        return np.ascontiguousarray(drawn.T).reshape(rows, blocks * 4)


def philox(counters: Words, key: Words) -> Words:
    """Philox4x64-10 of ``counters`` ``[4, n]`` under ``key`` ``[2, 1]``: words ``[4, n]``."""
    even: Words = counters[0::2]
    odd: Words = counters[1::2]
    keys: Words = key + _STEPS
    for step in range(10):
        high, low = _high(even), even * _MULTIPLIERS
        even, odd = high[::-1] ^ odd ^ keys[:, step : step + 1], low[::-1]
    return np.stack([even, odd], axis=1).reshape(4, -1)


def _high(words: Words) -> Words:
    """High 64 bits of each word times its row's multiplier, by halves of 32 bits: no sum here overflows."""
    low, high = words & _LOW, words >> _HALF
    middle = low * _BY_LOW
    middle >>= _HALF
    middle += high * _BY_LOW
    carry = low * _BY_HIGH
    carry += middle & _LOW
    carry >>= _HALF
    middle >>= _HALF
    carry += middle
    carry += high * _BY_HIGH
    return carry
