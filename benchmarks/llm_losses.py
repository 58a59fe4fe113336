"""Losses of language models, from hidden states and heads to gradients: against the products alone, and against peers.

Every side runs in a process of its own, one after the other in turn. Memory is what a process holds at most above its
inputs, in the first call.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks import peers
from benchmarks.harness import Bar, Benchmark, Sides, Skipped, UnequalWorkError
from benchmarks.llm_worker import BETAS, LOSSES

_ROOT = Path(__file__).parent.parent
_TOLERANCE = 1e-4
"""Largest relative difference of the norms of two sides' gradients, in float32."""

_INSTALLED = ("tutelage", "eager", "products", "chunks")
"""Sides that need no peer."""


@dataclass(frozen=True)
class Size:
    """Tokens, entries of the vocabulary, widths; whether every second token is masked."""

    rows: int
    vocabulary: int
    width: int = 512
    teacher_width: int = 1024
    masked: bool = False

    @property
    def name(self) -> str:
        return f"{self.rows}x{self.vocabulary}"

    @property
    def logits(self) -> int:
        """Bytes of one model's logits in float32."""
        return 4 * self.rows * self.vocabulary


class Worker:
    """A side in its own process, which has run once.

    Raises:
        Skipped: its package cannot be imported, or there is no environment of the peers.
    """

    def __init__(self, who: str, divergence: str, size: Size) -> None:
        python = sys.executable if who in _INSTALLED else str(peers.PYTHON)
        if who not in _INSTALLED and not peers.present():
            raise Skipped(f"{who} is not installed: python -m benchmarks.peers")
        options = json.dumps({"who": who, "divergence": divergence} | dataclasses.asdict(size))
        self.who = who
        self.process = subprocess.Popen(
            [python, "-W", "ignore", "-m", "benchmarks.llm_worker", options],
            cwd=_ROOT,
            env=os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        first = self._answer()
        if "missing" in first:
            self.close()
            raise Skipped(f"{who} cannot be imported: {first['missing']}")
        self.norms, self.peak = first["norms"], first["peak"]

    def __call__(self) -> None:
        """Once more; returns when it is done."""
        assert self.process.stdin is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        self._answer()

    def close(self) -> None:
        with self.process:
            self.process.kill()

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"{self.who} ended with status {self.process.wait()}; what it wrote says why")
        found: dict[str, Any] = json.loads(line)
        return found


class Workers:
    """The processes that the present line needs. All others are closed: they hold gigabytes."""

    def __init__(self) -> None:
        self._running: dict[tuple[str, str, Size], Worker] = {}

    def of(self, *wanted: tuple[str, str, Size]) -> list[Worker]:
        """Workers by name, divergence and size."""
        for key in [key for key in self._running if key not in wanted]:
            self._running.pop(key).close()
        for key in reversed(wanted):  # a peer that is missing is found before ours is started
            if key not in self._running:
                self._running[key] = Worker(*key)
        return [self._running[key] for key in wanted]


def same_gradients(ours: Worker, theirs: Worker) -> None:
    """Raise UnequalWorkError unless the norms of both sides' gradients agree; the products alone have none."""
    pairs = zip(ours.norms, theirs.norms, strict=True) if theirs.norms else ()
    if not all(math.isclose(mine, their, rel_tol=_TOLERANCE) for mine, their in pairs):
        raise UnequalWorkError(
            f"{ours.who} and {theirs.who}: norms of gradients {ours.norms} and {theirs.norms}"
        )


WORKERS = Workers()


def _cpu(device: torch.device) -> None:
    if device.type != "cpu":
        raise Skipped("this bench is written for a CPU")


def time_of(device: torch.device, *, divergence: str, size: Size, peer: str) -> Sides:
    _cpu(device)
    ours, theirs = WORKERS.of(("tutelage", divergence, size), (peer, divergence, size))
    same_gradients(ours, theirs)
    return Sides(ours, theirs)


