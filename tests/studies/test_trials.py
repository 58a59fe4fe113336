"""Trials that are recipes: what each run is asked for, and the teacher that all arms of a seed share."""

from __future__ import annotations

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
def asked(monkeypatch: pytest.MonkeyPatch) -> dict[str, Recipe]:
    """Recipes by place of the run; a run gives its learning rate as accuracy."""
    found = FoundStudy("kd", "baselines", STUDY, Path(__file__))
    recipes: dict[str, Recipe] = {}

    def finish_run(recipe: Recipe, folder: Path) -> dict[str, Any]:
        recipes["/".join(folder.parts[-4:-1])] = recipe
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
    asked: dict[str, Recipe], tmp_path: Path
) -> None:
    outcomes = run(tmp_path)
    assert len(outcomes) == len(asked) == 5 + 5 * 2 * 2
    for seed in STUDY.seeds:
        group = {place: recipe for place, recipe in asked.items() if f"/seed-{seed}/" in place}
        teacher = group.pop(f"teacher/seed-{seed}/trial-0")
        assert teacher.teacher is None
        assert len(group) == 4
        wanted = str(tmp_path / "teacher" / f"seed-{seed}" / "trial-0" / "run")
        for recipe in (teacher, *group.values()):
            assert (recipe.data.seed, recipe.train.seed, recipe.train.threads) == (seed, seed, 1)
            assert recipe.train.device == "cpu"
            assert recipe.output.report is False
        for recipe in group.values():
            assert recipe.teacher.run == wanted  # type: ignore[union-attr]
    assert asked["kd/seed-0/trial-1"].method[0].loss_weight == 0.5  # type: ignore[attr-defined]
    assert asked["none/seed-0/trial-1"].train.optimizer.lr == 0.1


def test_outcomes_hold_what_the_runs_gave(asked: dict[str, Recipe], tmp_path: Path) -> None:
    outcome = next(o for o in run(tmp_path) if (o.arm, o.seed, o.trial) == ("none", 4, 1))
    assert outcome == trials.Outcome("none", 4, 1, "done", None, {"accuracy": 0.1}, {"accuracy": 0.1}, 1.5)


def test_without_its_teacher_a_seed_fails(
    asked: dict[str, Recipe], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    finish_run = trials.finish_run

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
    assert not any(place.startswith(("kd/seed-1", "none/seed-1")) for place in asked)


def test_a_metric_that_is_not_finite_fails_the_trial(
    asked: dict[str, Recipe], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nan = {"status": "done", "validation": {}, "test": {"accuracy": float("nan")}, "seconds": 1.0}
    monkeypatch.setattr(trials, "finish_run", lambda recipe, folder: nan)
    outcome = trials.run_trial("kd", "none", 0, 0, tmp_path)
    assert outcome["status"] == "failed"
    assert "accuracy is nan" in outcome["error"]
