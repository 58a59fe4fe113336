"""One look per method (or run, or line): given out once a page, used in every figure, table and legend of it."""

from __future__ import annotations

from collections.abc import Sequence

from tutelage.report.blocks import Style

COLORS = 8
DASHES = ("solid", "dash", "dot", "dashdot", "longdash")
NEUTRAL = Style("series-neutral", "circle", "dash")
"""The baseline's look, so that it never competes with a method for attention."""

ANSWERS = {
    "Student": Style("series-0"),
    "Teacher": Style("series-neutral", "diamond", "dash"),
    "Agreement": Style("series-2", "triangle-up", "dot"),
}
"""Looks of what is told of single answers."""

MARKERS = {
    "circle": "M6 2a4 4 0 1 0 0 8a4 4 0 1 0 0-8z",
    "square": "M2.5 2.5h7v7h-7z",
    "diamond": "M6 1l5 5-5 5-5-5z",
    "triangle-up": "M6 1.5l4.8 8.5H1.2z",
    "cross": "M4.5 1.5h3v3h3v3h-3v3h-3v-3h-3v-3h3z",
    "triangle-down": "M6 10.5L1.2 2h9.6z",
    "star": "M6 .8l1.5 3.4 3.7.4-2.8 2.5.8 3.7L6 8.9l-3.2 1.9.8-3.7L.8 4.6l3.7-.4z",
}
"""Outline of each marker in a box of 12 by 12, for legends; the names are plotly's."""

STROKES = {"solid": "", "dash": "5 3", "dot": "1.5 2.5", "dashdot": "5 2 1.5 2", "longdash": "8 3"}
"""Dash patterns of legends, by plotly's names."""


def styles_for(names: Sequence[str], neutral: str | None = None) -> dict[str, Style]:
    """A look for each name, in order. Colour and marker change together, so that no look is told by colour alone."""
    markers = tuple(MARKERS)
    styles = {}
    for name in dict.fromkeys(names):
        if name == neutral:
            styles[name] = NEUTRAL
            continue
        i = len(styles) - (neutral in styles)
        round_ = i // COLORS
        styles[name] = Style(
            f"series-{i % COLORS}", markers[(i + round_) % len(markers)], DASHES[round_ % len(DASHES)]
        )
    return styles
