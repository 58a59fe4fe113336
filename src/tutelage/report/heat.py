"""Heat maps: a table of shares by two lists of names, drawn."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tutelage.report.blocks import Figure, Table
from tutelage.report.lines import escape, shorten

STRONGEST = 0.55
"""Opacity of the largest value's colour: text on it stays readable in both themes."""
LONGEST_LABEL = 16
ROW_HEIGHT = {"few": 34, "many": 17}
COLUMN_WIDTH = 14
FEW = 12
"""Rows and columns, up to which two heat maps stand side by side."""

Values = Sequence[Sequence[float | None]]


@dataclass(frozen=True)
class Layer:
    """Cells of one colour, from nothing at ``bottom`` to ``STRONGEST`` at ``top``; without a value: left out."""

    values: Values
    color: str
    top: float
    bottom: float = 0.0


@dataclass(frozen=True)
class Names:
    """What the rows (or the columns) are, and what each is called, all different."""

    title: str
    labels: Sequence[str]


def heat_figure(
    title: str,
    layers: Sequence[Layer],
    *,
    rows: Names,
    columns: Names,
    texts: Sequence[Sequence[str | int]],
    hover: str,
    caption: str,
    description: str,
    values: Table | None = None,
) -> Figure:
    """Layers over each other, first row on top; ``texts`` stand in the cells where these are large enough.

    ``hover`` is plotly's template: ``%{y}`` the row, ``%{x}`` the column, ``%{text}``, ``%{z}``.
    """
    few = max(len(rows.labels), len(columns.labels)) <= FEW
    return Figure(
        title=title,
        caption=caption,
        description=description,
        traces=[_trace(layer, rows, columns, texts, hover) for layer in layers],
        layout={
            "xaxis": _axis(columns),
            "yaxis": {**_axis(rows), "autorange": "reversed"},
        },
        height=110 + ROW_HEIGHT["few" if few else "many"] * max(len(rows.labels), 3),
        values=values,
        wide=not few,
        least_width=0 if few else _label_width(rows) + COLUMN_WIDTH * len(columns.labels),
    )


def short_labels(names: Sequence[str], *, end: bool = False) -> list[str]:
    """Names as an axis can bear them, none alike; of long ones their beginning (or ``end``) is kept."""
    cut = [_end(name) if end else shorten(name, LONGEST_LABEL) for name in names]
    return cut if len(set(cut)) == len(cut) else [f"{name} ({i})" for i, name in enumerate(cut)]


def _end(name: str) -> str:
    return name if len(name) <= LONGEST_LABEL else f"…{name[1 - LONGEST_LABEL :].lstrip('.')}"


def _label_width(names: Names) -> int:
    return 40 + 7 * max(map(len, names.labels))


def _axis(names: Names) -> dict[str, Any]:
    return {"type": "category", "title": {"text": escape(names.title)}, "showgrid": False}


def _trace(
    layer: Layer, rows: Names, columns: Names, texts: Sequence[Sequence[str | int]], hover: str
) -> dict[str, Any]:
    return {
        "type": "heatmap",
        "x": [escape(label) for label in columns.labels],
        "y": [escape(label) for label in rows.labels],
        "z": [[None if value is None else round(value, 4) or 0 for value in row] for row in layer.values],
        "zmin": layer.bottom,
        "zmax": layer.top,
        "text": [
            [text if value is not None else "" for text, value in zip(words, row, strict=True)]
            for words, row in zip(texts, layer.values, strict=True)
        ],
        "texttemplate": "%{text}",
        "textfont": {"color": "var(--ink)"},
        "colorscale": [[0, f"var(--{layer.color}) 0"], [1, f"var(--{layer.color}) {STRONGEST}"]],
        "showscale": False,
        "hoverongaps": False,
        "xgap": 1,
        "ygap": 1,
        "hovertemplate": f"{hover}<extra></extra>",
    }
