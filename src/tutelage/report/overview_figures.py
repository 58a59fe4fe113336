"""The curves of several runs, one line a run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from tutelage.report.blocks import Figure, Figures, Series
from tutelage.report.curves import DRAWN, Group, group_figure
from tutelage.report.format import plain
from tutelage.report.lines import Axis, Line, at, collect, is_curve, line_figure
from tutelage.report.records import mapping

ONE_LINE = "One line a run."


def run_figures(groups: Sequence[Group], metric: str | None) -> Figures | None:
    """Validation metric, loss and agreement, the training loss, and each of its terms that several runs have.

    None where there is nothing to draw. The first ``DRAWN`` runs only.
    """
    groups = groups[:DRAWN]
    metrics = [name for name in (metric, "loss", "agreement") if name]
    figures = [
        figure for name in dict.fromkeys(metrics) for figure in group_figure(groups, name, caption=ONE_LINE)
    ]
    figures += _by_step(groups, "Training loss", at("loss"))
    for term in _shared_terms(groups):
        figures += _by_step(groups, f"Term {term}", at("terms", term))
    legend = [Series(name, name, style) for name, style, _ in groups]
    return Figures(figures, legend) if figures else None


def _shared_terms(groups: Sequence[Group]) -> list[str]:
    """Terms of at least two runs, where any of these has more than one: a lone term is the loss itself."""
    terms = [
        list(dict.fromkeys(term for run in runs for row in run.train for term in mapping(row.get("terms"))))
        for _, _, runs in groups
    ]
    every = dict.fromkeys(term for own in terms for term in own)
    return [
        term
        for term in every
        if sum(term in own for own in terms) > 1 and any(len(own) > 1 for own in terms if term in own)
    ]


def _by_step(groups: Sequence[Group], title: str, value: Callable[[dict[str, Any]], object]) -> list[Figure]:
    lines = [
        Line(name, name, style, *collect([row for run in runs for row in run.train], "step", value))
        for name, style, runs in groups
    ]
    if not is_curve(lines):
        return []
    return [line_figure(title, lines, axis=Axis(plain), x_title="step", caption=ONE_LINE, own_legend=False)]
