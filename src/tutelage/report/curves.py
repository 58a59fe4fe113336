"""The training curves of one run, of a procedure's stages, and of groups of runs side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from tutelage.report.blocks import Block, Figure, Figures, Notice, Section, Series, Style
from tutelage.report.format import in_sentence, is_share, metric_value, number, plain, split_group
from tutelage.report.lines import MAX_POINTS, Axis, Line, at, collect, is_curve, line_figure, tidy
from tutelage.report.records import Run, mapping
from tutelage.report.styles import styles_for

DRAWN = 24
"""Stages (or runs) in one figure; more would be a thicket."""
OVER_SEEDS = "Line: mean over seeds; band: from the lowest to the highest seed."

Group = tuple[str, Style, Sequence[Run]]
"""Runs that are one line together: name, look, runs."""


def metric_axis(metric: str) -> Axis:
    return Axis(partial(metric_value, metric), ".1~%" if is_share(metric) else "")


def run_curves(run: Run) -> Section:
    """Every curve that a run logged; what it did not log is said."""
    figures = [
        *_loss_figure(run),
        *_evaluation_figures(run),
        *_rate_figure(run),
        *_plain_figure(run, "grad_norm", "Gradient norm", "Norm of all gradients before clipping."),
        *_plain_figure(run, "samples_per_second", "Speed", "Training rows a second."),
    ]
    blocks: list[Block] = [Figures(figures)] if figures else []
    if run.stages:
        blocks.append(stage_figures(run))
    if not run.train and not run.stages:
        blocks.append(Notice("No training steps were logged, so there are no loss curves."))
    if run.train and not figures:
        blocks.append(Notice("One training step was logged, which makes no curve."))
    if not run.evaluations and not run.stages:
        blocks.append(Notice("No evaluations were logged, so there are no metric curves."))
    lost = sum(_not_finite(logged.train) for logged in (run, *run.stages.values()))
    if lost:
        text = (
            f"{lost} logged training values are not finite (NaN or infinite) and are left out of the curves."
        )
        blocks.append(Notice(text, "bad"))
    return Section("Training curves", blocks, short="Curves")


def _loss_figure(run: Run) -> list[Figure]:
    """The total loss and each of its terms (one term alone is the total)."""
    terms = list(dict.fromkeys(name for row in run.train for name in mapping(row.get("terms"))))
    styles = styles_for(terms)
    lines = [
        Line(f"term {name}", name, styles[name], *collect(run.train, "step", at("terms", name)))
        for name in terms
    ]
    if len(terms) != 1:
        total = collect(run.train, "step", at("loss"))
        lines.insert(0, Line("total", "total", Style("series-total"), *total))
    width = -(-len(run.train) // MAX_POINTS)
    caption = f"Each point is the mean of {width} logged steps." if width > 1 else "Every logged step."
    title = "Training loss and its terms" if len(terms) > 1 else "Training loss"
    return _by_step(title, lines, Axis(plain), caption)


def _evaluation_figures(run: Run) -> list[Figure]:
    """A figure a metric, and one more where values by group were logged: validation rows, after each evaluation."""
    rows = [row for row in run.evaluations if row.get("split") == "validation"]
    names = list(dict.fromkeys(name for row in rows for name in mapping(row.get("metrics"))))
    figures = []
    for base in dict.fromkeys(split_group(name)[0] for name in names):
        groups = [name for name in names if split_group(name)[0] == base and name != base]
        if base in names:
            figures += _metric_figure(on_validation(base), base, rows, {base: base})
        if groups:
            labels = {name: str(split_group(name)[1]) for name in groups}
            figures += _metric_figure(f"{on_validation(base)} by group", base, rows, labels)
    return figures


def _metric_figure(
    title: str, base: str, rows: Sequence[dict[str, Any]], labels: Mapping[str, str]
) -> list[Figure]:
    styles = styles_for(list(labels))
    lines = [
        Line(name, label, styles[name], *collect(rows, "step", at("metrics", name)), markers=True)
        for name, label in labels.items()
    ]
    return _by_step(title, lines, metric_axis(base), "Measured at each evaluation.")


def on_validation(metric: str) -> str:
    return f"Validation {in_sentence(metric)}"


def _rate_figure(run: Run) -> list[Figure]:
    names = list(dict.fromkeys(name for row in run.train for name in mapping(row.get("lr"))))
    styles = styles_for(names)
    lines = [
        Line(f"rate {name}", name, styles[name], *collect(run.train, "step", at("lr", name)))
        for name in names
    ]
    caption = "Of each optimiser." if len(names) > 1 else "As the schedule set it."
    return _by_step("Learning rate", lines, Axis(plain), caption)


def _plain_figure(run: Run, key: str, title: str, caption: str) -> list[Figure]:
    line = Line(key, title, styles_for([key])[key], *collect(run.train, "step", at(key)))
    return _by_step(title, [line], Axis(plain), caption)


def _by_step(title: str, lines: Sequence[Line], axis: Axis, caption: str) -> list[Figure]:
    if not is_curve(lines):
        return []
    return [line_figure(title, lines, axis=axis, x_title="step", caption=caption)]


def _not_finite(rows: Sequence[Mapping[str, Any]]) -> int:
    values = [v for row in rows for v in (row.get("loss"), *mapping(row.get("terms")).values())]
    return sum(value is not None and number(value) is None for value in values)


def stage_figures(run: Run) -> Figures:
    """Loss and validation metrics of a procedure, one line a stage."""
    stages = dict(list(run.stages.items())[:DRAWN])
    styles = styles_for(list(stages))
    loss = [
        Line(name, name, styles[name], *collect(stage.train, "step", at("loss")))
        for name, stage in stages.items()
    ]
    title = "Training loss by stage" + (f" (the first {DRAWN})" if len(run.stages) > DRAWN else "")
    caption = "Steps count from the start of each stage."
    figures = []
    if is_curve(loss):
        figures.append(
            line_figure(title, loss, axis=Axis(plain), x_title="step", caption=caption, own_legend=False)
        )
    groups: list[Group] = [(name, styles[name], [stage]) for name, stage in stages.items()]
    rows = [row for stage in stages.values() for row in stage.evaluations]
    for metric in dict.fromkeys(name for row in rows for name in mapping(row.get("metrics"))):
        if split_group(metric)[1] is None:
            figures += group_figure(groups, metric, caption="One line a stage.")
    return Figures(figures, legend=[Series(name, name, style) for name, style in styles.items()])


def group_figure(groups: Sequence[Group], metric: str, *, caption: str = OVER_SEEDS) -> list[Figure]:
    """Validation values of one metric by epoch: each group's mean over its runs, and a band from lowest to highest.

    By step where a run logged no epochs. Nothing where no run logged the metric more than once.
    """
    rows = [row for _, _, runs in groups for run in runs for row in run.evaluations]
    unit = "epoch" if all(number(row.get("epoch")) is not None for row in rows) else "step"
    lines = [_group_line(name, style, runs, metric, unit) for name, style, runs in groups]
    if not is_curve(lines):
        return []
    axis = metric_axis(metric)
    return [
        line_figure(on_validation(metric), lines, axis=axis, x_title=unit, caption=caption, own_legend=False)
    ]


def _group_line(name: str, style: Style, runs: Sequence[Run], metric: str, unit: str) -> Line:
    """Only where every run of the group has a value, so that the mean is always over the same runs."""
    series = []
    for run in runs:
        rows = [row for row in run.evaluations if row.get("split") == "validation"]
        x, y = collect(rows, unit, at("metrics", metric))
        if x:
            series.append(dict(zip(x, y, strict=True)))
    shared = sorted(set.intersection(*map(set, series))) if series else []
    values = [[points[x] for points in series] for x in shared]
    means = [tidy(sum(v) / len(v)) for v in values]
    if len(series) < 2:
        return Line(name, name, style, shared, means, markers=True)
    return Line(
        name, name, style, shared, means, [min(v) for v in values], [max(v) for v in values], markers=True
    )
