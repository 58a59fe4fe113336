"""The tables that a method leaves with its run (accuracy by step, for example): drawn too where they are curves or say
what to draw, and with their pictures."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise
from typing import Any

from tutelage.report.blocks import (
    Block,
    Cell,
    Column,
    Figure,
    Figures,
    Notice,
    Picture,
    Pictures,
    Section,
    Table,
)
from tutelage.report.curves import metric_axis
from tutelage.report.disagreements import PNG
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
    words = re.sub(r"[_-]+", " ", name).strip() or "table"
    title = words[:1].upper() + words[1:]
    names = [str(column) for column in listed(content.get("columns"))]
    rows = [row for row in listed(content.get("rows")) if isinstance(row, list)]
    if not names or not rows:
        return Section(title, [Notice("This table is empty.")])
    columns = [
        OwnColumn(name, [row[i] if i < len(row) else None for row in rows[:MOST_ROWS]])
        for i, name in enumerate(names)
    ]
    cut = f": the first {MOST_ROWS} of {len(rows)} rows (all: result.json)" if len(rows) > MOST_ROWS else ""
    pictures, columns = _pictures(columns)
    table = Table(
        title + cut,
        [Column(column.label, column.numeric) for column in columns],
        list(zip(*(column.cells for column in columns), strict=True)),
        sortable=True,
    )
    plots = [mapping(plot) for plot in listed(content.get("plots"))]
    drawn = [figure for plot in plots for figure in _plotted(columns, plot)] if plots else _curves(columns)
    blocks: list[Block] = [*([Figures(drawn)] if drawn else []), *pictures, *([] if pictures else [table])]
    return Section(title, blocks)


def _pictures(columns: list[OwnColumn]) -> tuple[list[Pictures], list[OwnColumn]]:
    """Columns of pictures, shown with what the other columns say of their row; and the other columns."""
    shown = [column for column in columns if any(PNG.fullmatch(str(value)) for value in column.values)]
    others = [column for column in columns if column not in shown]
    found = []
    for row in range(len(columns[0].values)):
        facts = [(column.label, column.cells[row]) for column in others]
        told = ", ".join(f"{name} {cell.text}" for name, cell in facts)
        for column in shown:
            source = str(column.values[row])
            if PNG.fullmatch(source):
                found.append(
                    Picture(source, f"{column.label}: {told}", [("Picture", Cell(column.label)), *facts])
                )
    return ([Pictures(found)] if found else []), others


def _plotted(columns: Sequence[OwnColumn], plot: dict[str, Any]) -> list[Figure]:
    """The figure that a table asks for; none where it names no column of numbers."""
    named = {column.name: column for column in columns if column.numeric}
    x, ys = named.get(str(plot.get("x"))), [named[y] for y in listed(plot.get("y")) if y in named]
    if x is None or not ys:
        return []
    what = ", ".join(column.label for column in ys)
    return [_figure(f"{what[:1].upper()}{what[1:]} by {x.label}", x, ys)]


def _curves(columns: Sequence[OwnColumn]) -> list[Figure]:
    """Shares over a first column that rises, as lines; nothing for any other table."""
    if not columns or not columns[0].rises:
        return []
    shares = [column for column in columns[1:] if column.share]
    return [_figure(f"Shares by {columns[0].label}", columns[0], shares)] if shares else []


def _figure(title: str, first: OwnColumn, columns: Sequence[OwnColumn]) -> Figure:
    styles = styles_for([column.name for column in columns])
    lines = []
    for column in columns:
        points = [
            (x, y)
            for x, y in zip(first.finite, column.finite, strict=True)
            if x is not None and y is not None
        ]
        x, y = [x for x, _ in points], [y for _, y in points]
        lines.append(Line(column.name, column.label, styles[column.name], x, y, markers=True))
    drawn = line_figure(
        title,
        lines,
        axis=metric_axis(columns[0].name),
        x_title=first.label,
        caption="From the table below, row by row.",
        wide=True,
    )
    return replace(drawn, values=None)
