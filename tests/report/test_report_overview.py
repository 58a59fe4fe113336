"""Several runs side by side: how they differ, and their curves in common figures."""

from __future__ import annotations

from pathlib import Path

import pytest
from report_fakes import RECIPE, metrics, write_run
from report_parser import Page

from tutelage.report import render, write_report


@pytest.fixture(autouse=True)
def without_plotly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(render, "_plotly", lambda: "var Plotly;")


@pytest.fixture
def page(tmp_path: Path) -> Page:
    train = RECIPE["train"]
    other = RECIPE | {
        "method": [{"name": "kd", "temperature": 4.0}],
        "train": train | {"optimizer": train["optimizer"] | {"lr": 0.1}},
        "output": {"dir": "elsewhere"},
    }
    nkd = write_run(tmp_path / "nkd", lines=metrics(epochs=3, per_epoch=4))
    kd = write_run(
        tmp_path / "kd", recipe=other, lines=metrics(1, epochs=3, per_epoch=4, terms=("label", "kd"))
    )
    bare = write_run(tmp_path / "bare", lines=metrics(2, epochs=3, per_epoch=4, terms=("label",)))
    (bare / "recipe.yaml").unlink()
    return Page(write_report([nkd, kd, bare]))


def test_options_that_differ(page: Page) -> None:
    head, *rows = page.table("Options that differ")
    assert head == ["Option", "nkd on cifar10, seed 0", "kd on cifar10, seed 0"]
    assert rows == [
        ["method.name", "nkd", "kd"],
        ["method.weight", "1", "–"],
        ["method.gamma", "1.5", "–"],
        ["method.temperature", "1", "4"],
        ["train.optimizer.lr", "0.05", "0.1"],
    ]


def test_runs_alike_have_no_table_of_differences(tmp_path: Path) -> None:
    page = Page(write_report([write_run(tmp_path / name) for name in ("a", "b")]))
    captions = [table.all("caption")[0].words for table in page.all("table")]
    assert "Options that differ" not in captions


def test_several_methods_of_one_run_are_told_by_number(tmp_path: Path) -> None:
    both = RECIPE | {"method": [*RECIPE["method"], {"name": "kd"}]}
    page = Page(write_report([write_run(tmp_path / "a"), write_run(tmp_path / "b", recipe=both)]))
    assert ["method.1.name", "–", "kd"] in page.table("Options that differ")


def test_curves_of_all_runs_in_one_figure(page: Page) -> None:
    drawn = page.payloads
    names = ["nkd on cifar10, seed 0", "kd on cifar10, seed 0", "nkd, seed 0"]
    for title in (
        "Validation accuracy",
        "Validation loss",
        "Validation agreement with the teacher",
        "Training loss",
        "Term label",
    ):
        assert [trace["name"] for trace in drawn[title]["data"]] == names, title
    assert drawn["Term label"]["data"][0]["y"] != drawn["Term label"]["data"][1]["y"]
    assert "Term kd" not in drawn, "one run alone has it: it stands in that run's own part"


def test_other_metrics_stand_side_by_side(page: Page) -> None:
    head, first, *_ = page.table("Further metrics of the runs")
    assert head == ["Run", "Top-5 accuracy", "Loss", "Calibration error", "Agreement with the teacher"]
    assert first[1:] == ["99.41%", "0.3220", "2.10%", "93.80%"]
