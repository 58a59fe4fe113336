"""What is held against what, and how two sides are measured in one process: A B A B …, medians of rounds."""

from __future__ import annotations

import ctypes
import itertools
import json
import math
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch.profiler import ProfilerActivity, profile

Call = Callable[[], object]
Quantity = Literal["time", "memory", "counted"]

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4
"""Numbers of glibc's malloc.h."""

_BLOCK = 5
"""Calls of one side before it is the other's turn."""


class Skipped(Exception):
    """A benchmark that cannot run here; the message says what it lacks."""


class UnequalWorkError(AssertionError):
    """The two sides do not compute the same, so their times say nothing."""


@dataclass(frozen=True)
class Bar:
    """The largest value that holds, and what the value is.

    ``×``: ours over the peer's; ``%``: ours as a share of `Sides.count` of the peer's; ``µs``: ours minus the peer's,
    for each of `Sides.count`; ``s``: ours alone.
    """

    limit: float
    unit: Literal["×", "%", "µs", "s"] = "×"

    def value(self, ours: float, peer: float, count: int) -> float:
        if self.unit == "×":
            return ours / peer
        if self.unit == "%":
            return 100 * ours / (peer * count)
        return (ours - peer) / count * 1e6 if self.unit == "µs" else ours

    def show(self, value: float) -> str:
        return (
            f"{value:.0f} µs"
            if self.unit == "µs"
            else f"{value:.3f}{'×' if self.unit == '×' else f' {self.unit}'}"
        )


@dataclass(frozen=True)
class Sides:
    """One benchmark, ready to run.

    Attributes:
        ours, peer: what is measured in turn; no peer where ours is measured alone.
        count: how many steps or hooks a call of either side stands for; of a share, how many of the peer's calls make
            the whole.
        note: what it ran on, where that depends on the machine.
    """

    ours: Call
    peer: Call | None = None
    count: int = 1
    note: str = ""


@dataclass(frozen=True)
class Benchmark:
    """One line of the output.

    Attributes:
        name: ``topic.what``.
        what, peer: what is measured, and against what.
        bar: what it must hold.
        build: makes the sides on a device, and has checked that both do the same work.
        quantity: seconds, bytes at their peak, or whatever the calls themselves give.
        slow: a call takes many seconds: a third of the rounds, one call each, without a trial before.
        long: takes minutes: left out of ``--quick``, unless named.
    """

    name: str
    what: str
    peer: str
    bar: Bar
    build: Callable[[torch.device], Sides]
    quantity: Quantity = "time"
    slow: bool = False
    long: bool = False


@dataclass(frozen=True)
class Effort:
    """How much a benchmark is repeated: rounds, and the least seconds that each side runs in a round."""

    rounds: int = 9
    seconds: float = 0.2


@dataclass
class Result:
    """A measured benchmark: seconds (or bytes) of one call, a number a round and side.

    Attributes:
        value, low, high: of the medians, and the quartiles over rounds; in the bar's unit.
        skipped: why it did not run.
    """

    benchmark: Benchmark
    ours: list[float] = field(default_factory=list)
    peer: list[float] = field(default_factory=list)
    value: float = math.nan
    low: float = math.nan
    high: float = math.nan
    note: str = ""
    skipped: str = ""

    @property
    def holds(self) -> bool:
        return bool(self.skipped) or self.value <= self.benchmark.bar.limit

    @property
    def verdict(self) -> str:
        if self.skipped:
            return f"skipped: {self.skipped}"
        return "holds" if self.holds else "falls short"

    def line(self, width: int) -> str:
        """``name  ratio  (quartiles)  bar  verdict``."""
        bar = self.benchmark.bar
        if self.skipped:
            return f"{self.benchmark.name:<{width}}  {self.verdict}"
        spread = f"({bar.show(self.low)} to {bar.show(self.high)})"
        value, limit = bar.show(self.value), f"≤ {bar.show(bar.limit)}"
        note = f"  [{self.note}]" if self.note else ""
        return f"{self.benchmark.name:<{width}}  {value:>9}  {spread:<23}  {limit:<9}  {self.verdict}{note}"

    def record(self) -> dict[str, Any]:
        """All of it as JSON values."""
        bar, ran = self.benchmark.bar, not self.skipped
        return {
            "name": self.benchmark.name,
            "what": self.benchmark.what,
            "peer": self.benchmark.peer,
            "quantity": self.benchmark.quantity,
            "value": self.value if ran else None,
            "quartiles": [self.low, self.high] if ran else None,
            "unit": bar.unit,
            "bar": bar.limit,
            "verdict": self.verdict,
            "note": self.note,
            "ours": self.ours,
            "theirs": self.peer,
        }


