"""A comparison's metric against what training cost."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from tutelage.report.blocks import Figure
from tutelage.report.charts import Drawn
from tutelage.report.format import duration, metric_label, metric_value, number
from tutelage.report.lines import Axis, escape, shorten, tidy

LABELLED = 10
"""So many methods get their name beside their point; more would cover each other, and the legend tells them."""
LONGEST_LABEL = 20
PLANE = (440.0, 230.0)
"""Pixels between the axes of a figure of half the page's width, where labels are placed."""


def cost_figure(
    arms: Sequence[Drawn], metric: str, axis: Axis, *, higher_is_better: bool, tuned: bool = False
) -> Figure:
    """Mean of the metric against mean training time, one point a method; ``tuned``: with the time of its trials."""
    placed = [(arm, seconds) for arm in arms if (seconds := number(arm.seconds)) is not None]
    times = [seconds for _, seconds in placed]
    wide_range = bool(times) and min(times) > 0 and max(times) > 10 * min(times)
    described = "; ".join(
        f"{arm.name} {metric_value(metric, arm.mean)} after {duration(s)}" for arm, s in placed
    )
    named = 0 < len(placed) <= LABELLED
    span = _padded(times, wide_range)
    sides = _label_sides(placed, span, wide_range) if named else []
    return Figure(
        title=f"{metric_label(metric)} against training time" + ", tuning included" * tuned,
        caption="Mean over seeds with its 95% interval"
        + ("; time: all trials of the method, and one run" if tuned else "")
        + f"; {'up' if higher_is_better else 'down'} and to the left is better.",
        description=f"Scatter chart of {metric_label(metric)} against mean training time"
        f"{', tuning included' * tuned}: {described}.",
        traces=[_cost_point(arm, s, axis, sides[i] if named else "") for i, (arm, s) in enumerate(placed)],
        layout={
            "xaxis": {
                "title": {"text": f"{'tuning and ' * tuned}training time, seconds"},
                "type": "log" if wide_range else "linear",
                "range": span,
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
        "text": [escape(shorten(arm.name, LONGEST_LABEL))],
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


Box = tuple[float, float, float, float]
"""Left, bottom, right, top, in pixels."""


def _label_sides(placed: Sequence[tuple[Drawn, float]], span: Sequence[float], log: bool) -> list[str]:
    """For each point the side of its label that covers other points, intervals and labels least."""
    lows = [arm.mean if arm.low is None else arm.low for arm, _ in placed]
    highs = [arm.mean if arm.high is None else arm.high for arm, _ in placed]
    bottom, tall = min(lows), (max(highs) - min(lows)) or 1.0
    xs = [((math.log10(s) if log else s) - span[0]) / (span[1] - span[0]) * PLANE[0] for _, s in placed]
    ys, feet, heads = (
        [(y - bottom) / tall * PLANE[1] for y in values]
        for values in ([arm.mean for arm, _ in placed], lows, highs)
    )
    taken: list[Box] = [(x - 8, y - 8, x + 8, y + 8) for x, y in zip(xs, ys, strict=True)]
    taken += [(x - 4, foot, x + 4, head) for x, foot, head in zip(xs, feet, heads, strict=True)]
    sides = []
    for (arm, _), x, y in zip(placed, xs, ys, strict=True):
        boxes = _label_boxes(x, y, 7.0 * min(len(arm.name), LONGEST_LABEL))
        covered = {side: sum(_overlap(box, other) for other in taken) for side, box in boxes.items()}
        side = min(boxes, key=lambda side: covered[side] + _outside(boxes[side]))
        taken.append(boxes[side])
        sides.append(side)
    return sides


def _label_boxes(x: float, y: float, width: float) -> dict[str, Box]:
    return {
        "middle right": (x + 10, y - 8, x + 10 + width, y + 8),
        "middle left": (x - 10 - width, y - 8, x - 10, y + 8),
        "top right": (x + 4, y + 8, x + 4 + width, y + 24),
        "bottom right": (x + 4, y - 24, x + 4 + width, y - 8),
        "top left": (x - 4 - width, y + 8, x - 4, y + 24),
        "bottom left": (x - 4 - width, y - 24, x - 4, y - 8),
    }


def _overlap(a: Box, b: Box) -> float:
    return max(0.0, min(a[2], b[2]) - max(a[0], b[0])) * max(0.0, min(a[3], b[3]) - max(a[1], b[1]))


def _outside(box: Box) -> float:
    return 16 * (max(0.0, -box[0]) + max(0.0, box[2] - PLANE[0]))
