"""Line figures: curves over steps or epochs, with bands, a table of their values, and a description in words."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from tutelage.report.blocks import Cell, Column, Figure, Series, Style, Table
from tutelage.report.format import count, number

MAX_POINTS = 150
"""Points of one line; what is longer is averaged over neighbours, so that a long run's report stays small."""
TABLE_ROWS = 10
FEW = 10
"""Steps of one on the horizontal axis that are all labelled."""
SPARSE = 40
"""A line alone has a marker at each point, up to so many points."""
MARKED = 12
"""Markers of each line among several."""

Writer = Callable[[object], str]


@dataclass(frozen=True)
class Line:
    key: str
    label: str
    style: Style
    x: Sequence[float]
    y: Sequence[float]
    low: Sequence[float] = field(default_factory=tuple)
    high: Sequence[float] = field(default_factory=tuple)
    markers: bool = False


@dataclass(frozen=True)
class Axis:
    """What the vertical axis shows: how its values are written, and plotly's (d3's) format for its ticks."""

    write: Writer
    ticks: str = ""

    @property
    def hover(self) -> str:
        return "%{y:.2%}" if "%" in self.ticks else "%{y:.4~g}"


def escape(text: str) -> str:
    """Text for plotly, which reads some HTML in names and labels: its special characters as entities."""
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def shorten(text: str, length: int) -> str:
    return text if len(text) <= length else text[: length - 1].rstrip() + "…"


def tidy(value: float) -> float:
    """Seven significant digits: more than a screen can show, half the bytes."""
    return float(f"{value:.7g}")


def at(*keys: str) -> Callable[[dict[str, Any]], object]:
    """Reads what stands under the keys, one inside the other; none where there is nothing."""

    def read(row: dict[str, Any]) -> object:
        value: object = row
        for key in keys:
            value = value.get(key) if isinstance(value, dict) else None
        return value

    return read


def collect(
    rows: Sequence[dict[str, Any]], x: str, value: Callable[[dict[str, Any]], object]
) -> tuple[list[float], list[float]]:
    """The finite values of rows in order, averaged over neighbours down to `MAX_POINTS`; each x is its group's last."""
    pairs = [(number(row.get(x)), number(value(row))) for row in rows]
    finite = [(a, b) for a, b in pairs if a is not None and b is not None]
    width = -(-len(finite) // MAX_POINTS) or 1
    groups = [finite[i : i + width] for i in range(0, len(finite), width)]
    return [g[-1][0] for g in groups], [tidy(sum(b for _, b in g) / len(g)) for g in groups]


def line_figure(
    title: str,
    lines: Sequence[Line],
    *,
    axis: Axis,
    x_title: str,
    caption: str,
    own_legend: bool = True,
    wide: bool = False,
) -> Figure:
    """A figure of the lines that have points. Bands (``low``, ``high``) lie below their lines."""
    drawn = [line for line in lines if line.x]
    bands = [_band(line) for line in drawn if line.low]
    traces = [_trace(line, axis, x_title, several=len(drawn) > 1) for line in drawn]
    return Figure(
        title=title,
        caption=caption,
        description=_describe(title, drawn, axis.write, x_title),
        traces=[*bands, *traces],
        layout={
            "xaxis": {"title": {"text": escape(x_title)}, **_scale(drawn)},
            "yaxis": {"tickformat": axis.ticks},
        },
        series=[Series(line.key, line.label, line.style) for line in drawn]
        if own_legend and len(drawn) > 1
        else (),
        values=_values(title, drawn, axis.write, x_title),
        wide=wide,
    )


def is_curve(lines: Sequence[Line]) -> bool:
    """Whether there is a course to draw: what was measured once stands in the tables."""
    return any(len(line.x) > 1 for line in lines)


def _scale(lines: Sequence[Line]) -> dict[str, Any]:
    """Counts that begin near 0 (steps, epochs) are drawn from 0 on, so that neighbouring figures share their start.

    A few whole numbers have no ticks between them.
    """
    every = [x for line in lines for x in line.x]
    if not every:
        return {}
    low, high = min(every), max(every)
    whole = high - low <= FEW and all(x == int(x) for x in every)
    return {"rangemode": "tozero" if 0 < low <= 0.1 * high else "normal", **({"dtick": 1} if whole else {})}


def _trace(line: Line, axis: Axis, x_title: str, *, several: bool) -> dict[str, Any]:
    """One line. Among several each has markers, so that colour alone tells none; never so many that they touch."""
    marked = several or len(line.x) == 1 or (line.markers and len(line.x) <= SPARSE)
    return {
        "type": "scatter",
        "mode": "lines+markers" if marked else "lines",
        "name": escape(line.label),
        "meta": line.key,
        "x": list(line.x),
        "y": list(line.y),
        "line": {"color": line.style.paint, "width": 2, "dash": line.style.dash},
        "marker": {
            "color": line.style.paint,
            "symbol": line.style.symbol,
            "size": 7,
            "maxdisplayed": MARKED * several,
        },
        "cliponaxis": False,
        "hovertemplate": f"%{{fullData.name}}<br>{escape(x_title)} %{{x}}: {axis.hover}<extra></extra>",
    }


def _band(line: Line) -> dict[str, Any]:
    return {
        "type": "scatter",
        "mode": "lines",
        "meta": line.key,
        "x": [*line.x, *reversed(line.x)],
        "y": [*line.high, *reversed(line.low)],
        "fill": "toself",
        "fillcolor": f"{line.style.paint} 0.16",
        "line": {"width": 0, "color": f"{line.style.paint} 0"},
        "hoverinfo": "skip",
    }


def _values(title: str, lines: Sequence[Line], write: Writer, x_title: str) -> Table | None:
    every = sorted({x for line in lines for x in line.x})
    if not every:
        return None
    kept = every
    if len(every) > TABLE_ROWS:
        kept = [every[round(i * (len(every) - 1) / (TABLE_ROWS - 1))] for i in range(TABLE_ROWS)]
    looked_up = [dict(zip(line.x, line.y, strict=True)) for line in lines]
    some = "" if len(kept) == len(every) else f" ({len(kept)} of {count(len(every))} points)"
    return Table(
        caption=f"{title}: values{some}",
        columns=[Column(x_title.capitalize()), *(Column(line.label) for line in lines)],
        rows=[
            [Cell(_tick(x), x), *(Cell(write(values.get(x)), values.get(x)) for values in looked_up)]
            for x in kept
        ],
    )


def _tick(x: float) -> str:
    return count(x) if x == int(x) else f"{x:g}"


def _describe(title: str, lines: Sequence[Line], write: Writer, x_title: str) -> str:
    """The picture in words: where each line starts and ends, and whether it only rises or falls."""
    if not lines:
        return f"{title}: nothing to draw."
    told = [
        f"{line.label} {_course(line.y)} from {write(line.y[0])} to {write(line.y[-1])}"
        if len(line.y) > 1
        else f"{line.label} is {write(line.y[0])}"
        for line in lines[:6]
    ]
    rest = f"; {len(lines) - 6} more lines" if len(lines) > 6 else ""
    last = max(line.x[-1] for line in lines)
    return f"Line chart, {title}, up to {x_title} {_tick(last)}: {'; '.join(told)}{rest}."


def _course(values: Sequence[float]) -> str:
    steps = [b - a for a, b in pairwise(values)]
    if all(step == 0 for step in steps):
        return "stays"
    if all(step >= 0 for step in steps):
        return "rises"
    if all(step <= 0 for step in steps):
        return "falls"
    return "goes"
