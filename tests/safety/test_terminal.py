"""What came from data is text on the terminal: no markup of rich, no escape code, no turned direction."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from typed import Calls, stand_in, tutelage

from tutelage.cli.figures import metric
from tutelage.cli.output import complain, print_table, say
from tutelage.report import run_summary, summary_table
from tutelage.runs.batch import BatchProgress
from tutelage.untrusted import visible, visible_json

EVIL = "[red]bold[/] [link=file:///x]y[/link] \x1b[31mred\x1b]0;title\x07\x9b2J\r\x08\u202eabc\x7f"
SHOWN = r"[red]bold[/] [link=file:///x]y[/link] \x1b[31mred\x1b]0;title\x07\x9b2J\x0d\x08\u202eabc\x7f"
CODES = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069]")


def assert_plain(text: str) -> None:
    assert not CODES.search(text), ascii(CODES.search(text))
    assert "[red]bold[/]" in text.replace("\n", "").replace(" ", "") or "[red]" in text


def test_it_is_written_out() -> None:
    assert visible(EVIL) == SHOWN
    assert visible("naïve 数 ✓\tx\ny") == "naïve 数 ✓\tx\ny"
    text = json.dumps({EVIL: EVIL}, ensure_ascii=False)
    assert json.loads(visible_json(text)) == {EVIL: EVIL}
    assert not CODES.search(visible_json(text))


def test_tables_lines_and_complaints(capsys: pytest.CaptureFixture[str]) -> None:
    print_table([EVIL, "b"], [[EVIL, "1"]], title=EVIL, right=["b"])
    say(Path(EVIL))
    complain("error", EVIL)
    printed = capsys.readouterr()
    assert_plain(printed.out)
    assert_plain(printed.err)
    assert SHOWN in printed.err


def test_a_finished_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import types

    found = {
        "name": EVIL,
        "test": {"accuracy": 0.5, EVIL: 0.25},
        "student": {"model": EVIL},
        "teachers": {EVIL: {"model": EVIL, "test": {EVIL: 0.5}}},
        "tables": {EVIL: {"columns": [EVIL], "rows": [[EVIL], [{EVIL: 1.0}]]}},
        "train_seconds": 1.0,
    }
    result = types.SimpleNamespace(folder=tmp_path / EVIL, result=found)
    stand_in(monkeypatch, "tutelage.runs", resume=Calls(result))
    for words in (("resume", "x"), ("resume", "x", "--json")):
        done = tutelage(*words)
        assert done.exit_code == 0, done.output
        assert_plain(done.stdout)


def test_a_comparison(monkeypatch: pytest.MonkeyPatch) -> None:
    runs = [{"seed": 0, "status": "failed", "error": EVIL}]
    table: dict[str, Any] = {
        "metric": EVIL,
        "baseline": EVIL,
        "seeds": [0],
        "split": EVIL,
        "student": {"model": EVIL},
        "teacher": {"model": EVIL, "test": {EVIL: 0.5}},
        "methods": [
            {"name": EVIL, "runs": runs, "mean": 1.0, "low": None, "difference": None, "seconds": 1.0}
        ],
    }
    stand_in(monkeypatch, "tutelage.runs.compare", compare=Calls(table))
    done = tutelage("compare", "digits")
    assert done.exit_code == 0, done.output
    assert_plain(done.stdout)


def test_progress_over_runs() -> None:
    stream = io.StringIO()
    with BatchProgress("run", 1, console=Console(file=stream, soft_wrap=True, highlight=False)) as bar:
        bar.advance(EVIL)
    assert_plain(stream.getvalue())
    assert SHOWN in stream.getvalue()


@pytest.mark.parametrize("of", ["run", "comparison"])
def test_tables_of_the_report(of: str) -> None:
    stream = io.StringIO()
    if of == "run":
        made = run_summary({"status": "done", "name": EVIL, "test": {EVIL: 0.5}, "student": {"model": EVIL}})
    else:
        entry = {"name": EVIL, "mean": 0.5, "runs": [{"seed": 0, "status": "done", "value": 0.5}]}
        made = summary_table({"metric": EVIL, "methods": [entry], "baseline": EVIL})
    Console(file=stream, width=300).print(made)
    assert not CODES.search(stream.getvalue())
    assert "bold" in stream.getvalue()


def test_an_error_names_what_it_was_given() -> None:
    done = tutelage("run", f"nothing{EVIL}.yaml")
    assert done.exit_code == 2
    assert_plain(done.stderr)


def test_a_figure_of_an_odd_metric_is_a_number() -> None:
    assert metric(EVIL, 0.25) == "0.25"
