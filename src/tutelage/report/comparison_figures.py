"""The figures of a comparison, all under one legend."""

from __future__ import annotations

from dataclasses import replace

from tutelage.report.blocks import Block, Figures, Notice, Section, Series, Style
from tutelage.report.charts import Drawn, interval_figure
from tutelage.report.cost_chart import cost_figure
from tutelage.report.curves import Group, group_figure, metric_axis
from tutelage.report.format import in_sentence
from tutelage.report.records import Arm, Comparison


def figures_section(comparison: Comparison, styles: dict[str, Style]) -> Section:
    """Intervals by method, metric against training time, validation curves: of methods that have a finished run."""
    drawn = [_drawn(arm, arm.mean, styles) for arm in comparison.ranked if arm.mean is not None]
    if not drawn:
        return Section("Figures", [Notice("No run has finished, so there is nothing to draw.")])
    metric = comparison.metric
    axis = metric_axis(metric)
    baseline = next((arm for arm in drawn if arm.name == comparison.baseline), None)
    figures = [interval_figure(drawn, metric, axis, comparison.teacher_value, baseline)]
    if any(arm.seconds is not None for arm in drawn):
        figures.append(cost_figure(drawn, metric, axis, higher_is_better=comparison.higher_is_better))
    tuned = [replace(arm, seconds=seconds) for arm in drawn if (seconds := _whole_time(comparison, arm))]
    if tuned:
        figures.append(
            cost_figure(tuned, metric, axis, higher_is_better=comparison.higher_is_better, tuned=True)
        )
    groups = _groups(comparison, styles)
    curves = [figure for name in dict.fromkeys((metric, "loss")) for figure in group_figure(groups, name)]
    legend = [Series(arm.name, arm.name, arm.style) for arm in drawn]
    blocks: list[Block] = [Figures([*figures, *curves], legend)]
    if not curves:
        blocks.append(
            Notice(f"No run logged its {in_sentence(metric)} on validation rows, so there are no curves.")
        )
    return Section("Figures", blocks)


def _drawn(arm: Arm, mean: float, styles: dict[str, Style]) -> Drawn:
    seeds = [(entry.seed, entry.value) for entry in arm.done if entry.value is not None]
    return Drawn(arm.name, styles[arm.name], mean, arm.low, arm.high, seeds, arm.seconds)


def _whole_time(comparison: Comparison, drawn: Drawn) -> float | None:
    """One run of a method and all of its trials; none where it was not tuned."""
    arm = next(arm for arm in comparison.arms if arm.name == drawn.name)
    if arm.seconds is None or arm.tuning_seconds is None:
        return None
    return arm.seconds + arm.tuning_seconds


def _groups(comparison: Comparison, styles: dict[str, Style]) -> list[Group]:
    return [
        (arm.name, styles[arm.name], [entry.run for entry in arm.done if entry.run is not None])
        for arm in comparison.ranked
    ]
