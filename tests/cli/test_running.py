"""`run`, `resume` and `compare`: what is handed on, what is printed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typed import tutelage

from tutelage.recipe import Recipe, load_recipe


def test_run_hands_on_what_was_typed(runs: Any, tmp_path: Path) -> None:
    done = tutelage(
        "run",
        "digits",
        "method=nkd",
        "train.seed=3",
        "--dir",
        str(tmp_path / "x"),
        "--resume",
        "--no-progress",
    )
    assert done.exit_code == 0, done.output
    ((recipe,), options) = runs.distill.calls[0]
    assert recipe == load_recipe("digits", ["method=nkd", "train.seed=3"])
    assert options == {"folder": tmp_path / "x", "resume": True, "progress": False}


@pytest.mark.parametrize(
    ("words", "folder"),
    [
        (["digits"], "runs/digits-kd-0"),
        (["digits", "method=[kd, nkd]", "train.seed=2"], "runs/digits-kd+nkd-2"),
        (["digits", "output.dir=elsewhere"], "elsewhere"),
        (["digits", "output.dir=elsewhere", "--dir", "typed"], "typed"),
    ],
)
def test_run_names_its_folder(runs: Any, words: list[str], folder: str) -> None:
    assert tutelage("run", *words).exit_code == 0
    assert runs.distill.calls[0][1] == {"folder": Path(folder), "resume": False, "progress": None}


@pytest.mark.parametrize("verb", ["run", "resume"])
def test_a_result_is_a_table_whose_last_line_is_the_report(runs: Any, verb: str, tmp_path: Path) -> None:
    folder = tmp_path / "here"
    folder.mkdir()
    (folder / "report.html").touch()
    done = tutelage(verb, "digits")
    assert done.exit_code == 0
    assert done.stdout.splitlines()[-1].split() == ["report", str(folder / "report.html")]
    student = next(line for line in done.stdout.splitlines() if "digits:mlp-16" in line)
    assert student.split() == [
        "student",
        "digits:mlp-16",
        "91.2",
        "nan",
        "1.23",
        "k",
        "5.6",
        "M",
        "0.123",
        "ms",
    ]
    assert "[sex=1]" not in done.stdout


@pytest.mark.parametrize("verb", ["run", "resume"])
def test_a_methods_own_tables_are_printed(runs: Any, monkeypatch: pytest.MonkeyPatch, verb: str) -> None:
    table = {"columns": ["step", "classes seen", "accuracy"], "rows": [[0, 2, 0.98765], [1, 4, None]]}
    monkeypatch.setitem(runs.distill.outcome.result, "tables", {"accuracy by step": table})
    lines = [line.split() for line in tutelage(verb, "digits").stdout.splitlines()]
    start = lines.index(["accuracy", "by", "step"])
    shown = [line for line in lines[start:] if line]
    assert [shown[1], *shown[3:5]] == [
        ["step", "classes", "seen", "accuracy"],
        ["0", "2", "0.9877"],
        ["1", "4", "-"],
    ]
    assert json.loads(tutelage(verb, "digits", "--json").stdout)["tables"] == {"accuracy by step": table}


@pytest.mark.parametrize(
    ("words", "wanted"),
    [
        (["run", "digits"], {"status": "done", "name": "kd"}),
        (["resume", "runs/x"], {"status": "done", "name": "kd"}),
        (["run", "digits", "--dry-run"], {"method": "kd", "data": {"rows": 300}}),
        (["compare", "digits"], {"metric": "accuracy", "baseline": "none"}),
    ],
)
def test_json_is_alone_on_standard_output(runs: Any, words: list[str], wanted: dict[str, Any]) -> None:
    done = tutelage(*words, "--json")
    assert done.exit_code == 0
    found = json.loads(done.stdout, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert found.items() >= wanted.items()
    assert "chatter" in done.stderr


def test_a_dry_run_checks_and_spends_nothing(runs: Any) -> None:
    done = tutelage("run", "digits", "--dry-run")
    assert done.exit_code == 0
    assert "nothing was trained or written" in done.stdout
    assert runs.check.calls
    assert not runs.distill.calls


def test_only_the_first_process_prints(runs: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    assert tutelage("run", "digits", "--json").stdout == ""


def test_compare_hands_on_what_was_typed(runs: Any, tmp_path: Path) -> None:
    words = ["--methods", "none,kd,nkd", "--seeds", "3,5", "--baseline", "kd", "--jobs", "2", "--no-progress"]
    done = tutelage("compare", "digits", *words, "--trials", "4", "--dir", str(tmp_path))
    assert done.exit_code == 0, done.output
    ((recipe,), options) = runs.compare.calls[0]
    assert isinstance(recipe, Recipe)
    assert options == {
        "methods": ["none", "kd", "nkd"],
        "seeds": [3, 5],
        "baseline": "kd",
        "folder": tmp_path,
        "trials": 4,
        "jobs": 2,
        "progress": False,
    }


def test_compare_leaves_to_the_recipe_what_was_not_typed(runs: Any) -> None:
    assert tutelage("compare", "digits").exit_code == 0
    options = runs.compare.calls[0][1]
    assert [options[name] for name in ("methods", "seeds", "trials", "baseline", "jobs")] == [None] * 5
    assert options["folder"] == Path("runs/compare-digits")
    assert tutelage("compare", "digits", "--methods", "all").exit_code == 0
    assert runs.compare.calls[1][1]["methods"] == "all"
    assert tutelage("compare", "digits", "--seeds", "two").exit_code == 2


def test_a_comparison_is_a_table_whose_last_line_is_the_report(runs: Any, tmp_path: Path) -> None:
    (tmp_path / "report.html").touch()
    done = tutelage("compare", "digits", "--dir", str(tmp_path))
    lines = done.stdout.splitlines()
    assert lines[-1] == str(tmp_path / "report.html")
    assert "kd, seed 1: failed: NaN in kd" in lines
    rows = {line.split()[0]: line for line in lines if line.strip()}
    assert rows["teacher"].split() == ["teacher", "97.0", "2", "M", "-", "1.5", "ms"]
    assert "90.0 [88.0, 92.0]" in rows["none"]
    for words in ("kd (1 of 2 failed)", "91.5", "+1.5 [-0.4, 3.4]", "1.23 k", "5.6 M", "0.123 ms", "3.0 min"):
        assert words in next(line for line in lines if "1 of 2 failed" in line)
