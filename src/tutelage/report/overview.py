"""Several runs side by side."""

from __future__ import annotations

from collections.abc import Sequence

from tutelage.report.blocks import Block, Cell, Column, Notice, Part, Section, Style, Table
from tutelage.report.differences import differing_options
from tutelage.report.format import (
    ABSENT,
    COSTS,
    duration,
    in_sentence,
    is_share,
    lower_is_better,
    metric_difference,
    metric_label,
    metric_value,
    number,
    split_group,
)
from tutelage.report.leaderboard import COST_COLUMNS
from tutelage.report.overview_figures import run_figures
from tutelage.report.records import Run, mapping
from tutelage.report.run_page import STATUS, run_title
from tutelage.report.styles import styles_for
from tutelage.report.verdict import main_teacher, primary_metric, split_of


def overview_part(runs: Sequence[Run], *, detailed: int) -> Part:
    """A table of all the runs and their validation curves in one figure; ``detailed`` runs have a part of their own."""
    names = run_names(runs)
    styles = styles_for(names)
    metric = next((found for run in runs if (found := primary_metric(run.result))), None)
    blocks: list[Block] = [_table(runs, names, styles, metric)]
    blocks += [
        block
        for block in (
            differing_options(runs, names),
            run_figures([(name, styles[name], [run]) for name, run in zip(names, runs, strict=True)], metric),
            _further_metrics(runs, names, styles, metric),
        )
        if block is not None
    ]
    if len(runs) > detailed:
        blocks.append(
            Notice(
                f"The first {detailed} of {len(runs)} runs follow in full; "
                "`tutelage report FOLDER` writes the report of one of the others."
            )
        )
    done = sum(run.status == "done" for run in runs)
    return Part(
        eyebrow="Overview",
        title=f"{len(runs)} runs",
        verdict=_verdict(runs, names, metric),
        chips=[(f"{done} of {len(runs)} finished", "good" if done == len(runs) else "bad")],
        sections=[Section("Side by side", blocks)],
    )


def run_names(runs: Sequence[Run]) -> list[str]:
    """A name for each run, no two alike: what it did and its seed, else its folder."""
    names = [
        f"{run_title(run)}, seed {run.result['seed']}" if "seed" in run.result else run_title(run)
        for run in runs
    ]
    seen = {name for name in names if names.count(name) > 1}
    told = [
        f"{name} ({run.folder.resolve().name})" if name in seen else name
        for name, run in zip(names, runs, strict=True)
    ]
    return [f"{name} ({i})" if told.count(name) > 1 else name for i, name in enumerate(told, 1)]


def _value(run: Run, metric: str | None) -> float | None:
    return number(mapping(run.result.get(split_of(run.result))).get(str(metric)))


def _verdict(runs: Sequence[Run], names: Sequence[str], metric: str | None) -> str:
    known = [
        (value, name)
        for run, name in zip(runs, names, strict=True)
        if (value := _value(run, metric)) is not None
    ]
    if metric is None or not known:
        return "None of these runs has recorded a metric yet."
    value, name = (min if lower_is_better(metric) else max)(known)
    return (
        f"{name} has the best {in_sentence(metric)}: {metric_value(metric, value, 1)}. Single runs differ by chance "
        "too; `tutelage compare` runs methods over the same seeds and gives intervals."
    )


def _table(runs: Sequence[Run], names: Sequence[str], styles: dict[str, Style], metric: str | None) -> Table:
    measured = {split_of(run.result) for run in runs if _value(run, metric) is not None}
    rows = []
    for run, name in zip(runs, names, strict=True):
        state, tone = STATUS.get(run.status, (run.status, ""))
        student = mapping(run.result.get("student"))
        rows.append(
            [
                Cell(name, name.lower(), style=styles[name]),
                Cell(state, state, tone="" if tone == "good" else tone),
                *_metric_cells(run, metric or "", tell_split=len(measured) > 1),
                *(
                    Cell(write(student.get(key)), number(student.get(key)))
                    for key, (_, write) in COSTS.items()
                ),
                Cell(duration(run.result.get("train_seconds")), number(run.result.get("train_seconds"))),
            ]
        )
    columns = [Column("Run", numeric=False), Column("State", numeric=False)]
    columns += [
        Column(metric_label(metric) if metric else "Metric"),
        Column(
            "Against teacher", note=f"the student minus its teacher{', in points' * is_share(metric or '')}"
        ),
        *COST_COLUMNS,
        Column("Training", note="time that the student was trained"),
    ]
    where = f", metrics on {measured.pop()} rows" if len(measured) == 1 else ""
    return Table(f"Runs side by side{where}", columns, rows, sortable=True)


def _further_metrics(
    runs: Sequence[Run], names: Sequence[str], styles: dict[str, Style], metric: str | None
) -> Table | None:
    """Every other metric over all rows (agreement, loss, …); none where there is no other."""
    values = [mapping(run.result.get(split_of(run.result))) for run in runs]
    found = dict.fromkeys(name for own in values for name in own if split_group(name)[1] is None)
    found.pop(str(metric), None)
    if not found:
        return None
    rows = [
        [
            Cell(name, name.lower(), style=styles[name]),
            *(Cell(metric_value(key, own.get(key)), number(own.get(key))) for key in found),
        ]
        for name, own in zip(names, values, strict=True)
    ]
    columns = [Column("Run", numeric=False), *(Column(metric_label(key)) for key in found)]
    return Table("Further metrics of the runs", columns, rows, sortable=True)


def _metric_cells(run: Run, metric: str, *, tell_split: bool) -> list[Cell]:
    """The student's value, and how far it is from its teacher's."""
    split = split_of(run.result)
    value, reached = mapping(run.result.get(split)).get(metric), _value(run, metric)
    teacher = number(mapping(main_teacher(run.result)[1].get(split)).get(metric))
    detail = f"on {split} rows" if tell_split and reached is not None else ""
    own = Cell(metric_value(metric, value), reached, detail)
    if reached is None or teacher is None:
        return [own, Cell(ABSENT)]
    return [own, Cell(metric_difference(metric, reached - teacher), reached - teacher)]
