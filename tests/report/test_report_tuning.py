"""What a comparison's report tells of tuning, and which p value counts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from report_analysis_fakes import tune_comparison, tuning
from report_fakes import write_comparison
from report_parser import Page, tiles

from tutelage.report import render, write_report

SEARCHES = {
    "none": tuning(0.85, 0.87, 0.84, 0.86),
    "kd": tuning(0.88, None, 0.86, 0.9),
    "nkd": tuning(0.9, 0.89, 0.91, 0.905),
}


@pytest.fixture(autouse=True)
def without_plotly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(render, "_plotly", lambda: "var Plotly;")


def page_of(tmp_path: Path, searches: dict[str, dict[str, Any]] | None = None, **changes: Any) -> Page:
    folder = tune_comparison(write_comparison(tmp_path / "all"), SEARCHES if searches is None else searches)
    path = folder / "comparison.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return Page(write_report([folder]))


def test_the_budget_is_told(tmp_path: Path) -> None:
    text = page_of(tmp_path).text
    assert (
        "The budget was the same for every method: 4 trials each, judged by accuracy on validation rows, with a seed "
        "that is not compared. Trial 0 is the recipe as it stands."
    ) in text


@pytest.mark.parametrize(
    ("search", "told"),
    [
        (tuning(0.8), "The budget: 1 to 4 trials so far, judged"),
        ({}, "The budget: 4 trials each, judged"),
        ({}, "Without a search: kd."),
    ],
)
def test_an_unequal_budget_is_not_called_equal(tmp_path: Path, search: dict[str, Any], told: str) -> None:
    text = page_of(tmp_path, SEARCHES | {"kd": search}).text
    assert told in text
    assert "same for every method" not in text


def test_a_seed_that_is_compared_is_not_called_apart(tmp_path: Path) -> None:
    text = page_of(tmp_path, SEARCHES | {"kd": tuning(0.8, 0.7, 0.6, 0.5, seed=2)}).text
    assert "judged by accuracy on validation rows. Trial 0" in text


def test_trials_are_drawn_with_the_best_so_far(tmp_path: Path) -> None:
    drawn = page_of(tmp_path).payloads["Validation accuracy by trial"]["data"]
    best = {trace["meta"]: (trace["x"], trace["y"]) for trace in drawn if trace["mode"] == "lines"}
    marks = {trace["meta"]: (trace["x"], trace["y"]) for trace in drawn if trace["mode"] == "markers"}
    assert best["kd"] == ([0, 2, 3], [0.88, 0.88, 0.9])
    assert marks["kd"] == ([0, 2, 3], [0.88, 0.86, 0.9])
    assert best["none"][1] == [0.85, 0.87, 0.87, 0.87]
    first = next(trace for trace in drawn if trace["meta"] == "kd" and trace["mode"] == "markers")
    assert first["text"][0] == "lr 0.05, temperature 4"


def test_lower_may_be_better(tmp_path: Path) -> None:
    page = page_of(tmp_path, metric="loss", higher_is_better=False)
    drawn = page.payloads["Validation loss by trial"]["data"]
    assert next(trace["y"] for trace in drawn if trace["meta"] == "nkd") == [0.9, 0.89, 0.89, 0.89]


def test_what_was_tried_and_chosen(tmp_path: Path) -> None:
    page = page_of(tmp_path)
    rows = {row[0]: row[1:] for row in page.table("Accuracy on validation rows, before and after tuning")}
    assert rows["Method"] == ["Recipe", "Best trial", "Difference", "Trials", "Time"]
    assert rows["kd"] == ["88.00%", "90.00%", "+2.00", "4 1 failed", "40.0 s"]
    options = page.table("What was searched, and what was chosen")
    assert options[0] == ["Method", "Option", "Range", "Recipe", "Chosen"]
    assert ["kd", "temperature", "1 to 8", "4", "7"] in options
    assert ["kd", "train.optimizer.lr", "0.0125 to 0.2", "0.05", "0.2"] in options
    assert page.table("Failed trials")[1:] == [["kd", "1", "FloatingPointError: loss is not finite"]]


def test_the_cost_of_tuning_is_counted(tmp_path: Path) -> None:
    page = page_of(tmp_path)
    head, *rows = page.table("Methods by accuracy on test rows")
    assert head[7:9] == ["Tuning", "Training"]
    assert {row[7] for row in rows} == {"40.0 s", ""}
    points = page.payloads["Accuracy against training time, tuning included"]["data"]
    alone = page.payloads["Accuracy against training time"]["data"]
    assert [point["x"][0] for point in points] == [40 + point["x"][0] for point in alone]


def test_a_learning_rate_of_each_method_is_called_that(tmp_path: Path) -> None:
    assert "sgd (lr tuned for each method" in page_of(tmp_path).text


def test_the_command_tunes_again(tmp_path: Path) -> None:
    code = page_of(tmp_path).all("div", class_="code")[0].all("code")[0].text
    assert " --trials 4 --dir " in code


def test_where_every_trial_failed_that_is_told(tmp_path: Path) -> None:
    page = page_of(tmp_path, SEARCHES | {"kd": tuning(None, None, None, None)})
    rows = {row[0]: row[1:] for row in page.table("Accuracy on validation rows, before and after tuning")}
    assert rows["kd"] == ["–", "–", "–", "4 4 failed", "40.0 s"]
    assert len(page.table("Failed trials")) == 5
    assert ["kd", "temperature", "1 to 8", "4", "–"] in page.table("What was searched")


def test_without_tuning_there_is_no_word_of_it(tmp_path: Path) -> None:
    page = Page(write_report([write_comparison(tmp_path / "plain")]))
    assert "trials" not in page.text
    assert "Tuning" not in page.table("Methods by accuracy")[0]


@pytest.mark.parametrize(("p", "corrected", "real"), [(0.02, 0.04, True), (0.03, 0.06, False)])
def test_the_corrected_p_value_counts(tmp_path: Path, p: float, corrected: float, *, real: bool) -> None:
    folder = tune_comparison(write_comparison(tmp_path / "all"), SEARCHES)
    path = folder / "comparison.json"
    saved = json.loads(path.read_text())
    saved["methods"][2]["difference"] |= {"p": p, "p_adjusted": corrected, "low": 0.001, "high": 0.03}
    path.write_text(json.dumps(saved))
    page = Page(write_report([folder]))
    assert page.table("Methods by accuracy")[1][3] == f"{corrected:.3f}"
    assert "with Holm's correction for 2 methods" in page.text
    assert f"p = {corrected:.3f} corrected" in tiles(page)["Against none"]
    verdict = page.all("p", class_="verdict")[0].words
    assert ("may be chance" not in verdict) == real
    cell = page.all("tbody")[0].all("tr")[0].children[2]
    assert cell.attributes["class"].split() == (["num", "good"] if real else ["num"])


def test_an_older_comparison_says_that_its_p_values_are_not_corrected(tmp_path: Path) -> None:
    page = Page(write_report([write_comparison(tmp_path / "old")]))
    assert "two-sided, not corrected for the number of methods" in page.text
    assert "p < 0.001 corrected" not in page.text


def test_the_leaderboard_says_at_what_scale_it_was_made(tmp_path: Path) -> None:
    text = page_of(tmp_path).text.replace("\u202f", " ")
    assert (
        "Made at this scale: data cifar10; 4 500 training rows; 12 epochs; CPU, 2 threads; student cifar:resnet8x4; "
        "5 seeds; A CPU. At another scale the order may be another."
    ) in text
