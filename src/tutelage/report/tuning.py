"""How the options of a comparison's methods were searched: the budget, what was tried, what was chosen."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any

from tutelage.report.blocks import Block, Cell, Column, Figures, Section, Style, Table, Text
from tutelage.report.curves import metric_axis
from tutelage.report.facts import value_text
from tutelage.report.format import (
    count,
    duration,
    in_sentence,
    metric_difference,
    metric_label,
    metric_value,
    number,
    plain,
)
from tutelage.report.leaderboard import name_cell
from tutelage.report.lines import Axis, Line, escape, line_figure, tidy
from tutelage.report.records import Arm, Comparison, listed, mapping, mappings

LONGEST_ERROR = 300
AS_IT_STANDS = "as it stands, trial 0"


@dataclass(frozen=True)
class Trial:
    """One run of a search. ``value`` is none where it failed; trial 0 is the recipe as it stands."""

    number: int
    values: dict[str, Any]
    value: float | None
    error: str


@dataclass(frozen=True)
class Search:
    """One method's trials, in order."""

    arm: Arm
    ranges: dict[str, Any]
    trials: Sequence[Trial]
    chosen: dict[str, Any]

    @classmethod
    def of(cls, arm: Arm) -> Search:
        tuning = arm.tuning
        trials = [
            Trial(i, mapping(trial.get("values")), number(trial.get("value")), str(trial.get("error") or ""))
            for i, trial in enumerate(mappings(tuning.get("trials")))
        ]
        return cls(arm, mapping(tuning.get("ranges")), trials, mapping(tuning.get("chosen")))

    @property
    def scored(self) -> list[tuple[int, float]]:
        return [(trial.number, trial.value) for trial in self.trials if trial.value is not None]


def tuning_section(comparison: Comparison, styles: dict[str, Style]) -> Section | None:
    """None where nothing was tuned."""
    searches = [search for arm in comparison.ranked if (search := Search.of(arm)).trials]
    if not searches:
        return None
    blocks: list[Block] = [Text(_budget(comparison, searches))]
    drawn = [search for search in searches if search.scored]
    if drawn:
        blocks.append(_figure(comparison, drawn, styles))
    blocks += [_outcomes(comparison, searches, styles), _options(searches, styles)]
    if failed := _failures(searches, styles):
        blocks.append(failed)
    return Section("Tuning", blocks)


def _budget(comparison: Comparison, searches: Sequence[Search]) -> str:
    sizes = sorted({len(search.trials) for search in searches})
    told = f"{sizes[0]} trial{'' if sizes == [1] else 's'} each"
    if len(sizes) > 1:
        told = f"{sizes[0]} to {sizes[-1]} trials so far"
    untuned = [arm.name for arm in comparison.arms if not arm.tuning]
    equal = "The budget was the same for every method" if len(sizes) == 1 and not untuned else "The budget"
    seeds = {str(search.arm.tuning.get("seed")) for search in searches}
    apart = ", with a seed that is not compared" if seeds.isdisjoint(comparison.seeds) else ""
    without = f" Without a search: {', '.join(untuned)}." if untuned else ""
    return (
        f"{equal}: {told}, judged by {in_sentence(comparison.metric)} on validation rows{apart}. "
        f"Trial 0 is the recipe as it stands.{without}"
    )


def _figure(comparison: Comparison, searches: Sequence[Search], styles: dict[str, Style]) -> Figures:
    """Each trial's value as a mark, and the best so far as a line."""
    axis = metric_axis(comparison.metric)
    best: Callable[[float, float], float] = max if comparison.higher_is_better else min
    lines, marks = [], []
    for search in searches:
        name = search.arm.name
        x, y = [float(n) for n, _ in search.scored], [tidy(value) for _, value in search.scored]
        lines.append(Line(name, name, styles[name], x, list(accumulate(y, best))))
        marks.append(_marks(search, styles[name], axis))
    drawn = line_figure(
        f"Validation {in_sentence(comparison.metric)} by trial",
        lines,
        axis=axis,
        x_title="trial",
        caption="Mark: one trial; line: the best so far.",
        wide=True,
    )
    stepped = {"mode": "lines", "hovertemplate": None, "hoverinfo": "skip"}
    steps = [trace | stepped | {"line": trace["line"] | {"shape": "hv"}} for trace in drawn.traces]
    return Figures([replace(drawn, traces=[*steps, *marks])])


