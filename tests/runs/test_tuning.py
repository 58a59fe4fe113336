"""Tuning: the same number of trials each, on validation data alone, the same after a kill; runs are faked."""

from __future__ import annotations

import json
import math
import signal
from pathlib import Path
from typing import Any

import pytest

from tutelage.engine.interrupt import Interrupted
from tutelage.recipe import Recipe, load_recipe
from tutelage.runs import batch
from tutelage.runs.compare import compare
from tutelage.runs.folder import FolderError
from tutelage.runs.plan import make_plan
from tutelage.runs.statistics import holm
from tutelage.runs.tuning import search_ranges

RECIPE: dict[str, Any] = {
    "data": {"path": "digits", "validation": 200, "test": 500, "limit": 128},
    "teacher": {"model": "digits:mlp-32"},
    "student": {"model": "digits:mlp-8"},
    "method": "none",
    "train": {"epochs": 1, "batch_size": 64, "optimizer": {"name": "sgd", "lr": 0.05}},
    "output": {"report": False},
}
TRIALS = 7


class FakeRuns:
    """`distill`: on validation data a learning rate of 0.1 and a temperature of 2 are best; on test data the worst."""

    def __init__(self) -> None:
        self.recipes: list[Recipe] = []
        self.broken: set[str] = set()
        self.stop_after: int | None = None

    def __call__(self, recipe: Recipe, *, folder: Path, resume: bool, progress: bool) -> Any:
        saved = folder / "result.json"
        if saved.exists():
            return type("Done", (), {"result": json.loads(saved.read_text())})
        if self.stop_after == len(self.recipes):
            raise Interrupted(signal.SIGTERM, 1)
        self.recipes.append(recipe)
        (method,) = recipe.method
        if method.name in self.broken:
            raise ValueError("loss is nan at step 3")
        distance = abs(math.log(recipe.train.optimizer.lr / 0.1))
        distance += abs(math.log(getattr(method, "temperature", 2.0) / 2.0))
        result = {
            "status": "done",
            "validation": {"accuracy": 0.9 - 0.1 * distance, "loss": distance},
            "test": {"accuracy": 0.1 + 0.1 * distance, "loss": 9 - distance},
            "seconds": 2.0,
            "train_seconds": 1.0,
            "student": {"model": "digits:mlp-8"},
            "teachers": {},
        }
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "recipe.yaml").write_text(json.dumps(recipe.model_dump(mode="json")))
        (folder / "environment.json").write_text("{}")
        saved.write_text(json.dumps(result))
        return type("Done", (), {"result": result})


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> FakeRuns:
    fake = FakeRuns()
    monkeypatch.setattr(batch, "distill", fake)
    return fake


def call(folder: Path, **changes: Any) -> dict[str, Any]:
    options: dict[str, Any] = {"methods": ["none", "kd"], "seeds": 2, "jobs": 1, "trials": TRIALS}
    return compare(changes.pop("recipe", RECIPE), folder=folder, progress=False, **options | changes)


def test_every_method_gets_the_same_number_of_trials(runs: FakeRuns, tmp_path: Path) -> None:
    table = call(tmp_path / "c")
    assert table["trials"] == TRIALS
    for method in table["methods"]:
        tuning = method["tuning"]
        assert [trial["number"] for trial in tuning["trials"]] == list(range(TRIALS))
        assert tuning["seconds"] == 1.0 * TRIALS
        assert tuning["seed"] == 2
        for trial in tuning["trials"]:
            assert trial["values"].keys() == tuning["ranges"].keys()
            for key, (low, high) in tuning["ranges"].items():
                assert low <= trial["values"][key] <= high
    assert table["methods"][0]["tuning"]["ranges"] == {"train.optimizer.lr": [0.0125, 0.2]}
    assert set(table["methods"][1]["tuning"]["ranges"]) == {
        "train.optimizer.lr",
        "method.loss_weight",
        "method.temperature",
    }


def test_the_first_trial_is_the_recipe_as_it_stands(runs: FakeRuns, tmp_path: Path) -> None:
    first = call(tmp_path / "c")["methods"][1]["tuning"]["trials"][0]
    assert first["values"] == {
        "train.optimizer.lr": 0.05,
        "method.loss_weight": 0.9,
        "method.temperature": 4.0,
    }


def test_the_best_on_validation_data_is_what_runs(runs: FakeRuns, tmp_path: Path) -> None:
    tuning = call(tmp_path / "c")["methods"][1]["tuning"]
    best = max(tuning["trials"], key=lambda trial: trial["value"])
    assert tuning["chosen"] == best["values"]
    compared = [recipe for recipe in runs.recipes if recipe.train.seed < 2 and recipe.method[0].name == "kd"]
    assert len(compared) == 2
    for recipe in compared:
        assert recipe.train.optimizer.lr == best["values"]["train.optimizer.lr"]
        assert recipe.method[0].temperature == best["values"]["method.temperature"]  # type: ignore[attr-defined]
    tried = [recipe for recipe in runs.recipes if recipe.train.seed == 2]
    assert len(tried) == 2 * TRIALS


