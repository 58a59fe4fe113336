"""Tables that a run's figures fill: student against teacher, values by group, the last evaluation."""

from __future__ import annotations

from typing import Any

from tutelage.report.blocks import Cell, Column, Table
from tutelage.report.format import (
    ABSENT,
    COSTS,
    lower_is_better,
    metric_difference,
    metric_label,
    metric_value,
    number,
    split_group,
    times,
)
from tutelage.report.records import Run, mapping
from tutelage.report.verdict import cost_ratio, main_teacher, split_of


def against_teacher(result: dict[str, Any]) -> Table | None:
    """Metrics over all rows and costs: the student, each teacher, and the student beside its (best) teacher."""
    split = split_of(result)
    values = mapping(result.get(split))
    student = mapping(result.get("student"))
    teachers = {name: mapping(teacher) for name, teacher in mapping(result.get("teachers")).items()}
    main, teacher = main_teacher(result)
    rows = []
    for metric in [name for name in values if split_group(name)[1] is None]:
        rows.append(_metric_row(metric, split, values, teachers, teacher if main is not None else None))
    for key, (label, write) in COSTS.items():
        if student.get(key) is None and all(t.get(key) is None for t in teachers.values()):
            continue
        ratio = cost_ratio(student, teacher, key)
        costs = [
            Cell(write(model.get(key)), number(model.get(key))) for model in (student, *teachers.values())
        ]
        rows.append([Cell(label), *costs, *([_cost_cell(ratio)] if teachers else [])])
    if not rows:
        return None
    named = [Column(f"Teacher ({name})" if len(teachers) > 1 else "Teacher") for name in teachers]
    beside = main if len(teachers) > 1 else "teacher"
    note = f"student minus {beside}, shares in points; for costs, how many times less"
    last = [Column("Difference", note=note)] if teachers else []
    return Table(
        f"{'Student against teacher' if teachers else 'Student'}{f', metrics on {split} rows' if values else ''}",
        [Column("", numeric=False), Column("Student"), *named, *last],
        rows,
    )


def _cost_cell(ratio: float | None) -> Cell:
    """How many times less the student costs than the teacher."""
    if ratio is None:
        return Cell(ABSENT)
    if abs(ratio - 1) < 0.005:
        return Cell("equal", 1.0)
    return Cell(
        f"{times(ratio)} less" if ratio > 1 else f"{times(1 / ratio)} more",
        ratio,
        tone="good" if ratio > 1 else "bad",
    )


def _metric_row(
    metric: str,
    split: str,
    values: dict[str, Any],
    teachers: dict[str, dict[str, Any]],
    main: dict[str, Any] | None,
) -> list[Cell]:
    label = Cell(metric_label(metric))
    cells = [Cell(metric_value(metric, values.get(metric)), number(values.get(metric)))]
    for teacher in teachers.values():
        value = mapping(teacher.get(split)).get(metric)
        cells.append(Cell(metric_value(metric, value), number(value)))
    if main is not None:
        cells.append(_difference_cell(metric, values.get(metric), mapping(main.get(split)).get(metric)))
    return [label, *cells]


def _difference_cell(metric: str, value: object, against: object) -> Cell:
    left, right = number(value), number(against)
    if left is None or right is None:
        return Cell(ABSENT)
    better = (left < right) if lower_is_better(metric) else (left > right)
    return Cell(metric_difference(metric, left - right), left - right, tone="good" if better else "")


def by_group(result: dict[str, Any]) -> Table | None:
    """Metrics by the values of the column that the evaluation was grouped by; none where it was not."""
    values = mapping(result.get(split_of(result)))
    found = [(*split_group(name), value) for name, value in values.items()]
    groups = list(dict.fromkeys(group for _, group, _ in found if group is not None))
    bases = list(dict.fromkeys(base for base, group, _ in found if group is not None))
    if not groups:
        return None
    looked_up = {(base, group): value for base, group, value in found}
    rows = [
        [
            Cell(group, group),
            *(
                Cell(metric_value(base, looked_up.get((base, group))), number(looked_up.get((base, group))))
                for base in bases
            ),
        ]
        for group in groups
    ]
    columns = [Column("Group", numeric=False), *(Column(metric_label(base)) for base in bases)]
    return Table(f"Student by group, on {split_of(result)} rows", columns, rows, sortable=True)


def last_evaluation(run: Run) -> Table | None:
    """The newest metrics that the run logged, for a run that has no result (yet)."""
    if not run.evaluations:
        return None
    row = max(run.evaluations, key=lambda row: row["step"])
    rows = [
        [Cell(metric_label(name)), Cell(metric_value(name, value))]
        for name, value in mapping(row.get("metrics")).items()
    ]
    caption = f"Last evaluation: {row.get('split')} rows at step {row['step']}"
    return Table(caption, [Column("Metric", numeric=False), Column("Student")], rows)
