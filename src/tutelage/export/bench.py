"""Models side by side: each in a process of its own, measured in turn, so that what else the machine does meets all."""

from __future__ import annotations

import contextlib
import json
import statistics
import subprocess
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from types import TracebackType
from typing import Any

from tutelage.export.targets import Target

SECONDS = 0.25
"""Of each model's turn in a round, for one row and for many."""


class BenchError(RuntimeError):
    """A model that cannot be loaded or run."""


def bench(
    targets: Sequence[Target],
    *,
    batch_size: int = 32,
    rounds: int = 5,
    device: str = "cpu",
    threads: int | None = None,
    compiled: bool = False,
) -> list[dict[str, Any]]:
    """Measure models.

    Args:
        batch_size: rows at once, for throughput and memory.
        rounds: turns of each model.
        device: ``cpu`` or ``cuda``; ONNX files always run on the CPU.
        threads: of each; left out: the library's own choice.
        compiled: by torch.compile; ONNX files stay as they are.

    Returns:
        By model, in order: ``model``, ``latency_ms`` (``p50`` and ``p90`` of one row), ``rows_per_second``, ``memory``
        and ``disk`` in bytes, ``parameters``, ``flops`` of a row, ``device``, and ``speed``: the first model's median
        latency over this one's. What cannot be told is None.

    Raises:
        BenchError: a model cannot be loaded or run.
    """
    common = {"device": device, "threads": threads, "compile": compiled, "batch_size": batch_size}
    with ExitStack() as stack:
        processes = [stack.enter_context(_Process(target, common)) for target in targets]
        about = [process.answer() for process in processes]
        single: list[list[float]] = [[] for _ in targets]
        many: list[list[float]] = [[] for _ in targets]
        for _ in range(rounds):
            for place, process in enumerate(processes):
                single[place] += process.ask(do="time", size=1, seconds=SECONDS)["times"]
                many[place] += process.ask(do="time", size=batch_size, seconds=SECONDS)["times"]
        memory = [process.ask(do="memory")["memory"] for process in processes]
    first = statistics.median(single[0])
    return [
        {
            "model": target.title,
            "latency_ms": {"p50": 1000 * statistics.median(one), "p90": 1000 * _p90(one)},
            "rows_per_second": batch_size / statistics.median(batch),
            "memory": peak,
            "disk": target.bytes,
            **known,
            "speed": first / statistics.median(one),
        }
        for target, one, batch, peak, known in zip(targets, single, many, memory, about, strict=True)
    ]


class _Process:
    """A worker, ended with the block."""

    def __init__(self, target: Target, common: dict[str, Any]) -> None:
        self.title = target.title
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tutelage.export.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        self._send(target.spec() | common)

    def __enter__(self) -> _Process:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.process.kill()
        self.process.communicate()

    def ask(self, **question: Any) -> dict[str, Any]:
        self._send(question)
        return self.answer()

    def _send(self, question: dict[str, Any]) -> None:
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # its end is seen where the answer is missing
            self.process.stdin.write(json.dumps(question) + "\n")
            self.process.stdin.flush()

    def answer(self) -> dict[str, Any]:
        """What the process says to the question before.

        Raises:
            BenchError: it ended, or could not do what was asked.
        """
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise BenchError(f"{self.title}: its process ended; too little memory?")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise BenchError(f"{self.title} cannot be measured: {answer['error']}")
        return answer


def _p90(values: Sequence[float]) -> float:
    return sorted(values)[min(len(values) - 1, round(0.9 * (len(values) - 1)))]
