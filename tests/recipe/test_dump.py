"""What is dumped is read back equal, whatever the recipe; YAML means what it says."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tutelage import catalogue
from tutelage.recipe import dump, load_recipe, parse_recipe
from tutelage.recipe.text import read_yaml, write_yaml

# The first draw of text makes a table of all characters; the two cores may be busy elsewhere.
PATIENT = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
# Surrogates are no text in UTF-8.
TEXT = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12)
TRICKY = st.sampled_from(
    [
        "null",
        "~",
        "no",
        "On",
        "true",
        "1e-4",
        "0x1f",
        "012",
        "2026-01-01",
        "1:30",
        ".nan",
        "-",
        "a: b",
        "#",
        "<<",
        " ",
    ]
)
WORDS = TEXT | TRICKY
NUMBERS = st.floats(allow_nan=False, allow_infinity=False)
SCALARS = st.booleans() | st.integers() | NUMBERS | WORDS
SHARES = st.floats(0, 1, exclude_min=True, exclude_max=True)
PIXELS = st.floats(1e-6, 1e6)


def optional(values: dict[str, st.SearchStrategy[Any]]) -> st.SearchStrategy[dict[str, Any]]:
    return st.fixed_dictionaries({}, optional=values)


NAMES = st.text("abcXYZ_", min_size=1, max_size=3)
OPTIONS = st.dictionaries(WORDS, SCALARS, max_size=3)
MODELS = st.builds(
    lambda required, more: required | more,
    st.fixed_dictionaries({"model": WORDS}),
    optional(
        {
            "weights": WORDS,
            "options": OPTIONS,
            "trust_remote_code": st.booleans(),
            "mean": st.lists(NUMBERS, min_size=2, max_size=2),
            "std": st.lists(PIXELS, min_size=2, max_size=2),
        }
    ),
)
TEACHERS = MODELS | st.fixed_dictionaries({"run": WORDS})
DATA = st.builds(
    lambda required, more: required | more,
    st.fixed_dictionaries({"path": WORDS}),
    optional(
        {
            "target": st.none() | WORDS | st.lists(WORDS, max_size=3),
            "columns": st.lists(WORDS, max_size=3),
            "validation": st.none() | SHARES | st.integers(1, 10**9) | WORDS,
            "noise": st.floats(0, 10),
            "views": st.lists(
                st.fixed_dictionaries({"name": st.sampled_from(["crop", "flip", "erase"])}), max_size=2
            ),
        }
    ),
)
TRAIN = st.builds(
    lambda required, more: required | more,
    st.fixed_dictionaries({"steps": st.integers(1)}),
    optional(
        {
            "optimizer": optional({"lr": st.floats(1e-300, 100), "options": OPTIONS}),
            "schedule": st.fixed_dictionaries(
                {
                    "name": st.just("multistep"),
                    "milestones": st.lists(SHARES, min_size=1, max_size=3, unique=True).map(sorted),
                }
            ),
            "early_stop": st.none() | st.just({}),
            "precision": st.sampled_from(["fp32", "bf16", "fp16"]),
        }
    ),
)
RECIPES = st.fixed_dictionaries(
    {
        "data": DATA,
        "student": MODELS,
        "method": st.sampled_from(
            ["kd", ["kd", {"name": "nkd", "gamma": 0.25}], {"name": "none", "weight": 2}]
        ),
        "train": TRAIN,
    },
    optional={
        "teacher": st.none() | TEACHERS | st.dictionaries(NAMES, TEACHERS, min_size=1, max_size=2),
        "output": optional({"dir": WORDS, "trackers": st.lists(st.sampled_from(["wandb", "mlflow"]))}),
    },
)


@PATIENT
@given(RECIPES)
def test_any_recipe_is_read_back_equal(values: dict[str, Any]) -> None:
    recipe = load_recipe(values)
    text = dump(recipe)
    assert parse_recipe(text) == recipe
    assert dump(parse_recipe(text)) == text


@pytest.mark.parametrize("name", catalogue.names())
def test_every_methods_defaults_are_read_back_equal(name: str) -> None:
    recipe = load_recipe("digits", [f"method={name}"])
    assert type(recipe.method[0]) is catalogue.load(name).Config
    assert parse_recipe(dump(recipe)) == recipe


def test_a_dump_is_complete() -> None:
    values = read_yaml(dump(load_recipe("digits")))
    assert values["version"] == 1
    assert values["train"]["optimizer"]["weight_decay"] == 0.0
    assert values["method"][0].keys() >= {"name", "weight", "temperature"}


JSON = st.recursive(
    st.none() | SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(WORDS, inner, max_size=3),
    max_leaves=8,
)


@PATIENT
@given(JSON)
def test_yaml_is_read_back_as_it_was_written(value: Any) -> None:
    assert repr(read_yaml(write_yaml(value))) == repr(value)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 1e-4),
        ("5E3", 5000.0),
        ("-.5", -0.5),
        ("1.", 1.0),
        ("+3", 3),
        ("012", 12),
        ("0o17", 15),
        ("0x1F", 31),
        (".inf", float("inf")),
        ("null", None),
        ("~", None),
        ("", None),
        ("True", True),
        ("yes", "yes"),
        ("off", "off"),
        ("2026-01-01", "2026-01-01"),
        ("1:30", "1:30"),
        ("1_000", "1_000"),
        ("1e", "1e"),
        ("{<<: a}", {"<<": "a"}),
        ("[&x {a: 1}, *x]", [{"a": 1}, {"a": 1}]),
    ],
)
def test_plain_words_mean_what_yaml_1_2_says(text: str, value: Any) -> None:
    assert read_yaml(text) == value
    assert type(read_yaml(text)) is type(value)