def test_a_metric_that_should_be_low(runs: FakeRuns, tmp_path: Path) -> None:
    tuning = call(tmp_path / "c", recipe=RECIPE | {"evaluation": {"best": "loss"}})["methods"][0]["tuning"]
    assert tuning["chosen"] == min(tuning["trials"], key=lambda trial: trial["value"])["values"]


@pytest.mark.parametrize("stop", [0, 3, TRIALS, 2 * TRIALS + 1])
def test_a_search_that_was_stopped_tries_the_same(runs: FakeRuns, tmp_path: Path, stop: int) -> None:
    whole = call(tmp_path / "whole")
    runs.recipes.clear()
    runs.stop_after = stop
    with pytest.raises(Interrupted):
        call(tmp_path / "c")
    runs.stop_after = None
    again = call(tmp_path / "c")
    assert again["methods"] == whole["methods"]
    assert len(runs.recipes) == 2 * TRIALS + 4  # nothing ran twice


def test_options_that_were_given_stay(runs: FakeRuns, tmp_path: Path) -> None:
    table = call(tmp_path / "c", methods=["none", {"name": "kd", "temperature": 3.0}])
    assert "method.temperature" not in table["methods"][1]["tuning"]["ranges"]
    assert {getattr(r.method[0], "temperature", 3.0) for r in runs.recipes} == {3.0}
    recipe = load_recipe(RECIPE | {"method": {"name": "kd", "temperature": 3.0}})
    assert set(search_ranges(recipe, {"name": "kd", "temperature": 3.0})) == {
        "train.optimizer.lr",
        "method.loss_weight",
    }


def test_a_method_whose_trials_all_fail_has_failed(runs: FakeRuns, tmp_path: Path) -> None:
    runs.broken = {"kd"}
    kd = call(tmp_path / "c")["methods"][1]
    assert kd["tuning"]["chosen"] is None
    assert [run["status"] for run in kd["runs"]] == ["failed", "failed"]
    assert kd["runs"][0]["error"] == "every tuning trial failed; the last: ValueError: loss is nan at step 3"


def test_what_is_refused(runs: FakeRuns, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="trials is -1"):
        call(tmp_path / "c", trials=-1)
    without = RECIPE | {"data": {"path": "digits", "validation": None}}
    with pytest.raises(ValueError, match=r"data\.validation is not set"):
        call(tmp_path / "c", recipe=without)
    assert not (tmp_path / "c").exists()
    call(tmp_path / "c")
    with pytest.raises(FolderError, match="with 7 tuning trials a method, not 0"):
        call(tmp_path / "c", trials=0)


def test_the_recipe_says_what_is_left_out(runs: FakeRuns, tmp_path: Path) -> None:
    own = {"methods": ["nkd", "none"], "seeds": [4, 6], "trials": 2, "baseline": "nkd"}
    table = compare(RECIPE | {"compare": own}, folder=tmp_path / "c", progress=False, jobs=1)
    assert [method["name"] for method in table["methods"]] == ["nkd", "none"]
    assert (table["seeds"], table["trials"], table["baseline"]) == ([4, 6], 2, "nkd")
    again = compare(RECIPE | {"method": "kd"}, folder=tmp_path / "d", progress=False, jobs=1)
    assert [method["name"] for method in again["methods"]] == ["none", "kd"]
    assert len(again["seeds"]) == 5


def test_all_is_every_method_of_one_loop_that_suits(runs: FakeRuns, tmp_path: Path) -> None:
    plan = make_plan(RECIPE, "all", 1)
    assert {"none", "kd", "fitnet", "nkd", "uskd"} <= set(plan.options)
    assert "wa" not in plan.options
    alone = make_plan({key: value for key, value in RECIPE.items() if key != "teacher"}, "all", 1)
    assert {"none", "uskd"} <= set(alone.options)
    assert "kd" not in alone.options
    kd = make_plan(RECIPE | {"method": {"name": "kd", "temperature": 2.0}}, "all", 1).options["kd"]
    assert kd == {"name": "kd", "temperature": 2.0}
    with pytest.raises(ValueError, match="give a list of names, or `all`"):
        make_plan(RECIPE, "kd", 1)  # type: ignore[arg-type]


def test_holm() -> None:
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.5, 0.9]) == pytest.approx([1.0, 1.0])
    assert holm([]) == []
    assert holm([0.02]) == [0.02]
