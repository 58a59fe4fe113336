"""The tables that a method leaves with its run (accuracy by step, for example), drawn too where they are curves."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise
from typing import Any

from tutelage.report.blocks import Block, Cell, Column, Figures, Notice, Section, Table
from tutelage.report.curves import metric_axis
from tutelage.report.facts import value_text
from tutelage.report.format import is_share, number, percent, plain
from tutelage.report.lines import Line, line_figure
from tutelage.report.records import listed, mapping
from tutelage.report.styles import styles_for

MOST_ROWS = 200


@dataclass(frozen=True)
class OwnColumn:
    """One column as the method left it."""

    name: str
    values: list[Any]

    @property
    def label(self) -> str:
        return self.name.replace("_", " ")

    @cached_property
    def finite(self) -> list[float | None]:
        return [number(value) for value in self.values]

    @property
    def numeric(self) -> bool:
        return all(value is None or isinstance(value, int | float) for value in self.values)

    @property
    def share(self) -> bool:
        """Whether it holds shares, by its name and its values."""
        known = [value for value in self.finite if value is not None]
        return (
            bool(known) and self.numeric and is_share(self.name) and all(0 <= value <= 1 for value in known)
        )

    @property
    def rises(self) -> bool:
        known = [value for value in self.finite if value is not None]
        return 1 < len(known) == len(self.values) and all(a < b for a, b in pairwise(known))

    @property
    def cells(self) -> list[Cell]:
        write: Callable[[object], str] = percent if self.share else plain if self.numeric else value_text
        sorts = self.finite if self.numeric else map(str, self.values)
        return [Cell(write(value), sort) for value, sort in zip(self.values, sorts, strict=True)]


def own_tables(result: dict[str, Any]) -> list[Section]:
    """A section for each of the run's ``tables``."""
    return [_section(name, mapping(content)) for name, content in mapping(result.get("tables")).items()]


def _section(name: str, content: dict[str, Any]) -> Section:
    title = re.sub(r"[_-]+", " ", name).strip().capitalize() or "Table"
    names = [str(column) for column in listed(content.get("columns"))]
    rows = [row for row in listed(content.get("rows")) if isinstance(row, list)]
    if not names or not rows:
        return Section(title, [Notice("This table is empty.")])
    columns = [
        OwnColumn(name, [row[i] if i < len(row) else None for row in rows[:MOST_ROWS]])
        for i, name in enumerate(names)
    ]
    cut = f": the first {MOST_ROWS} of {len(rows)} rows (all: result.json)" if len(rows) > MOST_ROWS else ""
    table = Table(
        title + cut,
        [Column(column.label, column.numeric) for column in columns],
        list(zip(*(column.cells for column in columns), strict=True)),
        sortable=True,
    )
    blocks: list[Block] = [*_curves(columns), table]
    return Section(title, blocks)


def _curves(columns: Sequence[OwnColumn]) -> list[Figures]:
    """Shares over a first column that rises, as lines; nothing for any other table."""
    first, shares = columns[0], [column for column in columns[1:] if column.share]
    if not first.rises or not shares:
        return []
    styles = styles_for([column.name for column in shares])
    lines = []
    for column in shares:
        points = [
            (x, y)
            for x, y in zip(first.finite, column.finite, strict=True)
            if x is not None and y is not None
        ]
        x, y = [x for x, _ in points], [y for _, y in points]
        lines.append(Line(column.name, column.label, styles[column.name], x, y, markers=True))
    drawn = line_figure(
        f"Shares by {first.label}",
        lines,
        axis=metric_axis(shares[0].name),
        x_title=first.label,
        caption="The columns of the table below that are shares.",
        wide=True,
    )
    return [Figures([replace(drawn, values=None)])]
