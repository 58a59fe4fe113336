"""Right and wrong by class: confusions, and each class's recall and agreement with the teacher."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tutelage.report.analysis import Analysis
from tutelage.report.blocks import Block, Cell, Column, Figure, Figures, Section, Series, Table
from tutelage.report.confusion import class_cell, confused_pairs, confusions
from tutelage.report.format import ABSENT, count, number, percent, points
from tutelage.report.heat import short_labels
from tutelage.report.lines import escape
from tutelage.report.styles import ANSWERS

DRAWN = 50
"""Classes in one figure; of more the table lists ``LISTED_CLASSES``."""
LISTED_CLASSES = 20


def class_section(analysis: Analysis) -> Section:
    """Confusion matrices where the run kept them, the pairs that are confused most, and each class's recall."""
    blocks: list[Block] = confusions(analysis)
    if analysis.student.confused:
        blocks.append(confused_pairs(analysis))
    blocks += _recall(analysis)
    title = f"Right and wrong by class, on {count(analysis.rows)} {analysis.split} {analysis.items}"
    return Section(title, blocks, short="Classes")


def _recall(analysis: Analysis) -> list[Block]:
    lines: dict[str, Sequence[float | None]] = {"Student": analysis.student.recall}
    if analysis.teacher is not None:
        lines |= {"Teacher": analysis.teacher.recall, "Agreement": analysis.agreement}
    table = _by_class(analysis)
    if len(analysis.classes) > DRAWN:
        return [table]
    labels = [escape(label) for label in short_labels(analysis.classes)]
    named = zip(analysis.student.recall, analysis.classes, strict=True)
    known = sorted((share, name) for share, name in named if share is not None)
    if not known:
        return []
    (low, lowest), (high, highest) = known[0], known[-1]
    drawn = Figure(
        title="Recall by class" + (", and agreement with the teacher" if analysis.teacher else ""),
        caption=f"Recall: share of a class's {analysis.items} that are answered right."
        + (" Agreement: share on which both answer alike, right or wrong." if analysis.teacher else ""),
        description=f"Dot chart of recall by class: the student's goes from {percent(low, 0)} ({lowest}) to "
        f"{percent(high, 0)} ({highest}); every value is in the table.",
        traces=[_dots(name, labels, shares) for name, shares in lines.items()],
        layout={
            "xaxis": {"type": "category", "range": [-0.5, len(labels) - 0.5], "showgrid": False},
            "yaxis": {"tickformat": ".0%"},
        },
        series=[Series(name, name, ANSWERS[name]) for name in lines] if len(lines) > 1 else (),
        values=table,
        wide=True,
    )
    return [Figures([drawn])]


def _dots(name: str, labels: Sequence[str], shares: Sequence[float | None]) -> dict[str, Any]:
    look = ANSWERS[name]
    return {
        "type": "scatter",
        "mode": "markers",
        "name": name,
        "meta": name,
        "x": list(labels),
        "y": list(shares),
        "marker": {"color": look.paint, "symbol": look.symbol, "size": 9},
        "cliponaxis": False,
        "hovertemplate": "%{fullData.name}, %{x}: %{y:.1%}<extra></extra>",
    }


def _by_class(analysis: Analysis) -> Table:
    """Classes that fall behind the teacher most (or, without one, that are recalled least) first."""
    sized = analysis.student.confusion is not None
    columns = [
        Column("Class", numeric=False),
        *([Column(analysis.items.title())] if sized else []),
        Column("Student"),
    ]
    if analysis.teacher:
        columns += [Column("Teacher"), Column("Difference", note="in points"), Column("Agreement")]
    by = [column.label for column in columns].index("Difference" if analysis.teacher else "Student")
    rows = [_class_row(analysis, i, sized=sized) for i in range(len(analysis.classes))]
    rows.sort(key=lambda cells: (cells[by].sort is None, number(cells[by].sort) or 0.0))
    kept = rows if len(rows) <= DRAWN else rows[:LISTED_CLASSES]
    cut = f": {len(kept)} of {count(len(rows))} classes" if len(kept) < len(rows) else ""
    order = "farthest behind the teacher first" if analysis.teacher else "lowest first"
    caption = f"Recall by class, {order}{cut}"
    return Table(caption, columns, kept, sortable=True, sorted_by=by, descending=False)


def _class_row(analysis: Analysis, i: int, *, sized: bool) -> list[Cell]:
    own, size = analysis.student.recall[i], analysis.sizes[i]
    cells = [class_cell(analysis.classes[i]), *([Cell(count(size), size)] if sized else [])]
    cells.append(Cell(percent(own, 1), own))
    if analysis.teacher:
        theirs, same = analysis.teacher.recall[i], analysis.agreement[i]
        behind = own - theirs if own is not None and theirs is not None else None
        cells += [Cell(percent(theirs, 1), theirs), _gap(behind), Cell(percent(same, 1), same)]
    return cells


def _gap(behind: float | None) -> Cell:
    return (
        Cell(ABSENT) if behind is None else Cell(points(behind, 1), behind, tone="good" if behind > 0 else "")
    )
