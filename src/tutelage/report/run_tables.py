"""Further tables of a comparison: other metrics, values by seed, failed runs."""

from __future__ import annotations

from tutelage.report.blocks import Cell, Column, Style, Table
from tutelage.report.format import ABSENT, metric_label, metric_value, number
from tutelage.report.leaderboard import name_cell
from tutelage.report.records import Arm, Comparison, Entry, mapping

LONGEST_ERROR = 300


def further_metrics(comparison: Comparison, styles: dict[str, Style]) -> Table | None:
    """Every other metric that the runs recorded: its mean over the finished runs; none where there is no other."""
    found = dict.fromkeys(
        name
        for arm in comparison.arms
        for entry in arm.done
        for name in mapping(entry.data.get("metrics"))
        if name != comparison.metric
    )
    if not found:
        return None
    rows = []
    for arm in comparison.ranked:
        means = {metric: _mean(arm, metric) for metric in found}
        rows.append(
            [name_cell(arm, styles), *(Cell(metric_value(name, mean), mean) for name, mean in means.items())]
        )
    columns = [Column("Method", numeric=False), *(Column(metric_label(metric)) for metric in found)]
    caption = f"Further metrics on {comparison.split} rows, means over finished runs"
    return Table(caption, columns, rows, sortable=True)


def _mean(arm: Arm, metric: str) -> float | None:
    """Over all finished runs; none where one of them lacks it."""
    values = [number(mapping(entry.data.get("metrics")).get(metric)) for entry in arm.done]
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known and len(known) == len(values) else None


def by_seed(comparison: Comparison, styles: dict[str, Style]) -> Table:
    """The metric of every single run: a row a method, a column a seed."""
    rows = []
    for arm in comparison.ranked:
        entries = {entry.seed: entry for entry in arm.entries}
        cells = [_seed_cell(entries.get(seed), comparison.metric) for seed in comparison.seeds]
        rows.append([name_cell(arm, styles), *cells])
    columns = [Column("Method", numeric=False), *(Column(f"Seed {seed}") for seed in comparison.seeds)]
    return Table(f"{metric_label(comparison.metric)} by seed", columns, rows, sortable=True)


def _seed_cell(entry: Entry | None, metric: str) -> Cell:
    if entry is None:
        return Cell(ABSENT, tone="quiet")
    if entry.status != "done":
        return Cell(entry.status, tone="bad" if entry.status == "failed" else "quiet")
    return Cell(metric_value(metric, entry.data.get("value")), entry.value)


def failures(comparison: Comparison) -> Table | None:
    """Every failed run with its error; none where none failed."""
    rows = [
        [Cell(arm.name), Cell(entry.seed), Cell(entry.error[:LONGEST_ERROR])]
        for arm in comparison.arms
        for entry in arm.failed
    ]
    if not rows:
        return None
    columns = [Column("Method", numeric=False), Column("Seed"), Column("Error", numeric=False)]
    return Table("Failed runs", columns, rows)
