"""All benchmarks, topic by topic."""

from __future__ import annotations

from collections.abc import Sequence
from difflib import get_close_matches
from fnmatch import fnmatchcase

from benchmarks import (
    comparing,
    limit,
    llm_losses,
    losses,
    saving,
    startup,
    store,
    taps,
    training,
    versus_torchdistill,
)
from benchmarks.harness import Benchmark

BENCHMARKS: tuple[Benchmark, ...] = (
    *training.BENCHMARKS,
    *limit.BENCHMARKS,
    *versus_torchdistill.BENCHMARKS,
    *taps.BENCHMARKS,
    *losses.BENCHMARKS,
    *llm_losses.BENCHMARKS,
    *store.BENCHMARKS,
    *saving.BENCHMARKS,
    *startup.BENCHMARKS,
    *comparing.BENCHMARKS,
)


def chosen(benchmarks: Sequence[Benchmark], pattern: str) -> list[Benchmark]:
    """Those whose name matches: ``trainer.*``, ``*.kd.*``; a plain word stands for all names that hold it.

    Raises:
        ValueError: none does; it names the nearest.
    """
    wild = pattern if any(sign in pattern for sign in "*?[") else f"*{pattern}*"
    found = [benchmark for benchmark in benchmarks if fnmatchcase(benchmark.name, wild)]
    if not found:
        near = get_close_matches(pattern, [benchmark.name for benchmark in benchmarks], n=4, cutoff=0.3)
        raise ValueError(
            f"no benchmark matches {pattern!r}; near: {', '.join(near) or 'none'} (--list shows all)"
        )
    return found
