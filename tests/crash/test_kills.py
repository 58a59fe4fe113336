"""Real processes, killed with SIGKILL at random instants and resumed: the same weights, bit for bit, every time.

`make crash-test` runs all of it; the fast suite runs a small form.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from support import free_port

SERVER = Path(__file__).with_name("server.py")
STEPS, EVERY = 24, 2
"""Steps of a run, and between its checkpoints."""


def recipe(method: str, **train: Any) -> dict[str, Any]:
    return {
        "data": {"path": "digits", "limit": 96, "validation": 32, "test": 64, "views": [{"name": "crop"}]},
        "teacher": {"model": "digits:mlp-16"},
        "student": {"model": "digits:cnn-4-6"},
        "method": {"name": "wa", "steps": 2, "memory_size": 20} if method == "wa" else method,
        "train": {
            "steps": STEPS,
            "batch_size": 16,
            "optimizer": {"name": "adamw", "lr": 0.01},
            "device": "cpu",
            "threads": 1,
            "checkpoint": {"every": EVERY},
            **train,
        },
        "output": {"report": False},
    }


class Case(NamedTuple):
    recipe: dict[str, Any]
    ranks: int = 1


CASES = {
    "kd": Case(recipe("kd", ema=0.9)),
    "long": Case(recipe("kd", steps=60)),
    "wa": Case(recipe("wa", steps=10)),
    "sharded": Case(recipe("kd", sharding="fsdp"), ranks=2),
}


class Server:
    """Starts runs as children of one process that has imported everything."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-W", "ignore", str(SERVER)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
        assert self._answer() == "ready"

    def _answer(self) -> Any:
        assert self.process.stdout is not None
        return json.loads(self.process.stdout.readline())

    def start(self, case: Case, folder: Path) -> list[int]:
        """Process ids of a run into a folder, which goes on where it stopped."""
        assert self.process.stdin is not None
        job = {"recipe": case.recipe, "ranks": case.ranks, "port": free_port(), "folder": str(folder)}
        print(json.dumps(job | {"events": f"{folder}.events"}), file=self.process.stdin, flush=True)
        pids: list[int] = self._answer()
        return pids

    def ended(self) -> list[int]:
        """Exit codes of the run that was started last, once all its processes have ended."""
        codes: list[int] = self._answer()
        return codes

    def finish(self, case: Case, folder: Path) -> None:
        self.start(case, folder)
        codes = self.ended()
        assert codes == [0] * case.ranks, Path(f"{folder}.events.0.err").read_text()

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(timeout=30)
        assert self.process.stdout is not None
        self.process.stdout.close()


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    started = Server()
    yield started
    started.close()


class Whole(NamedTuple):
    """A run that nothing stopped."""

    weights: dict[str, Tensor]
    losses: list[tuple[int, float]]
    seconds: float
    save_seconds: float


@pytest.fixture(scope="module")
def whole(server: Server, tmp_path_factory: pytest.TempPathFactory) -> Any:
    done: dict[str, Whole] = {}

    def of(name: str) -> Whole:
        if name not in done:
            folder = tmp_path_factory.mktemp("whole") / name
            server.finish(CASES[name], folder)
            seconds, saving = timed(server, CASES[name], folder.with_name(f"{name}-timed"))
            done[name] = Whole(weights(folder), losses(folder), seconds, saving)
        return done[name]

    return of


def timed(server: Server, case: Case, folder: Path) -> tuple[float, float]:
    """How long a run takes whose imports are done, and a checkpoint of it, as one who watches the log sees it."""
    started = time.monotonic()
    server.start(case, folder)
    took: list[float] = []
    begun, seen = 0.0, 0
    while len(took) < 5:
        lines = events(folder)
        for line in lines[seen:]:
            if line.startswith("save begin"):
                begun = time.monotonic()
            elif line.startswith("save end") and begun:
                took.append(time.monotonic() - begun)
        seen = len(lines)
    server.ended()
    return time.monotonic() - started, sorted(took)[len(took) // 2]


def events(folder: Path) -> list[str]:
    path = Path(f"{folder}.events")
    return path.read_text().splitlines() if path.exists() else []


def weights(folder: Path) -> dict[str, Tensor]:
    found: dict[str, Tensor] = load_file(folder / "student" / "model.safetensors")
    return found


def losses(folder: Path) -> list[tuple[int, float]]:
    """Every recorded loss, those of stages one after the other."""
    found = []
    for path in sorted(folder.rglob("metrics.jsonl")):
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        found += [(line["step"], line["loss"]) for line in lines if line["kind"] == "train"]
    return found


def kill(server: Server, pids: list[int]) -> bool:
    """Kill all processes of a run at once; whether it was still under way."""
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):  # it has ended
            os.kill(pid, signal.SIGKILL)
    return any(code == -signal.SIGKILL for code in server.ended())


