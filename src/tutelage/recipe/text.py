"""YAML in and out, by YAML 1.2's core schema: ``1e-4`` is a number, ``no`` and ``2026-01-01`` are text, no key comes
twice, nothing is built but mappings, lists, text, numbers, true, false and null. A document has limits: one
from elsewhere can take neither memory nor time."""

from __future__ import annotations

import re
from collections.abc import Hashable
from typing import Any, ClassVar

import yaml

_PLAIN = {
    "null": (r"~|null|Null|NULL|", "~nN\0"),
    "bool": (r"true|True|TRUE|false|False|FALSE", "tTfF"),
    "int": (r"[-+]?[0-9]+|0x[0-9a-fA-F]+|0o[0-7]+", "-+0123456789"),
    "float": (
        r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        "-+.0123456789",
    ),
}


LARGEST = 2**18
"""Bytes of a document."""
DEEPEST = 40
"""Mappings and lists inside one another."""
LONGEST_NUMBER = 100
"""Digits of a whole number."""
MOST_VALUES = 20_000
"""Mappings, lists and single values, keys included; what an alias repeats counts each time."""

_TAGS = [f"tag:yaml.org,2002:{name}" for name in (*_PLAIN, "str", "seq", "map")]


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers: ClassVar[dict[str, Any]] = {}
    yaml_constructors: ClassVar[dict[Any, Any]] = {
        tag: yaml.SafeLoader.yaml_constructors[tag] for tag in (*_TAGS, None)
    }

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.depth, self.values = 0, 0
        self.inside: dict[str | None, int] = {}
        """Values behind each anchor whose node is complete."""

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        """Counts what is composed, before anything is built of it."""
        event: Any = self.peek_event()
        if isinstance(event, yaml.AliasEvent):
            if event.anchor in self.anchors and event.anchor not in self.inside:
                raise _refusal(f"*{event.anchor} stands inside what it repeats", event.start_mark)
            self._count(self.inside.get(event.anchor, 0), event)
            return super().compose_node(parent, index)
        before = self.values
        self._count(1, event)
        self.depth += 1
        node = super().compose_node(parent, index)
        self.depth -= 1
        if event.anchor is not None:
            self.inside[event.anchor] = self.values - before
        return node

    def _count(self, values: int, event: Any) -> None:
        self.values += values
        if self.values > MOST_VALUES:
            raise _refusal(
                f"more than {MOST_VALUES} values, aliases counted as often as used", event.start_mark
            )
        if self.depth >= DEEPEST and isinstance(event, yaml.CollectionStartEvent):
            raise _refusal(f"more than {DEEPEST} mappings and lists inside one another", event.start_mark)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if key.tag != "tag:yaml.org,2002:str":
                raise _refusal(f"the key {key.value!r} is no text", key.start_mark)
            if key.value in seen:
                raise _refusal(f"the key {key.value!r} comes twice", key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)

    def construct_int(self, node: yaml.ScalarNode) -> int:
        digits = str(self.construct_scalar(node))
        if len(digits) > LONGEST_NUMBER:
            raise _refusal(f"a number of more than {LONGEST_NUMBER} digits", node.start_mark)
        return int(digits, 0) if digits[:2] in ("0x", "0o") else int(digits)


def _refusal(what: str, mark: Any) -> yaml.MarkedYAMLError:
    return yaml.MarkedYAMLError(None, None, what, mark)


class _Dumper(yaml.SafeDumper):
    yaml_implicit_resolvers: ClassVar[dict[str, Any]] = {}

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _represent_text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    """YAML folds these three where they stand bare; between double quotes they are escaped."""
    style = '"' if any(character in text for character in "\x85\u2028\u2029") else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _represent_text)
for _kind in (_Loader, _Dumper):
    for _name, (_pattern, _first) in _PLAIN.items():
        _starts = ["" if character == "\0" else character for character in _first]
        _kind.add_implicit_resolver(f"tag:yaml.org,2002:{_name}", re.compile(f"^(?:{_pattern})$"), _starts)
_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_int)


def read_yaml(text: str) -> Any:
    """The plain values of a YAML document, at most `LARGEST` bytes, `DEEPEST` deep and `MOST_VALUES` values.

    Raises:
        ValueError: what is wrong and where, in one line.
    """
    if len(text.encode(errors="replace")) > LARGEST:
        raise ValueError(f"more than {LARGEST // 1024} KiB of YAML; a recipe has a few")
    try:
        return yaml.load(text, _Loader)  # a SafeLoader
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        where = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        raise ValueError(f"{where}{error.problem}") from error
    except yaml.YAMLError as error:
        raise ValueError(str(error).replace("\n", " ")) from error


def write_yaml(values: Any) -> str:
    """YAML that `read_yaml` reads back unchanged; keys keep their order, innermost mappings and lists take one line."""
    return yaml.dump(
        values, Dumper=_Dumper, sort_keys=False, allow_unicode=True, default_flow_style=None, width=110
    )
