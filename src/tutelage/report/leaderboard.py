"""The leaderboard of a comparison: a row a method, the teacher below."""

from __future__ import annotations

from tutelage.report.blocks import Cell, Column, Style, Table
from tutelage.report.format import (
    ABSENT,
    COSTS,
    duration,
    in_sentence,
    is_share,
    metric_difference,
    metric_label,
    metric_value,
    number,
    p_value,
)
from tutelage.report.records import Arm, Comparison, mapping
from tutelage.report.verdict import Gain, interval

SHORT_ERROR = 80
COST_COLUMNS = (
    Column("Parameters"),
    Column("FLOPs", note="for one row"),
    Column("Latency", note="median for one row"),
)
"""A column for each of `COSTS`, in their order."""


def leaderboard(comparison: Comparison, styles: dict[str, Style]) -> Table:
    """Mean and interval, difference to the baseline, cost and runs by method; ``styles`` mark the names."""
    metric = comparison.metric
    unit = ", in points" if is_share(metric) else ""
    against = f"mean of the differences seed by seed{unit}, with its 95% interval"
    columns = [
        Column("Method", numeric=False),
        Column(metric_label(metric), note="mean over seeds, with its 95% interval (Student's t)"),
        Column(f"Against {comparison.baseline}", note=against),
        Column("p", note=f"paired t-test over seeds, two-sided, {_correction(comparison)}"),
        *COST_COLUMNS,
        *([Column("Tuning", note="time of all its trials")] if _is_tuned(comparison) else []),
        Column("Training", note="mean time of a run"),
        Column("Runs", note="finished of all"),
    ]
    return Table(
        f"Methods by {in_sentence(metric)} on {comparison.split} rows, best first",
        columns,
        [_row(comparison, arm, styles) for arm in comparison.ranked],
        foot=[_teacher_row(comparison)] if comparison.teacher else [],
        sortable=True,
        sorted_by=1,
        descending=comparison.higher_is_better,
    )


def _correction(comparison: Comparison) -> str:
    corrected = comparison.corrected
    if not corrected:
        return "not corrected for the number of methods"
    return f"with Holm's correction for {corrected} method{'' if corrected == 1 else 's'}"


def _is_tuned(comparison: Comparison) -> bool:
    return any(arm.tuning for arm in comparison.arms)


def name_cell(arm: Arm, styles: dict[str, Style], detail: str = "") -> Cell:
    return Cell(arm.name, arm.name.lower(), detail, style=styles.get(arm.name))


def _row(comparison: Comparison, arm: Arm, styles: dict[str, Style]) -> list[Cell]:
    failed = len(arm.failed)
    runs = f"{len(arm.done)} of {max(len(arm.entries), len(comparison.seeds))}"
    return [
        name_cell(arm, styles, "baseline" if arm.name == comparison.baseline else ""),
        _mean_cell(comparison.metric, arm),
        *_difference_cells(comparison, arm),
        *_cost_cells(comparison, arm),
        *([Cell(duration(arm.tuning_seconds), arm.tuning_seconds)] if _is_tuned(comparison) else []),
        Cell(duration(arm.data.get("seconds")), arm.seconds),
        Cell(runs, len(arm.done), f"{failed} failed" if failed else "", "bad" if failed else ""),
    ]


def _mean_cell(metric: str, arm: Arm) -> Cell:
    if arm.failed and not arm.done:
        return Cell("failed", detail=arm.failed[0].error[:SHORT_ERROR], tone="bad")
    if arm.low is None or arm.high is None:
        return Cell(metric_value(metric, arm.data.get("mean")), arm.mean, "no interval" if arm.done else "")
    return Cell(metric_value(metric, arm.mean), arm.mean, interval(metric, arm.low, arm.high, 2))


def _difference_cells(comparison: Comparison, arm: Arm) -> list[Cell]:
    difference = mapping(arm.data.get("difference"))
    mean, low, high = (number(difference.get(key)) for key in ("mean", "low", "high"))
    if mean is None:
        return [Cell(ABSENT), Cell(ABSENT)]
    between = "no interval"
    if low is not None and high is not None:
        between = " to ".join(metric_difference(comparison.metric, value) for value in (low, high))
    gain = Gain.of(arm, higher_is_better=comparison.higher_is_better)
    return [
        Cell(metric_difference(comparison.metric, mean), mean, between, gain.tone),
        Cell(p_value(gain.p), gain.p),
    ]


def _cost_cells(comparison: Comparison, arm: Arm) -> list[Cell]:
    """Size and speed of the method's own students (mean over its runs), else of the comparison's student."""
    students = [mapping(entry.run.result.get("student")) for entry in arm.done if entry.run is not None]
    cells = []
    for key, (_, write) in COSTS.items():
        values = [value for student in students if (value := number(student.get(key))) is not None]
        value = sum(values) / len(values) if values else number(comparison.student.get(key))
        cells.append(Cell(write(value), value))
    return cells


def _teacher_row(comparison: Comparison) -> list[Cell]:
    teacher = comparison.teacher
    return [
        Cell("Teacher", detail=str(teacher.get("model") or "")),
        Cell(metric_value(comparison.metric, comparison.teacher_value)),
        *(Cell(""), Cell("")),
        *(Cell(write(teacher.get(key))) for key, (_, write) in COSTS.items()),
        *[Cell("")] * (3 if _is_tuned(comparison) else 2),
    ]
