"""A node of a JSON schema in words, a value as YAML shows it, the names nearest to a wrong one."""

from __future__ import annotations

import difflib
import json
from collections.abc import Collection, Mapping
from typing import Any

Schema = Mapping[str, Any]

_LONGEST = 60


def allowed(node: Schema, defs: Schema) -> str:
    """What a field takes: ``a number > 0 and ≤ 100``, ``fp32, bf16 or fp16``, ``a list of text, or null``."""
    node = resolve(node, defs)
    branches = node.get("anyOf") or node.get("oneOf")
    if branches:
        return ", or ".join(dict.fromkeys(allowed(branch, defs) for branch in branches))
    if "const" in node:
        return show(node["const"])
    if "enum" in node:
        return either([show(choice).strip('"') for choice in node["enum"]])
    match node.get("type"):
        case "integer":
            return f"a whole number {_bounds(node)}".strip()
        case "number":
            return f"a number {_bounds(node)}".strip()
        case "string":
            return _text(node)
        case "array":
            return _array(node, defs)
        case "object":
            return _mapping(node, defs)
        case "boolean":
            return "true or false"
        case "null":
            return "null"
    return "any value"


def resolve(node: Schema, defs: Schema) -> Schema:
    """Follow a ``$ref`` into the schema's ``$defs``."""
    while "$ref" in node:
        node = defs[node["$ref"].rpartition("/")[2]]
    return node


def show(value: Any) -> str:
    """A value as a recipe would have it, cut to one short line."""
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= _LONGEST else text[: _LONGEST - 1] + "…"


def nearest(name: str, names: Collection[str], count: int = 2) -> list[str]:
    """The names that are spelt most like ``name``."""
    return difflib.get_close_matches(name.lower(), names, n=count)


def either(words: Collection[str]) -> str:
    """``a, b or c``."""
    *first, last = words
    return f"{', '.join(first)} or {last}" if first else last


def _bounds(node: Schema) -> str:
    if "minimum" in node and "maximum" in node:
        return f"from {node['minimum']} to {node['maximum']}"
    signs = {"exclusiveMinimum": ">", "minimum": "≥", "exclusiveMaximum": "<", "maximum": "≤"}
    return " and ".join(f"{sign} {node[key]}" for key, sign in signs.items() if key in node)


def _text(node: Schema) -> str:
    words = "text that is not empty" if node.get("minLength") == 1 else "text"
    return f"{words} of the form {node['pattern']}" if "pattern" in node else words


def _array(node: Schema, defs: Schema) -> str:
    fixed = node.get("prefixItems")
    if fixed:
        return f"a list of {len(fixed)}: {', '.join(allowed(item, defs) for item in fixed)}"
    items = allowed(node.get("items", {}), defs)
    least = f"at least {node['minItems']} of: " if node.get("minItems") else ""
    return f"a list of {least}{items}"


def _mapping(node: Schema, defs: Schema) -> str:
    if "properties" in node:
        return "a mapping with keys among " + ", ".join(node["properties"])
    by_pattern: list[Schema] = list(node.get("patternProperties", {}).values())
    values = node.get("additionalProperties") or next(iter(by_pattern), {})
    if values is True:  # anything goes
        values = {}
    return f"a mapping of names to {allowed(values, defs)}"
