"""The two figures of a comparison that are no curves: intervals by method, and metric against training time."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tutelage.report.blocks import Figure, Style
from tutelage.report.format import duration, metric_label, metric_value, number
from tutelage.report.lines import Axis, escape, shorten, tidy

ROW_HEIGHT = 38
LABELLED = 10
"""So many methods get their name beside their point; more would cover each other, and the legend tells them."""


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
        annotations.append({**note, "x": tidy(teacher), "xanchor": "center", "text": text})
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


def cost_figure(arms: Sequence[Drawn], metric: str, axis: Axis, *, higher_is_better: bool) -> Figure:
    """Mean of the metric against mean training time, one point a method."""
    placed = [(arm, seconds) for arm in arms if (seconds := number(arm.seconds)) is not None]
    times = [seconds for _, seconds in placed]
    wide_range = bool(times) and min(times) > 0 and max(times) > 10 * min(times)
    described = "; ".join(
        f"{arm.name} {metric_value(metric, arm.mean)} after {duration(s)}" for arm, s in placed
    )
    named = len(placed) <= LABELLED
    sides = _label_sides([(s, arm.mean, arm.name) for arm, s in placed]) if named else []
    return Figure(
        title=f"{metric_label(metric)} against training time",
        caption="Mean over seeds with its 95% interval; "
        f"{'up' if higher_is_better else 'down'} and to the left is better.",
        description=f"Scatter chart of {metric_label(metric)} against mean training time: {described}.",
        traces=[_cost_point(arm, s, axis, sides[i] if named else "") for i, (arm, s) in enumerate(placed)],
        layout={
            "xaxis": {
                "title": {"text": "training time, seconds"},
                "type": "log" if wide_range else "linear",
                "range": _padded(times, wide_range),
            },
            "yaxis": {"tickformat": axis.ticks},
        },
        height=300,
    )


def _padded(values: Sequence[float], log: bool) -> list[float]:
    """An axis range with room for labels on both sides (in powers of ten on a log axis)."""
    if not values:
        return [0.0, 1.0]
    low, high = (math.log10(f(values)) if log else f(values) for f in (min, max))
    room = 0.18 * (high - low) or 0.1 * abs(high) or 0.1
    return [tidy(low - room), tidy(high + room)]


def _cost_point(arm: Drawn, seconds: float, axis: Axis, side: str) -> dict[str, Any]:
    interval = arm.low is not None and arm.high is not None
    return {
        "type": "scatter",
        "mode": "markers+text" if side else "markers",
        "meta": arm.name,
        "name": escape(arm.name),
        "x": [tidy(seconds)],
        "y": [tidy(arm.mean)],
        "text": [escape(shorten(arm.name, 20))],
        "textposition": side or "top center",
        "textfont": {"color": "var(--ink)", "size": 12},
        "cliponaxis": False,
        "error_y": {
            "visible": interval,
            "type": "data",
            "symmetric": False,
            "array": [tidy((arm.high or 0) - arm.mean)] if interval else [],
            "arrayminus": [tidy(arm.mean - (arm.low or 0))] if interval else [],
            "color": f"{arm.style.paint} 0.5",
            "thickness": 1.5,
            "width": 4,
        },
        "marker": {"color": arm.style.paint, "size": 12, "symbol": arm.style.symbol},
        "hovertemplate": f"%{{fullData.name}}: {axis.hover} after %{{x:.3~g}} s<extra></extra>",
    }


def _label_sides(points: Sequence[tuple[float, float, str]]) -> list[str]:
    """For each point the side of its label that covers other points and labels least (on a plane of 460 by 230 px)."""
    xs, ys = [p[0] for p in points], [p[1] for p in points]
    x_span, y_span = (max(xs) - min(xs)) or 1.0, (max(ys) - min(ys)) or 1.0
    spots = [((x - min(xs)) / x_span * 460, (y - min(ys)) / y_span * 230) for x, y, _ in points]
    taken = [(x - 8, y - 8, x + 8, y + 8) for x, y in spots]
    sides = []
    for (x, y), (_, _, name) in zip(spots, points, strict=True):
        width = 7.0 * min(len(name), 20)
        boxes = {
            "middle right": (x + 10, y - 8, x + 10 + width, y + 8),
            "middle left": (x - 10 - width, y - 8, x - 10, y + 8),
            "top right": (x + 4, y + 8, x + 4 + width, y + 24),
            "bottom right": (x + 4, y - 24, x + 4 + width, y - 8),
            "top left": (x - 4 - width, y + 8, x - 4, y + 24),
            "bottom left": (x - 4 - width, y - 24, x - 4, y - 8),
        }
        side = min(
            boxes,
            key=lambda name: sum(_overlap(boxes[name], other) for other in taken) + _outside(boxes[name]),
        )
        taken.append(boxes[side])
        sides.append(side)
    return sides


Box = tuple[float, float, float, float]


def _overlap(a: Box, b: Box) -> float:
    return max(0.0, min(a[2], b[2]) - max(a[0], b[0])) * max(0.0, min(a[3], b[3]) - max(a[1], b[1]))


def _outside(box: Box) -> float:
    return 16 * (max(0.0, -30 - box[0]) + max(0.0, box[2] - 490))
