"""What is wrong with a recipe: every error at once, one line each."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from pydantic import ValidationError

from tutelage.recipe.words import Schema, allowed, either, nearest, resolve, show

Path = tuple[str | int, ...]

_OWN_MESSAGE = ("conflict", "method_name", "unknown_method", "value_error", "assertion_error")
"""Types of errors whose message says all; the others are worded from the schema."""


@dataclass(frozen=True)
class Problem:
    """One error: where (dotted path of the field; empty: the recipe as a whole) and what, with value and remedy."""

    path: str
    message: str

    def __str__(self) -> str:
        return f"{self.path}: {self.message}" if self.path else self.message


class RecipeError(ValueError):
    """A recipe that cannot be used. ``problems`` has every error; the text has one line for each."""

    def __init__(self, source: str, problems: Sequence[Problem]) -> None:
        self.source, self.problems = source, tuple(problems)
        count = "1 error" if len(self.problems) == 1 else f"{len(self.problems)} errors"
        super().__init__("\n  ".join([f"{source}: {count}", *map(str, self.problems)]))


def problems_of(error: ValidationError, data: Any, schema: Schema, defs: Schema) -> list[Problem]:
    """One problem a field from pydantic's errors.

    Args:
        error: what pydantic raised for ``data``.
        data: the values as they were validated.
        schema: JSON schema of the model, ``defs`` its ``$defs``.
    """
    found: dict[Path, list[Mapping[str, Any]]] = {}
    for line in error.errors(include_url=False):
        found.setdefault(_path(line["loc"], line["type"] == "missing", data), []).append(line)
    problems = []
    for path, lines in found.items():
        own = [line for line in lines if line["type"] in _OWN_MESSAGE]
        problems += [Problem(_dotted(path), _own_message(line)) for line in own]
        deeper = any(len(other) > len(path) and other[: len(path)] == path for other in found)
        if not own and not deeper:
            problems.append(Problem(_dotted(path), _from_schema(path, lines[0], schema, defs)))
    return problems


def field_paths(schema: Schema, defs: Schema, prefix: str = "") -> Iterator[str]:
    """Dotted paths of all fields that a key can name."""
    for branch in _branches(schema, defs):
        for name, node in branch.get("properties", {}).items():
            yield f"{prefix}{name}"
            yield from field_paths(node, defs, f"{prefix}{name}.")


def _path(location: Sequence[str | int], missing: bool, data: Any) -> Path:
    """The part of pydantic's location that the user wrote: names of union branches are left out."""
    path: list[str | int] = []
    for position, part in enumerate(location):
        last = position == len(location) - 1
        keys = range(len(data)) if isinstance(data, list) else data if isinstance(data, Mapping) else ()
        inside = part in keys
        if inside:
            data = data[part]
        if inside or (missing and last):
            path.append(part)
    return tuple(path)


def _from_schema(path: Path, line: Mapping[str, Any], schema: Schema, defs: Schema) -> str:
    if line["type"] == "extra_forbidden":
        return _unknown_key(path, schema, defs)
    node = _node(path, schema, defs)
    takes = allowed(node, defs)
    if line["type"] == "missing":
        meaning = node.get("description", "")
        return f"missing; allowed: {takes}" + (f". {meaning}" if meaning else "")
    value = line["input"]
    hints = ["finite"] if isinstance(value, float) and not math.isfinite(value) else []
    near = nearest(value, list(_choices(node, defs))) if isinstance(value, str) else []
    if near:
        hints.append(f"did you mean {either(near)}?")
    elif isinstance(value, int | float) and "text" in takes and "number" not in takes:
        hints.append("put it in quotes")
    return "; ".join([f"got {show(value)}", f"allowed: {takes}", *hints])


def _unknown_key(path: Path, schema: Schema, defs: Schema) -> str:
    *parents, key = path
    siblings = list(_properties(_node(tuple(parents), schema, defs), defs))
    near = nearest(str(key), siblings) or _elsewhere(str(key), schema, defs)
    hint = f"did you mean {either(near)}? " if near else ""
    return f"unknown key; {hint}allowed: {', '.join(siblings)}"


def _elsewhere(key: str, schema: Schema, defs: Schema) -> list[str]:
    """Paths of fields anywhere in the recipe that have this name, or else one like it."""
    by_name: dict[str, list[str]] = {}
    for path in field_paths(schema, defs):
        by_name.setdefault(path.rpartition(".")[2], []).append(path)
    return [path for name in nearest(key, by_name, 1) for path in by_name[name]][:3]


def _node(path: Path, schema: Schema, defs: Schema) -> Schema:
    for part in path:
        schema = _child(part, schema, defs)
    return resolve(schema, defs)


def _child(part: str | int, schema: Schema, defs: Schema) -> Schema:
    branches = list(_branches(schema, defs))
    for branch in branches:
        if part in branch.get("properties", {}):
            return cast(Schema, branch["properties"][part])
    for branch in branches:
        fixed = branch.get("prefixItems", [])
        if isinstance(part, int) and part < len(fixed):
            return cast(Schema, fixed[part])
        values = [
            branch.get("items"),
            branch.get("additionalProperties"),
            *branch.get("patternProperties", {}).values(),
        ]
        for node in values:
            if isinstance(node, Mapping):
                return node
    return {}


def _branches(schema: Schema, defs: Schema) -> Iterator[Schema]:
    schema = resolve(schema, defs)
    branches = schema.get("anyOf") or schema.get("oneOf")
    if not branches:
        yield schema
    for branch in branches or ():
        yield from _branches(branch, defs)


def _properties(schema: Schema, defs: Schema) -> Iterator[str]:
    for branch in _branches(schema, defs):
        yield from branch.get("properties", {})


def _choices(schema: Schema, defs: Schema) -> Iterator[str]:
    for branch in _branches(schema, defs):
        yield from (choice for choice in branch.get("enum", ()) if isinstance(choice, str))


def _own_message(line: Mapping[str, Any]) -> str:
    if line["type"] in ("value_error", "assertion_error"):
        return f"{line['msg'].partition(', ')[2]}; got {show(line['input'])}"
    return str(line["msg"])


def _dotted(path: Path) -> str:
    return ".".join(map(str, path))
