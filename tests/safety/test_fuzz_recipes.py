"""Recipes as nobody wrote them, as text, as values and on the command line: a recipe comes out, or `RecipeError`."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

from damage import RECIPE, VALUES, altered, damaged, fuzzed, places
from hypothesis import strategies as st

from tutelage.recipe import RecipeError, load_recipe, parse_recipe
from tutelage.recipe.errors import field_paths
from tutelage.recipe.schema import Recipe
from tutelage.recipe.text import read_yaml, write_yaml

TEXTS = st.one_of(
    st.text(max_size=60),
    st.text(alphabet="{}[]:,&*!|>-?'\"#%@ \nab1.", max_size=60),
    damaged(write_yaml(RECIPE).encode()).map(lambda content: content.decode(errors="replace")),
)
KEYS = st.one_of(
    st.sampled_from([*field_paths(Recipe.model_json_schema(), Recipe.model_json_schema()["$defs"])]),
    st.sampled_from([".".join(map(str, path)) for path in places(RECIPE)]),
    st.text(alphabet="abc.0-_=", max_size=12),
)


def read_text(text: str) -> None:
    try:
        value = read_yaml(text)
    except ValueError:
        return
    assert read_yaml(write_yaml(value)) == value or "nan" in text.lower()


def parse_text(text: str) -> None:
    with suppress(RecipeError):
        assert isinstance(parse_recipe(text), Recipe)


def load_values(values: Any) -> None:
    if isinstance(values, dict):
        with suppress(RecipeError):
            assert isinstance(load_recipe(values), Recipe)


def load_with_overrides(overrides: list[tuple[str, str]]) -> None:
    with suppress(RecipeError):
        load_recipe(RECIPE, [f"{key}={value}" for key, value in overrides])


VALUE_TEXTS = st.one_of(st.text(max_size=20), VALUES.map(repr), TEXTS)
test_yaml, test_yaml_long = fuzzed(read_text, 150, text=TEXTS)
test_recipes_of_any_text, test_recipes_of_any_text_long = fuzzed(parse_text, 60, text=TEXTS)
test_recipes_of_any_values, test_recipes_of_any_values_long = fuzzed(load_values, 80, values=altered(RECIPE))
test_overrides, test_overrides_long = fuzzed(
    load_with_overrides, 60, overrides=st.lists(st.tuples(KEYS, VALUE_TEXTS), max_size=3)
)
