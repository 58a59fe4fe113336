"""Reliability diagram: how often an answer is right, by how sure it was."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tutelage.report.analysis import Analysis, Bin
from tutelage.report.blocks import Cell, Column, Figure, Figures, Section, Series, Table
from tutelage.report.format import count, percent
from tutelage.report.lines import tidy
from tutelage.report.styles import ANSWERS

FEW_ROWS = 10
"""A bin of fewer rows says next to nothing: its point is faint, and the line passes it by."""


def calibration_section(analysis: Analysis) -> Section | None:
    """Of student and teacher; none where neither was measured."""
    models = {"Student": analysis.student.calibration}
    if analysis.teacher is not None:
        models["Teacher"] = analysis.teacher.calibration
    drawn = {name: bins for name, bins in models.items() if bins}
    if not drawn:
        return None
    return Section("Calibration", [Figures([_figure(drawn, analysis)])])


def _figure(models: dict[str, Sequence[Bin]], analysis: Analysis) -> Figure:
    curves = [trace for name, bins in models.items() for trace in _curve(name, bins, analysis.items)]
    bars = [_bars(name, bins, analysis.items) for name, bins in models.items()]
    ideal = {"type": "line", "layer": "below", "x0": 0, "y0": 0, "x1": 1, "y1": 1}
    return Figure(
        title="Accuracy by confidence",
        caption=f"Above: mean confidence and accuracy of the {analysis.items} in a bin (faint: fewer than {FEW_ROWS}); "
        f"below the dotted line a model is surer than it is right. Bars: share of {analysis.items} in the bin.",
        description=f"Reliability diagram on {count(analysis.rows)} {analysis.split} {analysis.items}: "
        + "; ".join(_told(name, bins) for name, bins in models.items())
        + ".",
        traces=[*curves, *bars],
        layout={
            "xaxis": {
                "range": [0, 1.005],
                "tickformat": ".0%",
                "title": {"text": "confidence"},
                "anchor": "y2",
            },
            "yaxis": {
                "range": [0, 1.02],
                "tickformat": ".0%",
                "domain": [0.34, 1],
                "title": {"text": "accuracy"},
            },
            "yaxis2": {
                "tickformat": ".0%",
                "domain": [0, 0.24],
                "rangemode": "tozero",
                "nticks": 3,
                "title": {"text": analysis.items},
            },
            "bargap": 0.15,
            "shapes": [
                {**ideal, "line": {"color": "var(--series-neutral) 0.8", "width": 1.5, "dash": "dot"}}
            ],
        },
        height=400,
        series=[Series(name, name, ANSWERS[name]) for name in models] if len(models) > 1 else (),
        values=_values(models, analysis.items),
        wide=True,
    )


def _told(name: str, bins: Sequence[Bin]) -> str:
    """Over all rows: how sure, and how often right."""
    rows = sum(found.rows for found in bins)
    sure, right = (
        sum(found.rows * value for found, value in zip(bins, values, strict=True)) / rows
        for values in ([found.confidence for found in bins], [found.accuracy for found in bins])
    )
    return (
        f"the {name.lower()} is {percent(sure, 1)} sure on average, and right in {percent(right, 1)} of them"
    )


def _curve(name: str, bins: Sequence[Bin], items: str) -> list[dict[str, Any]]:
    firm = _points(name, [found for found in bins if found.rows >= FEW_ROWS], items)
    faint = _points(name, [found for found in bins if found.rows < FEW_ROWS], items)
    return [firm, faint | {"mode": "markers", "opacity": 0.35}]


def _points(name: str, bins: Sequence[Bin], items: str) -> dict[str, Any]:
    look = ANSWERS[name]
    return {
        "type": "scatter",
        "mode": "lines+markers",
        "name": name,
        "meta": name,
        "x": [tidy(found.confidence) for found in bins],
        "y": [tidy(found.accuracy) for found in bins],
        "customdata": [found.rows for found in bins],
        "line": {"color": look.paint, "width": 2, "dash": look.dash},
        "marker": {"color": look.paint, "symbol": look.symbol, "size": 8},
        "cliponaxis": False,
        "hovertemplate": "%{fullData.name}: %{x:.1%} sure, %{y:.1%} right (%{customdata} "
        f"{items})<extra></extra>",
    }


def _bars(name: str, bins: Sequence[Bin], items: str) -> dict[str, Any]:
    rows = sum(found.rows for found in bins)
    return {
        "type": "bar",
        "name": name,
        "meta": name,
        "yaxis": "y2",
        "x": [tidy((found.low + found.high) / 2) for found in bins],
        "y": [tidy(found.rows / rows) for found in bins],
        "customdata": [[f"{found.low:.0%} to {found.high:.0%}", found.rows] for found in bins],
        "marker": {"color": ANSWERS[name].paint},
        "hovertemplate": "%{fullData.name}, %{customdata[0]} sure: %{customdata[1]} "
        f"{items}, " + "%{y:.1%}<extra></extra>",
    }


def _values(models: dict[str, Sequence[Bin]], items: str) -> Table:
    columns = [Column("Confidence", numeric=False)]
    for name in models:
        columns += [Column(f"{name}: {items}"), Column("sure"), Column("right")]
    bounds = sorted({(found.low, found.high) for bins in models.values() for found in bins})
    looked_up = [{found.low: found for found in bins} for bins in models.values()]
    rows = []
    for low, high in bounds:
        cells = [Cell(f"{low:.0%} to {high:.0%}", low)]
        for found in (bins.get(low) for bins in looked_up):
            cells += _bin_cells(found)
        rows.append(cells)
    return Table("Accuracy by confidence: values", columns, rows)


def _bin_cells(found: Bin | None) -> list[Cell]:
    if found is None:
        return [Cell("0", 0), Cell(percent(None)), Cell(percent(None))]
    return [
        Cell(count(found.rows), found.rows),
        Cell(percent(found.confidence, 1), found.confidence),
        Cell(percent(found.accuracy, 1), found.accuracy),
    ]
