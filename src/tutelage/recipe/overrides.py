"""``key=value`` on a command line: dotted paths into a recipe's values."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

from tutelage.recipe.errors import Problem
from tutelage.recipe.text import read_yaml
from tutelage.recipe.words import show

Values = dict[str, Any]


def apply_overrides(values: Values, overrides: Iterable[str]) -> tuple[Values, list[Problem]]:
    """A copy of the values in which every override is set, and what is wrong with the others.

    A value is YAML (``train.epochs=30``, ``teacher=null``, ``method={name: nkd, gamma: 1}``). Mappings on the way are
    made where they are missing; a number picks from a list (``method.0.gamma=2``). A lone method is also its own number
    0, and ``method.gamma=2`` reaches it inside a list of one or behind its bare name. Keys that no recipe has are
    refused later, with all other unknown keys.
    """
    values, problems = copy.deepcopy(values), []
    for override in overrides:
        path, equals, text = (part.strip() for part in override.partition("="))
        if not equals or not all(path.split(".")):
            problems.append(Problem("", f"override {override!r}: write key=value, such as train.epochs=30"))
            continue
        try:
            _set(values, path.split("."), read_yaml(text))
        except ValueError as error:
            problems.append(Problem(path, f"override {override!r}: {error}"))
    return values, problems


def _set(values: Values, path: list[str], value: Any) -> None:
    if path[0] == "method" and len(path) > 1:
        path = _method_path(values, path)
    inner: Any = values
    for position, part in enumerate(path):
        key = _key(inner, part, ".".join(path[:position]))
        if position == len(path) - 1:
            inner[key] = value
        elif isinstance(inner, dict) and inner.get(key) is None:
            inner[key] = {}
        inner = inner[key]


def _method_path(values: Values, path: list[str]) -> list[str]:
    """The path as the given form of ``method`` has it; bare names become mappings, so that options can be set."""
    given = values.get("method")
    listed = given if isinstance(given, list) else [given]
    entries = [{"name": entry} if isinstance(entry, str) else entry for entry in listed]
    values["method"] = entries if listed is given else entries[0]
    if listed is not given:
        return ["method", *path[2:]] if path[1] == "0" else path
    return path if path[1].isdecimal() or len(entries) != 1 else ["method", "0", *path[1:]]


def _key(inner: Any, part: str, where: str) -> str | int:
    """The key of ``part`` in a mapping, or its position in a list."""
    if isinstance(inner, dict):
        return part
    if not isinstance(inner, list):
        raise ValueError(f"`{where}` is {show(inner)} and holds no `{part}`")
    if not part.isdecimal() or int(part) >= len(inner):
        positions = f"{where}.0 to {where}.{len(inner) - 1}" if inner else "none"
        raise ValueError(f"`{where}` is a list of {len(inner)}; pick one of {positions}")
    return int(part)
