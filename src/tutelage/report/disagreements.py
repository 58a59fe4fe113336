"""Rows on which student and teacher disagree: the pictures or texts themselves, where rows are such."""

from __future__ import annotations

import re
from collections.abc import Sequence

from tutelage.report.analysis import Analysis, Example, Said
from tutelage.report.blocks import Block, Cell, Column, Picture, Pictures, Section, Table, Text, Tone
from tutelage.report.format import count, percent

PNG = re.compile(r"data:image/png;base64,[A-Za-z0-9+/=]+")
"""The only pictures that are shown."""


def disagreement_section(analysis: Analysis, room: int) -> Section | None:
    """Examples with their pictures, as many as ``room`` bytes hold; the others in a table, with their texts. None
    without examples."""
    if not analysis.examples:
        return None
    shown: list[Example] = []
    for example in analysis.examples:
        if PNG.fullmatch(example.picture) and len(example.picture) <= room:
            room -= len(example.picture)
            shown.append(example)
    others = [example for example in analysis.examples if example not in shown]
    text = (
        f"Of the {analysis.split} {analysis.items} that the two answer differently, those on which both are surest. "
        "Many that the student alone has wrong: it has not learned them yet; many that the teacher has wrong, "
        f"or neither: ambiguous {analysis.items}, or wrong labels."
    )
    blocks: list[Block] = [Text(text)]
    blocks += [Pictures([_picture(example, analysis.classes) for example in shown])] if shown else []
    blocks += [_table(others, analysis, bool(shown))] if others else []
    return Section("Where student and teacher disagree", blocks, short="Disagreements")


def _picture(example: Example, classes: Sequence[str]) -> Picture:
    target = classes[example.target]
    return Picture(
        source=example.picture,
        description=f"Row {example.row}, whose target is {target}",
        facts=[
            ("Target", Cell(target)),
            ("Student", _answer(example.student, example.target, classes)),
            ("Teacher", _answer(example.teacher, example.target, classes)),
        ],
    )


def _answer(said: Said, target: int, classes: Sequence[str]) -> Cell:
    tone: Tone = "good" if said.answer == target else "bad"
    judged = "right" if said.answer == target else "wrong"
    return Cell(classes[said.answer], detail=f"{judged}, {percent(said.confidence, 0)} sure", tone=tone)


def _table(others: Sequence[Example], analysis: Analysis, further: bool) -> Table:
    classes, texts = analysis.classes, any(example.text for example in others)
    columns = [Column("Row"), *([Column("Text", numeric=False)] if texts else [])]
    columns += [Column(name, numeric=False) for name in ("Target", "Student", "Teacher")]
    rows = []
    for example in others:
        answers = [_answer(said, example.target, classes) for said in (example.student, example.teacher)]
        sortable = [Cell(cell.text, cell.text.lower(), cell.detail, cell.tone) for cell in answers]
        target = Cell(classes[example.target], classes[example.target].lower())
        text = [Cell(example.text, example.text.lower())] if texts else []
        rows.append([Cell(count(example.row), example.row), *text, target, *sortable])
    caption = f"{analysis.items.title()} that the two answer differently"
    return Table("Further rows, without their pictures" if further else caption, columns, rows, sortable=True)
