"""Loading: sources, overrides, method forms, teachers' recipes, versions; what comes back is what was written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tutelage.recipe import Recipe, RecipeError, dump, load_recipe, parse_recipe, shipped

BASE: dict[str, Any] = {
    "data": {"path": "digits"},
    "student": {"model": "digits:mlp-16"},
    "method": "none",
    "train": {"epochs": 2},
}


def problems(source: Any, *overrides: str) -> dict[str, str]:
    with pytest.raises(RecipeError) as caught:
        load_recipe(source, overrides)
    return {problem.path: problem.message for problem in caught.value.problems}


def test_a_mapping_a_file_and_text_give_the_same(tmp_path: Path) -> None:
    text = "data: {path: digits}\nstudent: {model: 'digits:mlp-16'}\nmethod: none\ntrain: {epochs: 2}\n"
    (tmp_path / "mine.yaml").write_text(text)
    recipes = [
        load_recipe(BASE),
        load_recipe(tmp_path / "mine.yaml"),
        load_recipe(str(tmp_path / "mine.yaml")),
    ]
    assert all(recipe == parse_recipe(text) for recipe in recipes)
    assert load_recipe(recipes[0], ["train.seed=3"]).train.seed == 3


@pytest.mark.parametrize("name", shipped())
def test_every_shipped_recipe_is_valid_and_survives_a_round(name: str) -> None:
    recipe = load_recipe(name)
    assert parse_recipe(dump(recipe)) == recipe
    assert load_recipe(shipped()[name]) == recipe


def test_a_loaded_recipe_is_left_as_it_was() -> None:
    values = {**BASE, "teacher": {"recipe": "digits-teacher.yaml"}}
    load_recipe(values, ["teacher.overrides=[train.epochs=1]", "train.epochs=9"])
    assert values == {**BASE, "teacher": {"recipe": "digits-teacher.yaml"}}
    assert BASE["train"] == {"epochs": 2}


@pytest.mark.parametrize(
    ("override", "path", "value"),
    [
        ("train.epochs=30", "train.epochs", 30),
        ("train.optimizer.lr=1e-3", "train.optimizer.lr", 0.001),
        ("train.optimizer={name: adamw, lr: 0.01}", "train.optimizer.name", "adamw"),
        ("train.early_stop.patience=2", "train.early_stop.patience", 2),
        ("data.validation=none", "data.validation", "none"),
        ("data.validation=null", "data.validation", None),
        ("data.revision='2026'", "data.revision", "2026"),
        ("data.target=no", "data.target", "no"),
        ("data.columns=[a, b]", "data.columns", ("a", "b")),
        ("student.options.drop_rate=.1", "student.options", {"drop_rate": 0.1}),
        (" train.seed = 4 ", "train.seed", 4),
        ("data.path=a=b", "data.path", "a=b"),
    ],
)
def test_an_override_sets_its_field(override: str, path: str, value: Any) -> None:
    found: Any = load_recipe(BASE, [override])
    for part in path.split("."):
        found = getattr(found, part)
    assert found == value


def test_a_list_is_reached_by_number() -> None:
    views = {**BASE, "data": {"path": "digits", "views": [{"name": "crop"}, {"name": "flip"}]}}
    assert load_recipe(views, ["data.views.0.padding=2"]).data.views[0].padding == 2
    found = problems(views, "data.views.2.padding=2")
    assert "list of 2; pick one of data.views.0 to data.views.1" in found["data.views.2.padding"]


@pytest.mark.parametrize("form", ["kd", {"name": "kd"}, ["kd"], [{"name": "kd"}]])
@pytest.mark.parametrize("path", ["method.temperature", "method.0.temperature"])
def test_an_option_of_a_lone_method_is_reached_in_any_form(form: Any, path: str) -> None:
    (method,) = load_recipe({**BASE, "method": form}, [f"{path}=2"]).method
    assert (method.name, method.model_dump()["temperature"]) == ("kd", 2.0)


def test_methods_can_be_replaced_and_combined() -> None:
    recipe = load_recipe({**BASE, "method": {"name": "kd", "temperature": 2}}, ["method=nkd"])
    assert [method.name for method in recipe.method] == ["nkd"]
    recipe = load_recipe(
        BASE, ["method=[kd, {name: nkd, gamma: 2}]", "method.0.weight=0.5", "method.1.weight=2"]
    )
    assert [(method.name, method.weight) for method in recipe.method] == [("kd", 0.5), ("nkd", 2.0)]
    found = problems({**BASE, "method": ["kd", "nkd"]}, "method.weight=2")
    assert "list of 2; pick one of method.0 to method.1" in found["method.weight"]


@pytest.mark.parametrize("override", ["train.epochs", "=3", "train..epochs=3", ".train=3"])
def test_an_override_that_is_none_says_how_to_write_one(override: str) -> None:
    assert "key=value" in problems(BASE, override)[""]


def test_an_override_below_a_value_or_of_broken_yaml_is_named() -> None:
    found = problems(BASE, "train.epochs.more=3", "data.columns=[a", "train.seed=-1")
    assert "`train.epochs` is 2 and holds no `more`" in found["train.epochs.more"]
    assert "line 1" in found["data.columns"]
    assert "a whole number from 0" in found["train.seed"]


def test_a_teachers_recipe_is_found_beside_the_recipe_or_among_the_shipped(tmp_path: Path) -> None:
    folder = tmp_path / "recipes"
    folder.mkdir()
    (folder / "big.yaml").write_text(dump(load_recipe(BASE)))
    (folder / "small.yaml").write_text(
        dump(load_recipe(BASE)).replace("\nteacher: null", "\nteacher: {recipe: big.yaml}")
    )

    def teacher(given: str, **options: Any) -> Any:
        found: Any = load_recipe({**BASE, "teacher": {"recipe": given}}, **options).teacher
        return found.recipe

    small: Any = load_recipe(folder / "small.yaml").teacher
    assert small.recipe == str(folder / "big.yaml")
    assert teacher("big.yaml", folder=folder) == teacher(str(folder / "big.yaml")) == str(folder / "big.yaml")
    # Shipped: by name, by its path, and by the file name that a copied recipe still has.
    assert teacher("digits-teacher") == "digits-teacher"
    assert teacher(str(shipped()["digits-teacher"])) == "digits-teacher"
    assert teacher("digits-teacher.yaml", folder=folder) == "digits-teacher"


def test_a_teachers_recipe_that_is_missing_or_the_recipe_itself_is_refused(tmp_path: Path) -> None:
    found = problems({**BASE, "teacher": {"recipe": "digit-teacher.yaml"}}, "train.seed=-1")
    assert "no such file" in found["teacher.recipe"]
    assert "digits-teacher" in found["teacher.recipe"]
    assert "train.seed" in found
    (tmp_path / "own.yaml").write_text(
        dump(load_recipe(BASE)).replace("teacher: null", "teacher: {recipe: own.yaml}")
    )
    assert "this very recipe" in problems(tmp_path / "own.yaml")["teacher.recipe"]
    assert (
        "this very recipe"
        in problems("digits-teacher", "teacher={a: {recipe: digits-teacher}}")["teacher.a.recipe"]
    )


def test_an_override_that_moves_the_data_moves_it_for_a_teacher_that_learns_from_the_same() -> None:
    moved: Any = load_recipe(
        "cifar10", ["data.path=/my data/c", "teacher.overrides=[train.epochs=1]"]
    ).teacher
    assert moved.overrides == ('data.path="/my data/c"', "train.epochs=1")
    own = load_recipe(moved.recipe, moved.overrides)
    assert (own.data.path, own.train.epochs) == ("/my data/c", 1)
    still: Any = load_recipe("cifar10", ["data.limit=100"]).teacher
    other: Any = load_recipe("cifar10", ["data.path=/x", "teacher.recipe=digits-teacher"]).teacher
    assert still.overrides == other.overrides == ()


def test_several_teachers_go_by_name() -> None:
    teachers = {"big": {"model": "timm:resnet50", "options": {"drop_rate": 0.1}}, "old": {"run": "runs/x"}}
    found: Any = load_recipe({**BASE, "teacher": teachers}).teacher
    assert (found["big"].model, found["old"].run) == ("timm:resnet50", "runs/x")
    wrong = problems({**BASE, "teacher": {"big": {"modle": "x"}, "a-b": {"run": "x"}}})
    assert "did you mean model?" in wrong["teacher.big.modle"]
    assert "teacher.a-b" in wrong


def test_a_newer_version_is_refused_alone_with_the_way_out() -> None:
    found = problems({**BASE, "version": 2, "brand_new": 1})
    assert list(found) == ["version"]
    assert "pip install --upgrade tutelage" in found["version"]
    assert "allowed: 1" in problems({**BASE, "version": 0})["version"]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("data: {path: a}\ndata: {path: b}", "line 2, column 1: the key 'data' comes twice"),
        ("train: {epochs: 1, epochs: 2}", "the key 'epochs' comes twice"),
        ("1: 2", "the key '1' is no text"),
        ("data: [a", "line 1"),
        ("- a\n- b", 'a recipe is a mapping; got ["a", "b"]'),
        ("", "the recipe is empty; `tutelage recipes digits` prints one"),
        ("data: !!python/object/apply:os.system [ls]", "could not determine a constructor"),
        ("data: !!binary aGk=", "could not determine a constructor"),
    ],
)
def test_text_that_is_no_recipe_is_refused_with_its_place(text: str, reason: str) -> None:
    with pytest.raises(RecipeError) as caught:
        parse_recipe(text)
    assert reason in str(caught.value)


def test_a_source_that_is_not_there_comes_with_shipped_names_like_it(tmp_path: Path) -> None:
    assert "digits" in problems("digit")[""]
    assert "shipped recipes of about that name: cifar10" in problems("somewhere/cifar10.yaml")[""]
    assert "a folder, not a file" in problems(tmp_path)[""]
    (tmp_path / "latin.yaml").write_bytes(b"\xff\xfe")
    assert "cannot be read" in problems(tmp_path / "latin.yaml")[""]


def test_values_that_yaml_has_not_are_refused() -> None:
    assert "set is none" in problems({**BASE, "data": {"path": {1}}})[""]
    assert load_recipe({**BASE, "data": {"path": Path("x")}}).data.path == "x"


def test_python_values_make_a_recipe_too() -> None:
    recipe = Recipe.model_validate({**BASE, "method": [{"name": "nkd", "gamma": 2}]})
    assert recipe.method[0].model_dump()["gamma"] == 2
    assert load_recipe({**BASE, "train": recipe.train}) == load_recipe(BASE)
