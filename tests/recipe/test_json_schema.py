"""The JSON Schema: a snapshot of the recipe's own part, and what an editor gets with all methods."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from tutelage import catalogue
from tutelage.recipe import Recipe, json_schema, shipped
from tutelage.recipe.text import read_yaml

SNAPSHOT = Path(__file__).with_name("recipe.schema.json")
REFRESH = "TUTELAGE_REFRESH=1 python -m pytest tests/recipe/test_json_schema.py"


def test_the_recipes_fields_are_those_of_the_snapshot() -> None:
    """A changed option shows in review. Methods are left out: a new one changes no file but its own."""
    text = json.dumps(Recipe.model_json_schema(), indent=1, ensure_ascii=False) + "\n"
    if os.environ.get("TUTELAGE_REFRESH"):
        SNAPSHOT.write_text(text, encoding="utf-8")
    assert text == SNAPSHOT.read_text(encoding="utf-8"), (
        f"the recipe's schema changed; where that is meant: {REFRESH}"
    )


@pytest.fixture(scope="module")
def validator() -> Any:
    schema = json_schema()
    jsonschema.Draft202012Validator.check_schema(schema)
    return jsonschema.Draft202012Validator(schema)


@pytest.mark.parametrize("name", shipped())
def test_shipped_recipes_fit_it(validator: Any, name: str) -> None:
    validator.validate(read_yaml(shipped()[name].read_text(encoding="utf-8")))


@pytest.mark.parametrize("name", catalogue.names())
def test_every_method_is_known_by_name_mapping_and_list(validator: Any, name: str) -> None:
    values = {"data": {"path": "x"}, "student": {"model": "x"}, "train": {"epochs": 1}}
    for method in (name, {"name": name}, [name, {"name": name, "weight": 2}]):
        validator.validate({**values, "method": method})
    for method in (
        name + "x",
        {"name": name, "no_such_option": 1},
        {"name": name, "weight": -1},
        [],
        3,
        {"weight": 1},
    ):
        assert not validator.is_valid({**values, "method": method})


def test_an_editor_sees_each_methods_options_described() -> None:
    schema = json_schema()
    for name in catalogue.names():
        own = schema["$defs"][f"method-{name}"]
        assert own["properties"]["name"]["const"] == name
        assert own["required"].count("name") == 1
        assert all(option.get("description") for option in own["properties"].values())