def kill_at(server: Server, case: Case, folder: Path, seconds: float) -> bool:
    pids = server.start(case, folder)
    time.sleep(seconds)
    return kill(server, pids)


def kill_in_save(server: Server, case: Case, folder: Path, save: int, seconds: float) -> bool:
    """Kill so long after the n-th save of this process began."""
    before = len(events(folder))
    pids = server.start(case, folder)
    deadline = time.monotonic() + 60
    while sum(line.startswith("save begin") for line in events(folder)[before:]) < save:
        assert time.monotonic() < deadline, Path(f"{folder}.events.0.err").read_text()
        time.sleep(0.0005)
    time.sleep(seconds)
    return kill(server, pids)


def in_save(lines: list[str]) -> bool:
    """Whether the log ends inside a save."""
    return sum(line.startswith("save begin") for line in lines) > sum(
        line.startswith("save end") for line in lines
    )


def check_loss_of_steps(before: list[str], after: list[str]) -> None:
    """A run goes on from its last complete checkpoint, or from the one that was being written: what it does anew are at
    most the steps since then."""
    saved = [int(line.split()[-1]) for line in before if line.startswith("save end")]
    begun = [int(line.split()[-1]) for line in before if line.startswith("save begin")]
    done = [int(line.split()[-1]) for line in before if line.startswith("step ")]
    starts = [int(line.split()[-1]) for line in after if line.startswith("start")]
    if not starts:  # killed after its last file: it is read back
        assert saved[-1] == done[-1] == STEPS
        return
    start = starts[0]
    assert start in (saved[-1:] or [0]) + begun[-1:], (start, before[-5:])
    assert (done[-1] if done else 0) - start <= EVERY


def kills(
    server: Server, name: str, whole: Whole, folder: Path, count: int, inside: int, seed: int
) -> dict[str, int]:
    """Kill ``count`` runs, ``inside`` of them or more within a save, and hold what each ends with against the whole."""
    case, draw = CASES[name], random.Random(seed)
    found = {"kills": 0, "inside a save": 0, "before the first step": 0}
    for attempt in range(4 * count):
        if found["kills"] >= count and found["inside a save"] >= inside:
            return found
        place = folder / f"{name}-{attempt}"
        if found["inside a save"] < inside and attempt % 2:
            late = draw.random() * whole.save_seconds
            hit = kill_in_save(server, case, place, draw.randint(1, 5), late)
        else:
            hit = kill_at(server, case, place, draw.random() * whole.seconds)
        if not hit:
            continue
        before = events(place)
        found["kills"] += 1
        found["inside a save"] += in_save(before)
        found["before the first step"] += not any(line.startswith("step") for line in before)
        server.finish(case, place)
        if name != "wa":  # its stages count their steps apart
            check_loss_of_steps(before, events(place)[len(before) :])
        assert_same(whole, place)
    raise AssertionError(f"so many kills could not be placed: {found}")


def assert_same(whole: Whole, folder: Path) -> None:
    found = weights(folder)
    assert [key for key, value in whole.weights.items() if not torch.equal(value, found[key])] == []
    assert losses(folder) == whole.losses
    leftovers = [path.name for path in folder.rglob("*") if path.name.startswith((".tmp-", ".old-"))]
    assert leftovers == []


def test_a_few_kills(server: Server, whole: Any, tmp_path: Path) -> None:
    found = kills(server, "kd", whole("kd"), tmp_path, count=2, inside=1, seed=1)
    assert found["kills"] >= 2


@pytest.mark.slow
@pytest.mark.parametrize(("name", "count", "inside"), [("kd", 30, 10), ("wa", 8, 3), ("sharded", 6, 2)])
def test_kills_at_random_instants(
    name: str, count: int, inside: int, server: Server, whole: Any, tmp_path: Path
) -> None:
    found = kills(server, name, whole(name), tmp_path, count, inside, seed=0)
    print(name, found)
    assert found["kills"] >= count
    assert found["inside a save"] >= inside


@pytest.mark.slow
def test_one_run_that_is_killed_again_and_again(server: Server, whole: Any, tmp_path: Path) -> None:
    """Each process is killed within its second save or soon after, so that the run creeps on to its end."""
    case, draw, hits = CASES["long"], random.Random(2), 0
    for _ in range(8):
        late = draw.random() * 2 * whole("long").save_seconds
        hits += kill_in_save(server, case, tmp_path / "run", 2, late)
    server.finish(case, tmp_path / "run")
    print("killed", hits, "times in a row")
    assert hits == 8
    assert_same(whole("long"), tmp_path / "run")