def _marks(search: Search, style: Style, axis: Axis) -> dict[str, Any]:
    told = [_told(trial.values) for trial in search.trials if trial.value is not None]
    return {
        "type": "scatter",
        "mode": "markers",
        "name": escape(search.arm.name),
        "meta": search.arm.name,
        "x": [n for n, _ in search.scored],
        "y": [tidy(value) for _, value in search.scored],
        "text": [escape(text) for text in told],
        "marker": {"color": style.paint, "symbol": style.symbol, "size": 9},
        "cliponaxis": False,
        "hovertemplate": f"%{{fullData.name}}, trial %{{x}}: {axis.hover}<br>%{{text}}<extra></extra>",
    }


def _told(values: dict[str, Any]) -> str:
    return ", ".join(f"{_short(key)} {value_text(value)}" for key, value in values.items())


def _short(key: str) -> str:
    """``lr`` for ``train.optimizer.lr``."""
    return key.rpartition(".")[2]


def _outcomes(comparison: Comparison, searches: Sequence[Search], styles: dict[str, Style]) -> Table:
    metric = comparison.metric
    best: Callable[[list[float]], float] = max if comparison.higher_is_better else min
    rows = []
    for search in searches:
        values = [value for _, value in search.scored]
        first, found = search.trials[0].value, best(values) if values else None
        gain = found - first if found is not None and first is not None else None
        failed = len(search.trials) - len(values)
        rows.append(
            [
                name_cell(search.arm, styles),
                Cell(metric_value(metric, first), first),
                Cell(metric_value(metric, found), found),
                Cell(metric_difference(metric, gain), gain),
                Cell(
                    count(len(search.trials)),
                    len(search.trials),
                    f"{failed} failed" if failed else "",
                    "bad" if failed else "",
                ),
                Cell(duration(search.arm.tuning_seconds), search.arm.tuning_seconds),
            ]
        )
    columns = [
        Column("Method", numeric=False),
        Column("Recipe", note=AS_IT_STANDS),
        Column("Best trial"),
        Column("Difference"),
        Column("Trials"),
        Column("Time", note="of training in all trials together"),
    ]
    return Table(
        f"{metric_label(metric)} on validation rows, before and after tuning", columns, rows, sortable=True
    )


def _options(searches: Sequence[Search], styles: dict[str, Style]) -> Table:
    """A row for each option that was searched, method after method."""
    rows = []
    for search in searches:
        for key in search.ranges:
            bounds = [number(bound) for bound in listed(search.ranges[key])]
            value, start = search.chosen.get(key), search.trials[0].values.get(key)
            rows.append(
                [
                    name_cell(search.arm, styles),
                    Cell(key.removeprefix("method."), key),
                    Cell(" to ".join(map(plain, bounds)), bounds[0] if bounds else None),
                    Cell(plain(start), number(start)),
                    Cell(plain(value), number(value)),
                ]
            )
    columns = [
        Column("Method", numeric=False),
        Column("Option", numeric=False),
        Column("Range"),
        Column("Recipe", note=AS_IT_STANDS),
        Column("Chosen"),
    ]
    return Table("What was searched, and what was chosen", columns, rows, sortable=True)


def _failures(searches: Sequence[Search], styles: dict[str, Style]) -> Table | None:
    rows = [
        [name_cell(search.arm, styles), Cell(str(trial.number)), Cell(trial.error[:LONGEST_ERROR])]
        for search in searches
        for trial in search.trials
        if trial.value is None
    ]
    columns = [Column("Method", numeric=False), Column("Trial"), Column("Error", numeric=False)]
    return Table("Failed trials", columns, rows) if rows else None
