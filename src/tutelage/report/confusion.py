"""What was taken for what: confusion matrices, and the pairs that are confused most."""

from __future__ import annotations

from collections.abc import Sequence

from tutelage.report.analysis import Analysis, Answers, Matrix
from tutelage.report.blocks import Block, Cell, Column, Figure, Figures, Folded, Table
from tutelage.report.format import count, percent
from tutelage.report.heat import FEW, Layer, Names, heat_figure, short_labels
from tutelage.report.lines import tidy

RIGHT, WRONG = "series-0", "series-1"
TOLD = 3
LISTED = 10
"""Pairs in the table beside a confusion of all classes; without that, all that the run kept."""


def confusions(analysis: Analysis) -> list[Block]:
    """The student's, and the teacher's beside it, or folded away where each takes the whole width."""
    drawn = [
        _confusion(who, answers.confusion, analysis.classes, analysis.items)
        for who, answers in (("student", analysis.student), ("teacher", analysis.teacher))
        if answers is not None and answers.confusion is not None
    ]
    if len(drawn) < 2 or len(analysis.classes) <= FEW:
        return [Figures(drawn)] if drawn else []
    return [Figures(drawn[:1]), Folded("The teacher's answers", [Figures(drawn[1:])])]


def _confusion(who: str, confusion: Matrix, classes: Sequence[str], items: str) -> Figure:
    shares = [[cell / (sum(row) or 1) for cell in row] for row in confusion]
    right = [[share if i == j else None for j, share in enumerate(row)] for i, row in enumerate(shares)]
    wrong = [[share if i != j else None for j, share in enumerate(row)] for i, row in enumerate(shares)]
    most = max((share for row in wrong for share in row if share is not None), default=0)
    labels = short_labels(classes)
    total = sum(map(sum, confusion))
    hits = sum(row[i] for i, row in enumerate(confusion))
    told = ", ".join(
        f"{percent(share, 0)} of {name} as {answer}" for share, name, answer in _largest(wrong, classes)
    )
    return heat_figure(
        f"What the {who} answered",
        [Layer(right, RIGHT, 1), Layer(wrong, WRONG, tidy(most) or 1)],
        rows=Names("target", labels),
        columns=Names("answer", labels),
        texts=[[int(cell) or "" for cell in row] for row in confusion],
        hover="%{y} answered as %{x}: %{text} " + items + ", %{z:.1%} of %{y}",
        caption=f"{items.title()} by target and answer. Blue: right, by its share of the target's {items}; orange: "
        f"wrong, up to the most frequent mistake ({percent(most, 1)}).",
        description=f"Heat map, what the {who} answered by target, {len(classes)} classes: {count(hits)} of "
        f"{count(total)} {items} right{'; most often wrong: ' + told if told else ''}.",
    )


def _largest(wrong: Sequence[Sequence[float | None]], classes: Sequence[str]) -> list[tuple[float, str, str]]:
    found = [
        (share, classes[i], classes[j]) for i, row in enumerate(wrong) for j, share in enumerate(row) if share
    ]
    return sorted(found, key=lambda pair: -pair[0])[:TOLD]


def confused_pairs(analysis: Analysis) -> Table:
    """The student's most frequent mistakes, and how often the teacher makes the same."""
    sized, items = analysis.student.confusion is not None, analysis.items
    columns = [*(Column(name, numeric=False) for name in ("Target", "Answer")), Column(items.title())]
    columns += [Column("Of the target", note=f"share of the target's {items}")] if sized else []
    columns += [Column("Teacher", note=f"{items} that the teacher answers so")] if analysis.teacher else []
    rows = []
    for target, answer, wrong in analysis.student.confused[: LISTED if sized else None]:
        cells = [class_cell(analysis.classes[i]) for i in (target, answer)]
        cells.append(Cell(count(wrong), wrong))
        if sized:
            share = wrong / (analysis.sizes[target] or wrong or 1)
            cells.append(Cell(percent(share, 1), share))
        if analysis.teacher:
            cells.append(_same_mistake(analysis.teacher, target, answer))
        rows.append(cells)
    caption = "What the student confuses most often"
    return Table(caption, columns, rows, sortable=True, sorted_by=2, descending=True)


def _same_mistake(teacher: Answers, target: int, answer: int) -> Cell:
    if teacher.confusion is not None:
        found: float | None = teacher.confusion[target][answer]
    else:
        told = {(wrong[0], wrong[1]): wrong[2] for wrong in teacher.confused}
        found = told.get((target, answer))
    return Cell(count(found), found)


def class_cell(label: str) -> Cell:
    return Cell(label, label.lower())
