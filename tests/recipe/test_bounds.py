"""Every bound that a Config declares holds: values made from its JSON schema to be wrong are refused by name."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from typing import Any, get_args

import jsonschema
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tutelage import catalogue
from tutelage.recipe import Config, RecipeError, validate
from tutelage.recipe import schema as recipe_schema

WRONG_TYPES = (
    None,
    True,
    False,
    -1,
    3,
    0.5,
    "",
    "no such choice",
    "3",
    [],
    [[]],
    {},
    {"no such key": {}},
    [{}],
)


def inside(annotation: Any) -> Iterator[type[Config]]:
    """Configs in an annotation and in their fields."""
    if isinstance(annotation, type) and issubclass(annotation, Config):
        yield annotation
        for field in annotation.model_fields.values():
            yield from inside(field.annotation)
    for part in get_args(annotation):
        yield from inside(part)


def configs() -> dict[str, type[Config]]:
    found = {
        "recipe": recipe_schema.Recipe,
        **{name: catalogue.load(name).Config for name in catalogue.names()},
    }
    nested = {f"{name}:{kind.__name__}": kind for name, config in found.items() for kind in inside(config)}
    assert len(nested) > 12
    return nested


CONFIGS = configs()
FIELDS = [
    (owner, name)
    for owner, config in CONFIGS.items()
    for name in config.model_fields
    if (owner, name) != ("recipe:Recipe", "method")
]


@functools.cache
def field_schema(owner: str, name: str) -> dict[str, Any]:
    schema = CONFIGS[owner].model_json_schema()
    return {**schema["properties"][name], "$defs": schema.get("$defs", {})}


def candidates(node: Any) -> Iterator[Any]:
    """Values at, just inside and just beyond every bound in a schema; inside lists and mappings too."""
    if isinstance(node, list):
        for part in node:
            yield from candidates(part)
    if not isinstance(node, dict):
        return
    for key in ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"):
        if key in node:
            edge = node[key]
            yield from (
                edge,
                edge - 1,
                edge + 1,
                math.nextafter(edge, -math.inf),
                math.nextafter(edge, math.inf),
            )
    if "minItems" in node:
        yield [0.5] * (node["minItems"] - 1)
    if "maxItems" in node:
        yield [0.5] * (node["maxItems"] + 1)
    for key, part in node.items():
        if key != "$defs":
            for value in candidates(part):
                yield from (value, [value], [0.5, value], {"x": value})


def refused(owner: str, name: str, value: Any) -> bool:
    try:
        validate(CONFIGS[owner], {name: value})
    except RecipeError as error:
        return any(problem.path == name or problem.path.startswith(f"{name}.") for problem in error.problems)
    return False


@pytest.mark.parametrize(("owner", "name"), FIELDS, ids=[f"{owner}.{name}" for owner, name in FIELDS])
def test_every_value_outside_the_schema_is_refused_by_name(owner: str, name: str) -> None:
    schema = field_schema(owner, name)
    validator = jsonschema.Draft202012Validator(schema)
    wrong = [value for value in (*WRONG_TYPES, *candidates(schema)) if not validator.is_valid(value)]
    assert wrong or schema.get("description"), "a field that takes anything"
    accepted = [value for value in wrong if not refused(owner, name, value)]
    assert accepted == []


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("owner", CONFIGS)
def test_no_number_may_be_infinite_or_nan(owner: str, value: float) -> None:
    numbers = [
        name for name in CONFIGS[owner].model_fields if "number" in str(field_schema(owner, name).get("type"))
    ]
    assert [name for name in numbers if not refused(owner, name, value)] == []


@pytest.mark.parametrize("owner", CONFIGS)
def test_an_unknown_key_is_refused_by_name(owner: str) -> None:
    assert refused(owner, "no_such_key", 1)


@pytest.mark.parametrize("owner", CONFIGS)
def test_every_field_says_what_it_does(owner: str) -> None:
    silent = [name for name, field in CONFIGS[owner].model_fields.items() if not field.description]
    assert silent == []


@pytest.mark.parametrize("name", catalogue.names())
def test_every_number_of_a_method_has_a_bound(name: str) -> None:
    owner = f"{name}:{catalogue.load(name).Config.__name__}"
    free = [field for field in CONFIGS[owner].model_fields if _is_unbounded(field_schema(owner, field))]
    assert free == []


def _is_unbounded(node: Any) -> bool:
    if isinstance(node, list):
        return any(map(_is_unbounded, node))
    if not isinstance(node, dict):
        return False
    bounds = {"minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "enum", "const"}
    if node.get("type") in ("number", "integer") and not bounds & node.keys():
        return True
    return any(_is_unbounded(node[key]) for key in ("anyOf", "items", "prefixItems") if key in node)


VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(10**6), 10**6)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=4,
)


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.sampled_from(FIELDS), VALUES)
def test_whatever_the_schema_refuses_is_refused_by_name(field: tuple[str, str], value: Any) -> None:
    if not jsonschema.Draft202012Validator(field_schema(*field)).is_valid(value):
        assert refused(*field, value)
