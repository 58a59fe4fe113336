"""Trials that are recipes: what each run is asked for, and the teacher that all arms of a seed share."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tutelage.recipe import Recipe
from tutelage.studies import trials
from tutelage.studies.registry import FoundStudy
from tutelage.studies.study import Arm, Study

RECIPE = {
    "data": {"path": "digits", "validation": 100, "test": 500},
    "student": {"model": "digits:mlp-8"},
    "train": {"epochs": 1},
}

STUDY = Study(
    claim="kd is better than none.",
    primary=("kd", "none"),
    arms={
        "kd": Arm("kd", grid=({}, {"method.loss_weight": 0.5})),
        "none": Arm("none", grid=({}, {"train.optimizer.lr": 0.1})),
    },
    recipe=RECIPE,
    teacher=RECIPE | {"method": "none", "student": {"model": "digits:mlp-32"}},
    falsified_if="never",
    falsified=lambda results: False,
)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> dict[Path, Recipe]:
    """Recipes by the folder they are run in; a run gives its learning rate as accuracy."""
    found = FoundStudy("kd", "baselines", STUDY, Path(__file__))
    recipes: dict[Path, Recipe] = {}

    def finish_run(recipe: Recipe, folder: Path) -> dict[str, Any]:
        recipes[folder] = recipe
        metrics = {"accuracy": recipe.train.optimizer.lr}
        return {"status": "done", "validation": metrics, "test": metrics, "seconds": 1.5}

    monkeypatch.setattr(trials, "finish_run", finish_run)
    monkeypatch.setattr(trials, "find_study", lambda name: found)
    return recipes


def run(folder: Path) -> list[trials.Outcome]:
    return trials.run_study(
        FoundStudy("kd", "baselines", STUDY, Path(__file__)), folder, jobs=1, progress=False
    )


def test_every_arm_of_a_seed_has_the_same_data_teacher_and_threads(
    asked: dict[Path, Recipe], tmp_path: Path
) -> None:
    outcomes = run(tmp_path / "kd")
    assert len(outcomes) == len(asked) == 5 + 5 * 2 * 2
    for seed in STUDY.seeds:
        group = {place: recipe for place, recipe in asked.items() if recipe.train.seed == seed}
        (teacher,) = (place for place, recipe in group.items() if recipe.teacher is None)
        assert len(group) == 5
        for recipe in group.values():
            assert (recipe.data.seed, recipe.train.threads) == (seed, 1)
            assert recipe.train.device == "cpu"
            assert recipe.output.report is False
            assert recipe.teacher is None or recipe.teacher.run == str(teacher)  # type: ignore[union-attr]
    students = [recipe for recipe in asked.values() if recipe.teacher and recipe.train.seed == 0]
    assert {r.method[0].loss_weight for r in students if r.method[0].name == "kd"} == {0.9, 0.5}  # type: ignore[attr-defined]
    rates = {r.train.optimizer.lr for r in students if r.method[0].name == "none"}
    assert 0.1 in rates
    assert len(rates) == 2


def test_studies_side_by_side_run_a_shared_recipe_in_one_place(
    asked: dict[Path, Recipe], tmp_path: Path
) -> None:
    run(tmp_path / "kd")
    places = set(asked)
    run(tmp_path / "another")
    assert set(asked) == places
    run(tmp_path / "other code" / "kd")
    assert len(asked) == 2 * len(places)


def test_outcomes_hold_what_the_runs_gave(asked: dict[Path, Recipe], tmp_path: Path) -> None:
    outcome = next(o for o in run(tmp_path / "kd") if (o.arm, o.seed, o.trial) == ("none", 4, 1))
    assert outcome == trials.Outcome("none", 4, 1, "done", None, {"accuracy": 0.1}, {"accuracy": 0.1}, 1.5)


def test_further_figures_stand_beside_the_test_metrics(
    asked: dict[Path, Recipe], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = replace(STUDY, measure=lambda result: {"tenfold": 10 * result["test"]["accuracy"]})
    found = FoundStudy("kd", "baselines", study, Path(__file__))
    monkeypatch.setattr(trials, "find_study", lambda name: found)
    assert trials.run_trial("kd", "none", 0, 1, tmp_path)["test"] == {"accuracy": 0.1, "tenfold": 1.0}
    assert set(trials.run_trial("kd", "teacher", 0, 0, tmp_path)["test"]) == {"accuracy"}


def test_without_its_teacher_a_seed_fails(
    asked: dict[Path, Recipe], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    finish_run = trials.finish_run  # type: ignore[attr-defined]

    def teacher_fails(recipe: Recipe, folder: Path) -> dict[str, Any]:
        if recipe.teacher is None and recipe.train.seed == 1:
            raise ValueError("loss is nan")
        return finish_run(recipe, folder)

    monkeypatch.setattr(trials, "finish_run", teacher_fails)
    outcomes = run(tmp_path)
    failed = [o for o in outcomes if o.status == "failed"]
    assert [(o.arm, o.seed) for o in failed if o.arm == "teacher"] == [("teacher", 1)]
    assert len(failed) == 1 + 4
    assert all(
        "its teacher failed: ValueError: loss is nan" in str(o.error) for o in failed if o.arm != "teacher"
    )
    assert not any(recipe.train.seed == 1 for recipe in asked.values())


def test_a_metric_that_is_not_finite_fails_the_trial(
    asked: dict[Path, Recipe], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nan = {"status": "done", "validation": {}, "test": {"accuracy": float("nan")}, "seconds": 1.0}
    monkeypatch.setattr(trials, "finish_run", lambda recipe, folder: nan)
    outcome = trials.run_trial("kd", "none", 0, 0, tmp_path)
    assert outcome["status"] == "failed"
    assert "accuracy is nan" in outcome["error"]


def test_an_arm_may_have_a_teacher_of_its_own(
    asked: dict[Path, Recipe], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Trained once for all arms and trials that name the same one."""
    other = {"train.optimizer.lr": 0.3}
    arms = {"kd": Arm("kd"), "a": Arm("kd", teacher=other), "b": Arm("nkd", teacher=other)}
    study = replace(STUDY, arms=arms, primary=("kd", "a"))
    found = FoundStudy("kd", "baselines", study, Path(__file__))
    monkeypatch.setattr(trials, "find_study", lambda name: found)
    outcomes = trials.run_study(found, tmp_path, jobs=1, progress=False)
    teachers = {place: recipe.train.optimizer.lr for place, recipe in asked.items() if recipe.teacher is None}
    assert sorted(teachers.values()) == [0.05] * 5 + [0.3] * 5
    rates = {
        recipe.method[0].name: {teachers[Path(str(recipe.teacher.run))]}  # type: ignore[union-attr]
        for recipe in asked.values()
        if recipe.teacher is not None
    }
    assert rates["nkd"] == {0.3}
    assert len(asked) == 10 + 15
    assert {o.trial for o in outcomes if o.arm == "teacher"} == {0, 1}
