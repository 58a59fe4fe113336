"""The bench: what it says and writes of benchmarks that hold and that do not, and that its own ones run."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

CHEAP = ("loss.*.64x100", "loss.ofakd.*", "loss.pkt.*", "memory.kd.*", "taps.hook", "trainer.overhead")
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def bench() -> ModuleType:
    sys.path.insert(0, str(Path(__file__).parent.parent))
    try:
        import benchmarks.__main__
    finally:
        sys.path.pop(0)
    return benchmarks.__main__


@pytest.fixture
def fake(bench: ModuleType, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Makes benchmarks whose calls take as long as they say, by a clock of their own."""
    from benchmarks import harness

    now = [0.0]
    monkeypatch.setattr("benchmarks.harness.time.perf_counter", lambda: now[0])

    def make(name: str, ours: float, peer: float | None, **options: Any) -> Any:
        def call(seconds: float) -> Callable[[], None]:
            return lambda: now.__setitem__(0, now[0] + seconds)

        count = options.pop("count", 1)
        sides = harness.Sides(call(ours), None if peer is None else call(peer), count=count, note="fake rows")
        bar = options.pop("bar", harness.Bar(1.03))
        return harness.Benchmark(name, "something", "a peer", bar, lambda device: sides, **options)

    return make


@pytest.fixture
def folder(bench: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Where results and their page go."""
    monkeypatch.setattr(bench.record, "RESULTS", tmp_path)
    monkeypatch.setattr(bench.record, "PAGE", tmp_path / "speed.md")
    return tmp_path


def test_one_that_holds(bench: ModuleType, fake: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert bench.main([], [fake("good.one", 0.102, 0.1)]) == 0
    line = capsys.readouterr().out.splitlines()[1]
    assert line.split("  ")[0] == "good.one"
    assert "1.020×" in line
    assert "≤ 1.030×" in line
    assert line.endswith("holds  [fake rows]")


def test_one_that_falls_short(bench: ModuleType, fake: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert bench.main([], [fake("good.one", 0.1, 0.1), fake("bad.one", 0.104, 0.1)]) == 1
    out = capsys.readouterr().out
    assert "1.040×" in out
    assert "falls short" in out
    assert out.splitlines()[-1] == "1 of 2 hold or are skipped, 1 fall short"


def test_units(bench: ModuleType, fake: Any, capsys: pytest.CaptureFixture[str]) -> None:
    from benchmarks.harness import Bar

    added = fake("added", 0.0164, 0.01, bar=Bar(500, "µs"), count=16)
    alone = fake("alone", 0.25, None, bar=Bar(0.2, "s"))
    share = fake("share", 0.3, 0.01, bar=Bar(5, "%"), count=1000)
    assert bench.main(["--repeats", "1"], [added, alone, share]) == 1
    first, second, third = capsys.readouterr().out.splitlines()[1:4]
    assert "3.000 %" in third
    assert "holds" in third
    assert "400 µs" in first
    assert "holds" in first
    assert "0.250 s" in second
    assert "falls short" in second


def test_sides_come_in_turn(bench: ModuleType) -> None:
    from benchmarks.harness import Bar, Benchmark, Effort, Sides, run

    calls: list[str] = []
    sides = Sides(lambda: calls.append("A"), lambda: calls.append("B"))
    run(Benchmark("x", "", "", Bar(9), lambda device: sides), CPU, Effort(rounds=3, seconds=1e-9))
    assert "".join(calls) == "AB" + "AB" * 3


def test_slow_ones_have_a_third_of_the_rounds(bench: ModuleType, fake: Any) -> None:
    from benchmarks.harness import Effort, run

    result = run(fake("slow", 20.0, 30.0, slow=True), CPU, Effort(rounds=9))
    assert result.ours == pytest.approx([20.0] * 3)
    assert result.peer == pytest.approx([30.0] * 3)


def test_skipped_is_said_and_is_no_failure(bench: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    from benchmarks.harness import Bar, Benchmark, Skipped

    def build(device: torch.device) -> Any:
        raise Skipped("pip install a-peer")

    assert bench.main([], [Benchmark("absent", "", "", Bar(1), build)]) == 0
    assert "absent  skipped: pip install a-peer" in capsys.readouterr().out


def test_what_is_saved(bench: ModuleType, fake: Any, folder: Path) -> None:
    (folder / "speed.md").write_text("above\n<!-- speed:begin -->\nold\n<!-- speed:end -->\nbelow\n")
    assert bench.main(["--save", "My GPU", "--repeats", "4"], [fake("bad.one", 0.25, 0.1)]) == 1
    saved = json.loads((folder / "my-gpu.json").read_text())
    assert {"date", "commit", "device", "processor", "threads", "torch"} <= saved.keys()
    assert saved["rounds"] == 4
    (entry,) = saved["benchmarks"]
    assert entry["verdict"] == "falls short"
    assert entry["value"] == pytest.approx(2.5)
    assert entry["ours"] == pytest.approx([0.25] * 4)
    assert entry["theirs"] == pytest.approx([0.1] * 4)
    page = (folder / "speed.md").read_text()
    assert "| `bad.one` | 2.500× | 2.500× to 2.500× | ≤ 1.030× | falls short |" in page
    assert "old" not in page


def test_nothing_is_written_unless_asked(bench: ModuleType, fake: Any, folder: Path) -> None:
    bench.main([], [fake("one", 0.1, 0.1)])
    assert list(folder.iterdir()) == []


def test_a_pattern_that_matches_nothing(bench: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    assert bench.main(["--only", "trainr.none", "--list"]) == 2
    assert "near: trainer.none" in capsys.readouterr().err


def test_all_are_listed(bench: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    names = [benchmark.name for benchmark in bench.BENCHMARKS]
    assert len(set(names)) == len(names)
    assert bench.main(["--list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("  ")[0] for line in lines if not line.startswith(" ")] == names
    assert {name.split(".")[0] for name in names} == {
        *("trainer", "recipe", "torchdistill", "taps", "loss", "memory", "llm", "llm-memory"),
        *("import", "compare", "store", "teacher", "saving"),
    }


@pytest.mark.parametrize("pattern", CHEAP)
def test_cheap_ones_run(bench: ModuleType, pattern: str) -> None:
    from benchmarks.harness import Effort, run
    from benchmarks.registry import chosen

    for benchmark in chosen(bench.BENCHMARKS, pattern):
        result = run(benchmark, CPU, Effort(rounds=1, seconds=0))
        assert len(result.ours) == len(result.peer) == 1, benchmark.name
        assert result.value == result.value, benchmark.name


def test_losses_of_language_models_run_in_processes_of_their_own(bench: ModuleType) -> None:
    from benchmarks.harness import Effort, UnequalWorkError, run
    from benchmarks.llm_losses import WORKERS, Size, _memory, _time, same_gradients

    small = Size(256, 4096, 32, 32)
    for make, peer in ((_time, "products"), (_memory, "eager")):
        result = run(make("generalized_jsd", small, peer), CPU, Effort(rounds=1))
        assert len(result.ours) == len(result.peer) == 1
    whole, half = WORKERS.of(
        ("tutelage", "forward_kl", small), ("eager", "forward_kl", dataclasses.replace(small, masked=True))
    )
    with pytest.raises(UnequalWorkError, match=r"tutelage and eager: norms of gradients"):
        same_gradients(whole, half)
    WORKERS.of()
    assert whole.process.poll() is not None


def test_a_peer_that_is_not_there_is_reported(
    bench: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from benchmarks import peers
    from benchmarks.harness import Effort, run
    from benchmarks.llm_losses import Size, _time

    monkeypatch.setattr(peers, "_MADE_FROM", tmp_path / "none")
    result = run(_time("forward_kl", Size(16, 64, 8, 8), "trl"), CPU, Effort(rounds=1))
    assert result.verdict == "skipped: trl is not installed: python -m benchmarks.peers"


def test_quick_leaves_out_what_takes_minutes(
    bench: ModuleType, fake: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    made = [fake("short", 1.0, 1.0), fake("drawn-out", 1.0, 1.0, long=True)]
    bench.main(["--quick", "--list"], made)
    assert "drawn-out" not in capsys.readouterr().out
    bench.main(["--quick", "--only", "drawn-out", "--list"], made)
    assert "drawn-out" in capsys.readouterr().out


def test_unequal_work_is_refused(bench: ModuleType) -> None:
    from benchmarks.harness import UnequalWorkError
    from benchmarks.losses import Draw, Pair, sides

    def unequal(draw: Draw) -> Pair:
        leaf = draw.leaf(3)
        return Pair(lambda: leaf.sum(), lambda: (leaf * 1.001).sum(), [leaf])

    with pytest.raises(UnequalWorkError, match="differs"):
        sides(unequal, CPU)


def test_the_pages_tables_are_the_results(bench: ModuleType, repository: Path) -> None:
    from tools.readme import filled

    text = (repository / "docs" / "speed.md").read_text()
    assert filled(text, "speed", bench.record.tables()) == text, "`--save` writes them"
