"""Held-out rows where a model's last feature puts them, one picture a model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from tutelage.report.blocks import Figure, Figures, Section, Series, Style, Text
from tutelage.report.format import count, number, percent
from tutelage.report.lines import escape, shorten, tidy
from tutelage.report.records import listed, mapping
from tutelage.report.styles import styles_for

DRAWN = 8
"""Classes that are told apart; of more, the most frequent."""

Point = tuple[float, float]


def embedding_section(data: Mapping[str, Any], classes: Sequence[str]) -> Section | None:
    """A scatter chart a model; none where nothing was kept."""
    targets = [value for value in listed(data.get("classes")) if isinstance(value, int)]
    if any(not 0 <= target < len(classes) for target in targets):
        return None
    frequent = [target for target, _ in Counter(sorted(targets)).most_common(DRAWN)]
    shown = sorted(frequent)
    styles = dict(zip(shown, styles_for([str(target) for target in shown]).values(), strict=True))
    figures = []
    for name, content in mapping(data.get("models")).items():
        model = mapping(content)
        points = _points(model.get("points"))
        if points and len(points) == len(targets):
            figures.append(_figure(str(name), points, targets, classes, styles, listed(model.get("shares"))))
    if not figures:
        return None
    text = (
        f"The classifier's input for {count(len(targets))} held-out rows, by its first two principal components: the "
        "view in which they are farthest apart. Classes that lie apart here are apart; those that overlap may differ "
        "in another direction."
        + (f" The {DRAWN} most frequent classes." if len(set(targets)) > DRAWN else "")
    )
    legend = [Series(f"class {target}", classes[target], style) for target, style in styles.items()]
    return Section("Embeddings", [Text(text), Figures(figures, legend)])


def _figure(
    name: str,
    points: Sequence[Point],
    targets: Sequence[int],
    classes: Sequence[str],
    styles: Mapping[int, Style],
    shares: Sequence[object],
) -> Figure:
    told = " and ".join(percent(number(share), 0) for share in shares[:2])
    return Figure(
        title=f"Embeddings of the {name}",
        caption=f"One mark a row; the two directions hold {told} of the variance.",
        description=f"Scatter chart of the {name}'s last feature for {len(points)} rows, coloured by class: "
        + ", ".join(classes[target] for target in styles)
        + ".",
        traces=[
            {
                "type": "scatter",
                "mode": "markers",
                "meta": f"class {target}",
                "name": escape(shorten(classes[target], 20)),
                "x": [tidy(x) for (x, _), of in zip(points, targets, strict=True) if of == target],
                "y": [tidy(y) for (_, y), of in zip(points, targets, strict=True) if of == target],
                "marker": {"color": style.paint, "symbol": style.symbol, "size": 6, "opacity": 0.75},
                "hoverinfo": "name",
            }
            for target, style in styles.items()
        ],
        layout={
            "xaxis": {"showticklabels": False, "zeroline": False},
            "yaxis": {"showticklabels": False, "zeroline": False},
        },
        height=340,
    )


def _points(value: object) -> list[Point] | None:
    """None where a point is not two finite numbers."""
    found = []
    for given in listed(value):
        pair = [number(part) for part in listed(given)]
        if len(pair) != 2 or pair[0] is None or pair[1] is None:
            return None
        found.append((pair[0], pair[1]))
    return found
