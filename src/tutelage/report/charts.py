"""Intervals by method: what a comparison found, at one glance."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tutelage.report.blocks import Figure, Style
from tutelage.report.format import metric_label, metric_value
from tutelage.report.lines import Axis, escape, shorten, tidy

ROW_HEIGHT = 38


@dataclass(frozen=True)
class Drawn:
    """One method of a comparison as figures need it. ``seeds`` are (seed, value) of the finished runs."""

    name: str
    style: Style
    mean: float
    low: float | None
    high: float | None
    seeds: Sequence[tuple[str, float]]
    seconds: float | None


def interval_figure(
    arms: Sequence[Drawn], metric: str, axis: Axis, teacher: float | None, baseline: Drawn | None
) -> Figure:
    """Each method's mean, its interval and its seeds, one method a row, in the order given (first on top)."""
    traces: list[dict[str, Any]] = []
    for row, arm in enumerate(reversed(arms)):
        traces += _interval_row(arm, row, axis)
    shapes, annotations = _reference_lines(arms, metric, teacher, baseline)
    described = "; ".join(
        f"{arm.name} {metric_value(metric, arm.mean)}"
        + (
            f" ({metric_value(metric, arm.low)} to {metric_value(metric, arm.high)})"
            if arm.low is not None
            else ""
        )
        for arm in arms
    )
    names = [escape(shorten(arm.name, 20)) for arm in reversed(arms)]
    return Figure(
        title=f"{metric_label(metric)} by method",
        caption="Large mark: mean over seeds; bar: its 95% interval; small points below: single seeds."
        + (f" Dotted line: mean of {baseline.name}." if baseline is not None else ""),
        description=f"Interval chart of {metric_label(metric)}, mean and 95% interval by method: {described}.",
        traces=traces,
        layout={
            "xaxis": {"tickformat": axis.ticks, "range": _span(arms, teacher)},
            "yaxis": {
                "tickvals": list(range(len(arms))),
                "ticktext": names,
                "range": [-0.7, len(arms) - 0.5],
                "showgrid": False,
                "automargin": True,
            },
            "shapes": shapes,
            "annotations": annotations,
            "margin": {"t": 28},
        },
        height=72 + ROW_HEIGHT * max(len(arms), 3),
        wide=True,
    )


def _interval_row(arm: Drawn, row: int, axis: Axis) -> list[dict[str, Any]]:
    paint = arm.style.paint
    hover = axis.hover.replace("{y", "{x")
    traces: list[dict[str, Any]] = []
    if arm.low is not None and arm.high is not None:
        traces.append(
            {
                "type": "scatter",
                "mode": "lines",
                "meta": arm.name,
                "x": [tidy(arm.low), tidy(arm.high)],
                "y": [row, row],
                "line": {"color": f"{paint} 0.35", "width": 9},
                "hoverinfo": "skip",
            }
        )
    traces.append(
        {
            "type": "scatter",
            "mode": "markers",
            "meta": arm.name,
            "name": escape(arm.name),
            "x": [tidy(value) for _, value in arm.seeds],
            "y": [row - 0.3] * len(arm.seeds),
            "text": [escape(seed) for seed, _ in arm.seeds],
            "marker": {"color": f"{paint} 0.7", "size": 6, "symbol": "circle"},
            "hovertemplate": f"%{{fullData.name}}, seed %{{text}}: {hover}<extra></extra>",
        }
    )
    traces.append(
        {
            "type": "scatter",
            "mode": "markers",
            "meta": arm.name,
            "name": escape(arm.name),
            "x": [tidy(arm.mean)],
            "y": [row],
            "marker": {
                "color": paint,
                "size": 13,
                "symbol": arm.style.symbol,
                "line": {"color": "var(--card)", "width": 1.5},
            },
            "hovertemplate": f"%{{fullData.name}}, mean: {hover}<extra></extra>",
        }
    )
    return traces


def _span(arms: Sequence[Drawn], teacher: float | None) -> tuple[float, float]:
    """The range of the values' axis: all of the arms, and the teacher unless that would squeeze them."""
    drawn = [
        value for arm in arms for value in (arm.mean, arm.low, arm.high, *(value for _, value in arm.seeds))
    ]
    known = [value for value in drawn if value is not None]
    low, high = min(known), max(known)
    reach = 0.6 * (high - low)
    if teacher is not None and low - reach <= teacher <= high + reach:
        low, high = min(low, teacher), max(high, teacher)
    room = 0.05 * (high - low) or 0.02 * abs(high) or 0.01
    return tidy(low - room), tidy(high + room)


def _reference_lines(
    arms: Sequence[Drawn], metric: str, teacher: float | None, baseline: Drawn | None
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The baseline's mean as a thin line; the teacher as a dashed one, or at the margin where it is far off."""
    shapes: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    if baseline is not None:
        shapes.append(_vertical(baseline.mean, "var(--series-neutral) 0.8", "dot"))
    if teacher is None:
        return shapes, annotations
    text = f"teacher {metric_value(metric, teacher, 1)}"
    note = {
        "yref": "paper",
        "y": 1,
        "yanchor": "bottom",
        "showarrow": False,
        "font": {"color": "var(--muted)", "size": 12},
    }
    low, high = _span(arms, teacher)
    if low < teacher < high:
        shapes.append(_vertical(teacher, "var(--ink)", "dash"))
        side = "right" if teacher > (low + high) / 2 else "left"
        annotations.append({**note, "x": tidy(teacher), "xanchor": side, "text": text})
    elif teacher > high:
        annotations.append({**note, "xref": "paper", "x": 1, "xanchor": "right", "text": f"{text} →"})
    else:
        annotations.append({**note, "xref": "paper", "x": 0, "xanchor": "left", "text": f"← {text}"})
    return shapes, annotations


def _vertical(x: float, color: str, dash: str) -> dict[str, Any]:
    return {
        "type": "line",
        "layer": "below",
        "x0": tidy(x),
        "x1": tidy(x),
        "yref": "paper",
        "y0": 0,
        "y1": 1,
        "line": {"color": color, "width": 1.5, "dash": dash},
    }
