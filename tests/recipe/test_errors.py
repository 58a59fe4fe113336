"""Errors: all at once, each with path, value, what is allowed, and the nearest name."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from tutelage.recipe import Config, RecipeError, load_recipe, validate
from tutelage.recipe.schema import ScheduleConfig, TeacherConfig, TrainConfig, ViewConfig

MANY: dict[str, Any] = {
    "task": "clasification",
    "data": {"path": "digits", "validation": 1.5, "noise": float("nan"), "columns": ["a", 3], "revision": 12},
    "student": {"modle": "digits:mlp-16", "options": {"x": [1]}},
    "method": {"name": "kd", "temprature": 3, "weight": -1},
    "train": {
        "epochs": 3,
        "steps": 4,
        "batch_size": 65,
        "accumulate": 2,
        "precision": "bf61",
        "seed": True,
        "optimizer": {"lr": -1},
        "schedule": {"name": "multistep"},
    },
    "learning_rate": 3,
    "lr": 3,
}


def messages(values: dict[str, Any]) -> list[tuple[str, str]]:
    with pytest.raises(RecipeError) as caught:
        load_recipe(values)
    return [(problem.path, problem.message) for problem in caught.value.problems]


def test_every_error_comes_at_once_one_line_each() -> None:
    with pytest.raises(RecipeError) as caught:
        load_recipe(MANY)
    lines = str(caught.value).splitlines()
    assert lines[0] == f"recipe: {len(caught.value.problems)} errors"
    assert len(lines) == 1 + len(caught.value.problems)
    assert {line.strip().partition(":")[0] for line in lines[1:]} == {
        "task",
        "data.validation",
        "data.noise",
        "data.columns.1",
        "data.revision",
        "student.model",
        "student.modle",
        "student.options.x",
        "method.temprature",
        "method.weight",
        "train",
        "train.precision",
        "train.seed",
        "train.optimizer.lr",
        "train.schedule",
        "learning_rate",
        "lr",
    }


@pytest.mark.parametrize(
    ("path", "message"),
    [
        (
            "task",
            'got "clasification"; allowed: classification, multilabel, regression, language-model or '
            "token-classification; did you mean classification or token-classification?",
        ),
        (
            "data.validation",
            "got 1.5; allowed: text, or a number > 0 and < 1, or a whole number ≥ 1, or null",
        ),
        ("data.noise", "got NaN; allowed: a number from 0 to 10; finite"),
        ("data.columns.1", "got 3; allowed: text that is not empty; put it in quotes"),
        ("data.revision", "got 12; allowed: text, or null; put it in quotes"),
        ("student.options.x", "got [1]; allowed: true or false, or a whole number, or a number, or text"),
        ("method.weight", "got -1; allowed: a number ≥ 0"),
        ("train", "give exactly one of epochs and steps; got epochs=3, steps=4 (set the other to null)"),
        ("train", "batch_size=65 does not divide into accumulate=2 micro-batches"),
        ("train.precision", 'got "bf61"; allowed: fp32, bf16 or fp16; did you mean bf16?'),
        ("train.seed", "got true; allowed: a whole number from 0 to 2147483647"),
        ("train.optimizer.lr", "got -1; allowed: a number > 0 and ≤ 100"),
        ("train.schedule", "`multistep` needs milestones, shares of the run such as [0.5, 0.75]"),
    ],
)
def test_an_error_says_value_and_what_is_allowed(path: str, message: str) -> None:
    assert (path, message) in messages(MANY)


@pytest.mark.parametrize(
    ("path", "beginning"),
    [
        ("student.model", "missing; allowed: text that is not empty. For example `timm:resnet18`"),
        ("student.modle", "unknown key; did you mean model? allowed: model, weights,"),
        ("method.temprature", "unknown key; did you mean temperature? allowed: "),
        ("lr", "unknown key; did you mean train.optimizer.lr? allowed: version, task,"),
        ("learning_rate", "unknown key; "),
    ],
)
def test_an_unknown_or_missing_key_says_what_there_is(path: str, beginning: str) -> None:
    assert dict(messages(MANY))[path].startswith(beginning)


def test_a_key_in_the_wrong_place_is_shown_its_own() -> None:
    found = dict(messages({**MANY, "temperature": 4, "optimzer": {}}))
    assert "did you mean method.temperature?" in found["temperature"]
    assert "did you mean train.optimizer?" in found["optimzer"]


def test_methods_are_named_by_position_in_a_list() -> None:
    found = dict(
        messages({**MANY, "method": ["kd", {"name": "nkdd"}, {"name": "nkd", "gamma": -1}, 3, {"gamma": 1}]})
    )
    assert "did you mean `nkd`" in found["method.1"]
    assert found["method.2.gamma"].startswith("got -1; allowed: a number")
    assert "{name: kd, weight: 1}" in found["method.3"]
    assert "give a method's name" in found["method.4"]
    assert "method" not in found
    assert "at least 1" in dict(messages({**MANY, "method": []}))["method"]
    assert "give a method's name" in dict(messages({**MANY, "method": None}))["method"]


@pytest.mark.parametrize(
    ("config", "values", "message"),
    [
        (TrainConfig, {}, "give exactly one of epochs and steps; got neither"),
        (TeacherConfig, {}, "got none"),
        (TeacherConfig, {"model": "timm:a", "run": "x"}, "got model, run"),
        (TeacherConfig, {"run": "x", "weights": "pretrained"}, "weights only together with `model`"),
        (
            TeacherConfig,
            {"run": "x", "overrides": ["train.epochs=1"]},
            "overrides only together with `recipe`",
        ),
        (TeacherConfig, {"model": "timm:a", "mean": [0, 0], "std": [1]}, "mean has 2 channels, std has 1"),
        (
            ScheduleConfig,
            {"name": "multistep", "milestones": [0.5, 0.5]},
            "milestones must rise; got 0.5, 0.5",
        ),
        (ViewConfig, {"name": "erase", "scale": [0.5, 0.1]}, "got 0.5 and 0.1"),
        (ViewConfig, {"name": "erase", "scale": [0.5, 2]}, "at most 1"),
    ],
)
def test_fields_that_do_not_go_together_are_refused(
    config: type[Config], values: dict[str, Any], message: str
) -> None:
    with pytest.raises(RecipeError) as caught:
        validate(config, values)
    assert message in str(caught.value)
    with pytest.raises(ValidationError, match="type=conflict"):
        config.model_validate(values)


def test_a_conflict_does_not_hide_wrong_fields_nor_they_it() -> None:
    with pytest.raises(RecipeError) as caught:
        validate(
            TrainConfig,
            {"accumulate": 0, "batch_size": "many", "clip": 0, "optimizer": {"options": {"a": {}}}},
        )
    assert {problem.path for problem in caught.value.problems} == {
        "",
        "accumulate",
        "batch_size",
        "clip",
        "optimizer.options.a",
    }


def test_lists_become_tuples_and_cannot_be_declared() -> None:
    assert ViewConfig.model_validate({"name": "erase", "scale": [0.1, 0.2]}).scale == (0.1, 0.2)
    with pytest.raises(TypeError, match="declare names as tuple"):
        type("Wrong", (Config,), {"__annotations__": {"names": "list[str] | None"}, "names": None})


def test_a_config_is_frozen() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        TrainConfig(epochs=1).epochs = 2  # type: ignore[misc]