def run(benchmark: Benchmark, device: torch.device, effort: Effort) -> Result:
    """Build a benchmark and measure it.

    Raises:
        UnequalWorkError: its sides do not compute the same.
    """
    result = Result(benchmark)
    try:
        sides = benchmark.build(device)
    except Skipped as reason:
        result.skipped = str(reason)
        return result
    result.note = sides.note
    calls = [sides.ours] if sides.peer is None else [sides.ours, sides.peer]
    if benchmark.quantity == "memory":
        rounds = [[float(_peak_bytes(call, device)) for call in calls]]
    elif benchmark.quantity == "counted":
        rounds = [[_counted(call) for call in calls]]
    else:
        repeats = 1 if benchmark.slow else _repeats(calls, device, effort.seconds)
        wanted = math.ceil(effort.rounds / 3) if benchmark.slow else effort.rounds
        rounds = [_alternated(calls, device, repeats) for _ in range(wanted)]
    result.ours = [times[0] for times in rounds]
    result.peer = [times[1] for times in rounds] if sides.peer else []
    value, peer = benchmark.bar.value, result.peer or [math.nan] * len(rounds)
    result.value = value(statistics.median(result.ours), statistics.median(peer), sides.count)
    result.low, result.high = _quartiles(
        [value(*pair, sides.count) for pair in zip(result.ours, peer, strict=True)]
    )
    return result


def _repeats(calls: list[Call], device: torch.device, seconds: float) -> int:
    """How often to call, so that the quickest side runs for so long in a round. Short calls are tried twice: the first
    may have found something to prepare."""
    tried = [_seconds(call, device) for call in calls]
    if min(tried) < seconds:
        tried = [_seconds(call, device) for call in calls]
    return max(1, math.ceil(seconds / min(tried)))


def _alternated(calls: list[Call], device: torch.device, repeats: int) -> list[float]:
    """Seconds of one call of each side: the median over calls that come in turn, a few at a time, so that what else the
    machine does meets all sides alike, and most calls find the caches as their own side left them."""
    times: list[list[float]] = [[] for _ in calls]
    for _ in range(math.ceil(repeats / _BLOCK)):
        for call, taken in zip(calls, times, strict=True):
            taken += [_seconds(call, device) for _ in range(min(_BLOCK, repeats))]
    return [statistics.median(taken) for taken in times]


def _seconds(call: Call, device: torch.device) -> float:
    _wait(device)
    started = time.perf_counter()
    call()
    _wait(device)
    return time.perf_counter() - started


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _quartiles(values: list[float]) -> tuple[float, float]:
    if len(values) < 2:
        return values[0], values[0]
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, high


def keep_freed_memory() -> None:
    """Let the C library keep what is freed. Else it gives large blocks back to the system, and whichever side comes
    after that pays for the pages: that would be measured, not the losses. Does nothing where it is not glibc."""
    allocator = ctypes.CDLL(None)
    if hasattr(allocator, "mallopt"):
        allocator.mallopt(_M_MMAP_MAX, 0)
        allocator.mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)


def _counted(call: Call) -> float:
    given = call()
    assert isinstance(given, int | float)
    return float(given)


def _peak_bytes(call: Call, device: torch.device) -> int:
    """The most that was allocated at once above what was before; the call leaves nothing behind."""
    call()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        return torch.cuda.max_memory_allocated(device) - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        call()
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder, "trace.json")
        profiler.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text())["traceEvents"]
    changes = sorted((e for e in events if e["name"] == "[memory]"), key=lambda event: event["ts"])
    held = itertools.accumulate(change["args"]["Bytes"] for change in changes)
    return max(held, default=0)