def memory_of(device: torch.device, *, divergence: str, size: Size, peer: str) -> Sides:
    """Of ours and of a peer, or of one model's logits."""
    _cpu(device)
    if peer == "logits":
        (ours,) = WORKERS.of(("tutelage", divergence, size))
        return Sides(lambda: ours.peak, lambda: size.logits)
    ours, theirs = WORKERS.of(("tutelage", divergence, size), (peer, divergence, size))
    same_gradients(ours, theirs)
    note = f"{theirs.peak / size.logits:.1f}× one model's logits"
    return Sides(lambda: ours.peak, lambda: theirs.peak, note=note)


def half_masked(device: torch.device, *, size: Size) -> Sides:
    _cpu(device)
    masked = dataclasses.replace(size, masked=True)
    half, whole = WORKERS.of(("tutelage", "forward_kl", masked), ("tutelage", "forward_kl", size))
    return Sides(half, whole)


PEERS = {
    "products": "the four products alone",
    "chunks": "the four products alone, 256 tokens at a time",
    "eager": "the formula in plain PyTorch",
    "liger-kernel": "liger-kernel's fused linear JSD, as it comes (compiled)",
    "torchtune": "torchtune's loss with chunked outputs",
    "trl": "TRL's generalized JSD of logits",
    "logits": "one model's logits in float32",
}
SHORT = {"forward_kl": "fkl", "reverse_kl": "rkl", "generalized_jsd": "jsd"}
BARS = {"forward_kl": 1.2, "reverse_kl": 1.2, "generalized_jsd": 1.5}
SMALL, MIDDLE = Size(1024, 32_768), Size(2048, 50_257, width=768)
LONG, WIDE, LARGE = Size(4096, 32_768), Size(1024, 131_072, width=768), Size(4096, 131_072, width=768)
MEMORY = {SMALL: 1.2, MIDDLE: 0.8}
MOST = 2**27
"""Logits of a model up to which peers take part."""


def _what(divergence: str, size: Size) -> str:
    return (
        f"`fused_linear_divergence`, {divergence}, forward and backward: {size.rows} tokens, vocabulary "
        f"{size.vocabulary}, widths {size.width} and {size.teacher_width}, float32"
    )


def _time(divergence: str, size: Size, peer: str) -> Benchmark:
    bar = BARS[divergence] if peer in ("products", "chunks") else 1.0
    build = functools.partial(time_of, divergence=divergence, size=size, peer=peer)
    name = f"llm.{SHORT[divergence]}.{size.name}.{peer}"
    return Benchmark(
        name, _what(divergence, size), PEERS[peer], Bar(bar), build, slow=True, long=size != SMALL
    )


def _memory(divergence: str, size: Size, peer: str) -> Benchmark:
    build = functools.partial(memory_of, divergence=divergence, size=size, peer=peer)
    name = f"llm-memory.{SHORT[divergence]}.{size.name}.{peer}"
    bar = Bar(MEMORY[size] if peer == "logits" else 1.0)
    what = f"{_what(divergence, size)}: bytes above the inputs"
    return Benchmark(name, what, PEERS[peer], bar, build, quantity="counted", long=size != SMALL)


def _of(divergence: str, size: Size) -> list[Benchmark]:
    """All lines of a divergence and size."""
    found = [_time(divergence, size, "products")]
    if size.rows * size.vocabulary > MOST:
        return found
    if size in MEMORY:
        found += [_time(divergence, size, "chunks"), _memory(divergence, size, "logits")]
    rivals = set(LOSSES) - {"tutelage"} - ({"torchtune"} if divergence == "generalized_jsd" else set())
    return found + [make(divergence, size, peer) for peer in sorted(rivals) for make in (_time, _memory)]


_HALF = Benchmark(
    "llm.half-masked",
    f"{_what('forward_kl', SMALL)}, every second token masked",
    "no token masked",
    Bar(0.55),
    functools.partial(half_masked, size=SMALL),
    slow=True,
)

BENCHMARKS = [
    *(line for divergence in BETAS for line in _of(divergence, SMALL)),
    _HALF,
    *(
        line
        for size in (MIDDLE, LONG, WIDE, LARGE)
        for divergence in ("forward_kl", "generalized_jsd")
        for line in _of(divergence, size)
    ),
]
