"""Tables for the terminal."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

from report_fakes import result, write_comparison
from rich.console import Console
from rich.table import Table

from tutelage.report import run_summary, summary_table


def _printed(table: Table, width: int = 160) -> str:
    written = io.StringIO()
    Console(file=written, width=width, color_system=None).print(table)
    return written.getvalue()


def _comparison(folder: Path, **changes: Any) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(
        (write_comparison(folder, **changes) / "comparison.json").read_text()
    )
    return content


def test_leaderboard(tmp_path: Path) -> None:
    content = _comparison(tmp_path / "c", failed={("kd", 0): "boom"})
    lines = _printed(summary_table(content)).splitlines()
    named = [
        line.split()[0]
        for line in lines
        if line.strip() and line.split()[0] in ("none", "kd", "nkd", "Teacher")
    ]
    assert named == ["nkd", "kd", "none", "Teacher"]
    kd = next(line for line in lines if line.split()[:1] == ["kd"])
    assert f"{100 * content['methods'][1]['mean']:.2f}%" in kd
    assert "4 of 5" in kd
    assert any("1 failed" in line for line in lines)


def test_square_brackets_are_text(tmp_path: Path) -> None:
    content = _comparison(tmp_path / "c", means={"none": 0.8, "[bold]kd[/bold]": 0.9}, seeds=2)
    assert "[bold]kd[/bold]" in _printed(summary_table(content))
    teachers: dict[str, Any] = {"accuracy[x]": {"test": {}}, "b": {}}
    assert "accuracy[x]" in _printed(run_summary(result(test={"accuracy": 0.9}, teachers=teachers)))


def test_a_run(tmp_path: Path) -> None:
    printed = _printed(run_summary(result()))
    assert "The student reaches 91.3% accuracy" in printed
    row = next(line.split() for line in printed.splitlines() if line.split()[:1] == ["Parameters"])
    assert row == ["Parameters", "1.23", "M", "7.43", "M", "6.0×", "less"]


def test_nothing_is_enough() -> None:
    assert "has not written its result" in _printed(run_summary({}))
    assert "Method" in _printed(summary_table({}))
