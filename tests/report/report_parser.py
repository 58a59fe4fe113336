"""Reads a report as a browser would: elements, visible text, tables, figures. Refuses HTML that is ill formed."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

VOID = {"meta", "link", "br", "img", "input", "hr"}


@dataclass
class Element:
    tag: str
    attributes: dict[str, str]
    text: str = ""
    children: list[Element] = field(default_factory=list)

    def all(self, tag: str, **attributes: str) -> list[Element]:
        """Every element of the tag inside this one, in order; ``class_`` asks for one class of several."""
        found = []
        for child in self.children:
            found += [child] if child.tag == tag and child.has(attributes) else []
            found += child.all(tag, **attributes)
        return found

    def has(self, wanted: dict[str, str]) -> bool:
        classes = self.attributes.get("class", "").split()
        return all(
            value in classes if key == "class_" else self.attributes.get(key.replace("_", "-")) == value
            for key, value in wanted.items()
        )

    @property
    def words(self) -> str:
        """Text of this element and everything inside, scripts and styles left out, blanks made one."""
        inner = " ".join(child.words for child in self.children if child.tag not in ("script", "style"))
        return " ".join(f"{self.text} {inner}".split())


class _Builder(HTMLParser):
    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.root = Element("document", {})
        self.open = [self.root]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        element = Element(tag, {name: value or "" for name, value in attrs})
        self.open[-1].children.append(element)
        if tag not in VOID:
            self.open.append(element)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.open[-1].children.append(Element(tag, {name: value or "" for name, value in attrs}))

    def handle_endtag(self, tag: str) -> None:
        if self.open[-1].tag != tag:
            raise AssertionError(f"</{tag}> closes <{self.open[-1].tag}> at {self.getpos()}")
        self.open.pop()

    def handle_data(self, data: str) -> None:
        self.open[-1].text += data


class Page:
    """A parsed report."""

    def __init__(self, path: Path) -> None:
        self.source = path.read_text(encoding="utf-8")
        builder = _Builder()
        builder.feed(self.source)
        builder.close()
        assert builder.open == [builder.root], f"left open: {[element.tag for element in builder.open]}"
        self.root = builder.root

    def all(self, tag: str, **attributes: str) -> list[Element]:
        return self.root.all(tag, **attributes)

    @property
    def text(self) -> str:
        return self.all("body")[0].words.replace("\u00a0", " ")

    def table(self, caption: str) -> list[list[str]]:
        """Rows of the table with that caption (or whose caption starts with it), head first, foot last."""
        tables = {table.all("caption")[0].words: table for table in reversed(self.all("table"))}
        found = [caption] if caption in tables else [name for name in tables if name.startswith(caption)]
        assert found, f"no table {caption!r}; there are {list(tables)}"
        rows = tables[found[0]].all("tr")
        return [[cell.words.replace("\u00a0", " ") for cell in row.children] for row in rows]

    @property
    def payloads(self) -> dict[str, dict[str, Any]]:
        """What each figure draws, by its title (the first of each)."""
        found: dict[str, dict[str, Any]] = {}
        for figure in self.all("figure"):
            title = next(child.words for child in figure.children if child.tag in ("h2", "h3", "h4", "h5"))
            found.setdefault(title, json.loads(figure.all("script")[0].text, parse_constant=_refuse))
        return found


def tiles(page: Page) -> dict[str, str]:
    """The page's large numbers: what stands in each tile, by its label."""
    found = page.all("dl", class_="tiles")[0].children
    return {tile.all("dt")[0].words: tile.all("dd")[0].words.replace("\u00a0", " ") for tile in found}


def _refuse(constant: str) -> Any:
    raise AssertionError(f"{constant} is no JSON, and a browser cannot read it")
