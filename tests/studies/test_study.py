"""What a `Study` refuses, and the recipes that it makes."""

from __future__ import annotations

from typing import Any

import pytest

from tutelage.studies.study import Arm, Comparison, Results, Study, with_overrides

RECIPE = {"data": {"path": "digits"}, "student": {"model": "digits:mlp-8"}, "train": {"epochs": 1}}


def make_study(**changes: Any) -> Study:
    fields: dict[str, Any] = {
        "claim": "a is better than b.",
        "primary": ("a", "b"),
        "arms": {
            "a": Arm({"name": "kd", "temperature": 2.0}, grid=({}, {"method.loss_weight": 0.5})),
            "b": Arm("none", grid=({}, {"train.optimizer.lr": 0.1})),
        },
        "falsified_if": "never",
        "falsified": lambda results: False,
        "recipe": RECIPE,
    }
    return Study(**fields | changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seeds": (0, 1, 2, 3)}, "at least 5"),
        ({"seeds": (0, 1, 2, 3, 3)}, "all different"),
        ({"margin": -0.01}, "margin is -0.01"),
        ({"margin": float("nan")}, "margin is nan"),
        ({"primary": ("a", "bb")}, "no arm named 'bb'; arms are a, b; nearest: b"),
        ({"secondary": (Comparison("c", "b", "c is better."),)}, "no arm named 'c'"),
        ({"arms": {"a": Arm("kd"), "b": Arm("none", grid=({}, {"x": 1}))}}, "same tuning budget"),
        ({"arms": {"a": Arm("kd"), "b": Arm("none"), "teacher": Arm("none")}}, "`teacher` is taken"),
        ({"arms": {"a": Arm("kd"), "b": Arm("none"), "CE + WA": Arm("none")}}, "'CE \\+ WA'"),
    ],
)
def test_a_study_is_whole_and_fair(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_study(**changes)


def test_an_arm_is_a_method_or_a_function() -> None:
    for wrong in ({}, {"method": "kd", "run": lambda seed, folder: {}}, {"method": "kd", "grid": ()}):
        with pytest.raises(ValueError, match=r"either|at least one trial"):
            Arm(**wrong)
    with pytest.raises(ValueError, match="no grid"):
        Arm(run=lambda seed, folder: {}, grid=({"train.epochs": 2},))


def test_trial_recipes_differ_by_seed_arm_and_trial_alone() -> None:
    study = make_study()
    first = study.trial_recipe("a", 3, 0)
    assert first == {
        "data": {"path": "digits", "seed": 3},
        "student": {"model": "digits:mlp-8"},
        "train": {"epochs": 1, "seed": 3},
        "method": {"name": "kd", "temperature": 2.0},
    }
    assert study.trial_recipe("a", 3, 1)["method"] == {"name": "kd", "temperature": 2.0, "loss_weight": 0.5}
    assert study.trial_recipe("b", 3, 1)["train"] == {"epochs": 1, "seed": 3, "optimizer": {"lr": 0.1}}
    assert study.trial_recipe("b", 4, 0)["method"] == {"name": "none"}
    assert RECIPE["train"] == {"epochs": 1}


def test_seeds_reach_the_teacher_but_for_the_methods_own() -> None:
    teacher = {"data": {"path": "digits"}, "method": "none"}
    study = make_study(teacher=teacher, seeded=("data.seed", "method.class_order_seed"))
    assert study.teacher_recipe(2) == {"data": {"path": "digits", "seed": 2}, "method": "none"}
    assert study.trial_recipe("b", 2, 0)["method"] == {"name": "none", "class_order_seed": 2}
    with pytest.raises(ValueError, match="no teacher"):
        make_study().teacher_recipe(0)


def test_overrides_make_what_is_missing_and_refuse_what_is_no_mapping() -> None:
    assert with_overrides({}, {"a.b.c": 1}) == {"a": {"b": {"c": 1}}}
    with pytest.raises(ValueError, match=r"'a\.b'.*'x'"):
        with_overrides({"a": "x"}, {"a.b": 1})


def test_results_name_a_metric_that_is_missing() -> None:
    results = Results(
        {"a": [{"accuracy": 0.9}, {"accuracy": 0.8}], "b": [{"accuracy": 0.5}, {"accuracy": 0.5}]}
    )
    assert results.values("a", "accuracy") == [0.9, 0.8]
    assert results.difference("a", "b", "accuracy").mean == pytest.approx(0.35)
    with pytest.raises(KeyError, match=r"'f1'.*accuracy"):
        results.values("a", "f1")
