"""Several runs side by side."""

from __future__ import annotations

from collections.abc import Sequence

from tutelage.report.blocks import Block, Cell, Column, Figures, Notice, Part, Section, Series, Style, Table
from tutelage.report.curves import DRAWN, group_figure
from tutelage.report.format import (
    duration,
    in_sentence,
    lower_is_better,
    metric_label,
    metric_value,
    milliseconds,
    number,
    si,
)
from tutelage.report.records import Run, mapping
from tutelage.report.run_page import STATUS, run_title
from tutelage.report.styles import styles_for
from tutelage.report.verdict import primary_metric, split_of


def overview_part(runs: Sequence[Run], *, detailed: int) -> Part:
    """A table of all the runs and their validation curves in one figure; ``detailed`` runs have a part of their own."""
    names = run_names(runs)
    styles = styles_for(names)
    metric = next((found for run in runs if (found := primary_metric(run.result))), None)
    blocks: list[Block] = [_table(runs, names, styles, metric)]
    if metric is not None:
        groups = [
            (name, styles[name], [run]) for name, run in zip(names, runs, strict=True) if run.evaluations
        ]
        legend = [Series(name, name, style) for name, style, _ in groups[:DRAWN]]
        figures = group_figure(groups[:DRAWN], metric, caption="One line a run.") if groups else []
        blocks += [Figures(figures, legend)] if figures else []
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
    return [
        f"{name} ({run.folder.resolve().name}, {i + 1})" if name in seen else name
        for i, (name, run) in enumerate(zip(names, runs, strict=True))
    ]


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
    rows = []
    for run, name in zip(runs, names, strict=True):
        student = mapping(run.result.get("student"))
        state, tone = STATUS.get(run.status, (run.status, ""))
        value = mapping(run.result.get(split_of(run.result))).get(str(metric))
        rows.append(
            [
                Cell(name, name.lower(), style=styles[name]),
                Cell(state, state, tone="" if tone == "good" else tone),
                Cell(
                    metric_value(metric or "", value),
                    number(value),
                    f"on {split_of(run.result)} rows" if value is not None else "",
                ),
                Cell(si(student.get("parameters")), number(student.get("parameters"))),
                Cell(si(student.get("flops")), number(student.get("flops"))),
                Cell(milliseconds(student.get("latency_ms")), number(student.get("latency_ms"))),
                Cell(duration(run.result.get("train_seconds")), number(run.result.get("train_seconds"))),
            ]
        )
    label = metric_label(metric) if metric else "Metric"
    columns = [Column("Run", numeric=False), Column("State", numeric=False), Column(label)]
    columns += [Column(name) for name in ("Parameters", "FLOPs", "Latency", "Training")]
    return Table("Runs side by side", columns, rows, sortable=True)
