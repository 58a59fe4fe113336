"""Half-written, damaged and hostile folders: a report is written, says what is missing, and runs nothing of theirs."""

from __future__ import annotations

import base64
import hashlib
import json
import math
import re
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from report_analysis_fakes import analysis, explained, tune_comparison, tuning, write_analysis
from report_fakes import RECIPE, metrics, result, write_comparison, write_run
from report_hostile import hostile_comparison, hostile_run
from report_parser import Element, Page

from tutelage.report import render, write_report

EVIL = "<script>alert('x')</script>\"'><img src=x onerror=alert(1)>&amp;%{x}{{7*7}}"


@pytest.fixture
def without_plotly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(render, "_plotly", lambda: "var Plotly;")


@pytest.mark.usefixtures("without_plotly")
@pytest.mark.parametrize("name", ["result.json", "metrics.jsonl", "recipe.yaml", "environment.json"])
@pytest.mark.parametrize("damage", ["missing", "empty", "torn", "binary", "a folder"])
def test_any_file_may_be_away_or_damaged(tmp_path: Path, name: str, damage: str) -> None:
    path = write_run(tmp_path / "run") / name
    whole = path.read_bytes()
    path.unlink()
    if damage == "a folder":
        path.mkdir()
    elif damage != "missing":
        path.write_bytes({"empty": b"", "torn": whole[: len(whole) // 2], "binary": b"\xff\x00\xfe{"}[damage])
    page = Page(write_report([tmp_path / "run"]))
    told = " ".join(notice.words for notice in page.all("div", class_="notice"))
    if name == "metrics.jsonl" and damage == "empty":
        assert "No training steps were logged" in told
    elif (name, damage) != ("recipe.yaml", "torn"):
        assert name in told


@pytest.mark.usefixtures("without_plotly")
@pytest.mark.parametrize("name", ["analysis.json", "explain.json"])
@pytest.mark.parametrize("damage", ["missing", "empty", "torn", "binary", "a list", "a folder"])
def test_what_not_every_run_has_may_be_away_or_damaged(tmp_path: Path, name: str, damage: str) -> None:
    folder = write_analysis(write_run(tmp_path / "run"), analysis(), explained())
    path = folder / name
    whole = path.read_bytes()
    path.unlink()
    if damage == "a folder":
        path.mkdir()
    elif damage != "missing":
        torn = whole[: len(whole) // 2]
        path.write_bytes({"empty": b"", "torn": torn, "binary": b"\xff\x00{", "a list": b"[]"}[damage])
    page = Page(write_report([folder]))
    told = " ".join(notice.words for notice in page.all("div", class_="notice"))
    assert (name in told) == (damage != "missing")
    assert ("Layers of student and teacher" in page.text) == (name == "analysis.json")
    assert ("Calibration" in [found.words for found in page.all("h2")]) == (name == "explain.json")


def test_a_torn_last_line_is_left_out_and_said(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", lines=metrics(epochs=4))
    log = folder / "metrics.jsonl"
    log.write_text(log.read_text()[:-20])
    (folder / "result.json").unlink()
    page = Page(write_report([folder]))
    assert "The last line of metrics.jsonl is torn" in page.text
    assert "This run has not written its result" in page.text
    assert "It came to step 144 in epoch 4 of 12." in page.text
    assert page.table("Last evaluation: validation rows at step 108")[1][0] == "Accuracy"
    assert f"tutelage resume {folder}" in page.text


def test_steps_logged_twice_count_once_as_last_logged(tmp_path: Path) -> None:
    lines = metrics(epochs=1, per_epoch=10)
    late = [line | {"loss": 99.0} for line in lines if line["kind"] == "train" and line["step"] > 5]
    folder = write_run(tmp_path / "run", lines=[*lines, *late])
    data = Page(write_report([folder])).payloads["Training loss and its terms"]["data"][0]
    assert data["x"] == list(range(1, 11))
    assert data["y"][5:] == [99.0] * 5


def test_values_that_are_no_numbers_are_said_and_left_out(tmp_path: Path) -> None:
    lines = metrics(epochs=2, per_epoch=10)
    lines[3] |= {"loss": math.nan, "terms": {"label": math.inf, "nkd": 0.1}}
    folder = write_run(tmp_path / "run", lines=lines, test={"accuracy": math.nan, "loss": math.inf})
    page = Page(write_report([folder]))
    assert "2 logged training values are not finite" in page.text
    assert 4 not in page.payloads["Training loss and its terms"]["data"][0]["x"]
    rows = {row[0]: row[1:] for row in page.table("Student against teacher")}
    assert rows["Accuracy"] == ["NaN", "93.12%", "–"]
    assert rows["Loss"][0] == "∞"


def test_a_failed_run_shows_its_error(tmp_path: Path) -> None:
    long = "Traceback\n" + "x" * 20_000 + "\nFloatingPointError: loss is not finite"
    empty: dict[str, Any] = {"test": None, "validation": None, "student": None, "teachers": {}}
    folder = write_run(tmp_path / "run", status="failed", error=long, **empty)
    page = Page(write_report([folder]))
    assert page.all("p", class_="verdict")[0].words.startswith("This run failed.")
    error = page.all("pre")[0].text
    assert error.endswith("FloatingPointError: loss is not finite")
    assert len(error) < 7000


def test_nothing_of_theirs_becomes_markup(tmp_path: Path) -> None:
    run = hostile_run(tmp_path / "run", EVIL)
    comparison = hostile_comparison(tmp_path / "all", EVIL)
    page = Page(write_report([run, run, comparison], tmp_path / "out.html"))
    assert not page.all("img")
    assert [script.attributes.get("type") for script in page.all("script")].count(None) == 2
    assert all(
        script.attributes.get("type") == "application/json" for script in page.all("figure")[0].all("script")
    )
    assert "<script>alert" not in page.source
    assert not [name for element in _elements(page) for name in element.attributes if name.startswith("on")]
    assert "alert('x')" in page.text
    for figure in page.payloads.values():
        shown = [{key: value for key, value in trace.items() if key != "meta"} for trace in figure["data"]]
        drawn = json.dumps([shown, figure["layout"]])
        assert not re.search("<(script|img)", drawn)


def _elements(page: Page) -> list[Element]:
    found: list[Element] = []
    waiting = [page.root]
    while waiting:
        element = waiting.pop()
        found.append(element)
        waiting += element.children
    return found


@pytest.fixture(scope="module")
def plain_page(tmp_path_factory: pytest.TempPathFactory) -> Page:
    return Page(write_report([write_run(tmp_path_factory.mktemp("plain") / "run")]))


def test_nothing_is_loaded_from_anywhere(plain_page: Page) -> None:
    for element in _elements(plain_page):
        for name in ("src", "href", "action", "data", "poster", "srcset"):
            address = element.attributes.get(name, "#")
            assert address.startswith(("#", "data:")), f"<{element.tag} {name}={address!r}>"
    style = "".join(style.text for style in plain_page.all("style"))
    assert "url(" not in style
    assert "@import" not in style


def test_the_page_forbids_itself_the_network_and_foreign_scripts(plain_page: Page) -> None:
    policy = next(
        meta.attributes["content"]
        for meta in plain_page.all("meta")
        if meta.attributes.get("http-equiv") == "Content-Security-Policy"
    )
    rules = dict(rule.strip().split(" ", 1) for rule in policy.split(";"))
    assert rules["default-src"] == "'none'"
    own = [script.text for script in plain_page.all("script") if "type" not in script.attributes]
    hashes = [base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in own]
    assert rules["script-src"] == " ".join(f"'sha256-{value}'" for value in hashes)


def test_plotly_is_inlined_once_and_the_file_is_small_enough(plain_page: Page) -> None:
    assert len(re.findall(r"\* plotly\.js v", plain_page.source)) == 1
    assert len(plain_page.source.encode()) <= 6_000_000


def test_a_script_cannot_end_its_element_early() -> None:
    assert render._script("a\r\n'</script>' <!-- </SCRIPT") == "a\n'<\\/script>' <\\!-- <\\/SCRIPT"


NAMES = st.sampled_from(["accuracy", "rows", "train", "a[b]", ""])
JSON = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=5)),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(NAMES, inner, max_size=3)),
    max_leaves=8,
)


def some(*keys: str) -> st.SearchStrategy[dict[str, Any]]:
    """A few of the keys, with any JSON value."""
    return st.dictionaries(st.sampled_from(keys), JSON, max_size=4)


LINE = some("kind", "step", "terms", "lr", "metrics", "loss", "epoch", "split")
TOP = some("metric", "seeds", "teacher", "student", "baseline", "recipe", "environment", "methods", "split")
METHOD = some("name", "options", "runs", "mean", "low", "high", "difference", "seconds")
ENTRY = some("seed", "status", "value", "metrics", "seconds", "folder", "error")
often = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.mark.usefixtures("without_plotly")
@often
@given(odd=some(*result()), line=LINE, recipe=JSON)
def test_no_json_breaks_the_report_of_a_run(
    odd: dict[str, Any], line: dict[str, Any], recipe: object
) -> None:
    with tempfile.TemporaryDirectory() as place:
        lines = metrics(epochs=1, per_epoch=3)
        lines += [lines[0] | {"step": 9} | line, lines[-1] | {"step": 9} | line]
        written = RECIPE | {"train": recipe, "method": recipe, "data": recipe}
        write_run(Path(place), lines=lines, recipe=written, **odd)
        assert Page(write_report([Path(place)])).payloads is not None


@pytest.mark.usefixtures("without_plotly")
@often
@given(odd=TOP, method=METHOD, entry=ENTRY)
def test_no_json_breaks_the_report_of_a_comparison(
    odd: dict[str, Any], method: dict[str, Any], entry: dict[str, Any]
) -> None:
    good = {"seed": 0, "status": "done", "value": 0.9, "metrics": {"accuracy": 0.9}, "folder": "kd/seed-0"}
    first = {"name": "kd", "mean": 0.9, "runs": [good, good | entry]}
    second = {"name": "none", "mean": 0.8, "runs": [good]} | method
    content = {
        "metric": "accuracy",
        "baseline": "kd",
        "seeds": [0],
        "methods": [first, second],
        "recipe": RECIPE,
    }
    with tempfile.TemporaryDirectory() as place:
        (Path(place) / "comparison.json").write_text(json.dumps(content | odd))
        assert Page(write_report([Path(place)])).payloads is not None


ANALYSIS = some("split", "classes", "rows", "student", "teacher", "agreement", "examples")
ANSWERS = some("recall", "confusion", "confused", "calibration")
EXAMPLE = some("row", "target", "student", "teacher", "picture")
LAYERS = some("split", "rows", "student", "teachers")


@pytest.mark.usefixtures("without_plotly")
@often
@given(odd=ANALYSIS, answers=ANSWERS, example=EXAMPLE, layers=LAYERS)
def test_no_json_breaks_the_report_of_an_analysis(
    odd: dict[str, Any], answers: dict[str, Any], example: dict[str, Any], layers: dict[str, Any]
) -> None:
    found = analysis(3, examples=2)
    found["student"] |= answers
    found["examples"][0] |= example
    with tempfile.TemporaryDirectory() as place:
        folder = write_analysis(write_run(Path(place), lines=[]), found | odd, explained() | layers)
        assert Page(write_report([folder])).payloads is not None


@pytest.mark.usefixtures("without_plotly")
@often
@given(
    search=some("ranges", "seed", "trials", "chosen", "seconds"),
    trial=some("number", "values", "value", "seconds", "error"),
    odd=some("trials", "seeds"),
)
def test_no_json_breaks_the_report_of_tuning(
    search: dict[str, Any], trial: dict[str, Any], odd: dict[str, Any]
) -> None:
    found = tuning(0.5, 0.6)
    found["trials"][1] |= trial
    with tempfile.TemporaryDirectory() as place:
        folder = write_comparison(Path(place), means={"none": 0.5, "kd": 0.6}, seeds=1)
        tune_comparison(folder, {"kd": found})
        saved = json.loads((folder / "comparison.json").read_text())
        saved["methods"][1]["tuning"] = found | search
        (folder / "comparison.json").write_text(json.dumps(saved | odd))
        assert Page(write_report([folder])).payloads is not None
