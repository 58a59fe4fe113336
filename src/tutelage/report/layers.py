"""Where the student thinks like its teacher: CKA between their layers, as `tutelage explain` left it."""

from __future__ import annotations

from typing import Any

from tutelage.report.analysis import Matrix, matrix
from tutelage.report.blocks import Cell, Column, Figure, Figures, Section, Table, Text
from tutelage.report.format import count
from tutelage.report.heat import Layer, Names, heat_figure, short_labels
from tutelage.report.lines import tidy
from tutelage.report.records import listed, mapping

CLOSE = "series-0"


def layer_section(explained: dict[str, Any]) -> Section | None:
    """A heat map for each teacher; none where the run was not explained."""
    student = mapping(explained.get("student"))
    ours = [str(name) for name in listed(student.get("layers"))]
    figures = []
    teachers = mapping(explained.get("teachers"))
    for name, content in teachers.items():
        teacher = mapping(content)
        theirs = [str(layer) for layer in listed(teacher.get("layers"))]
        cka = matrix(teacher.get("cka"), len(ours), len(theirs))
        if cka and theirs:
            whose = f"the teacher {name}'s" if len(teachers) > 1 else "the teacher's"
            figures.append(_figure(whose, ours, theirs, cka))
    if not figures:
        return None
    text = (
        f"Each cell compares a layer of the student with one of the teacher on the same {count(explained.get('rows'))} "
        f"{explained.get('split') or 'held-out'} rows by linear CKA: 1 means that the rows lie alike in both, but for "
        "rotation and scale; 0 that they have nothing in common. Few rows in wide layers make it high by chance."
    )
    return Section("Layers of student and teacher", [Text(text), Figures(figures)], short="Layers")


def _figure(whose: str, ours: list[str], theirs: list[str], cka: Matrix) -> Figure:
    closest = [max(range(len(theirs)), key=row.__getitem__) for row in cka]
    told = "; ".join(
        f"{layer} is closest to {theirs[best]} ({row[best]:.2f})"
        for layer, row, best in zip(ours, cka, closest, strict=True)
    )
    low, high = min(map(min, cka)), max(map(max, cka))
    texts = [[f"{value:.2f}" for value in row] for row in cka]
    title = f"The student's layers against {whose}"
    return heat_figure(
        title,
        [Layer(cka, CLOSE, tidy(high), tidy(low) if low < high else 0.0)],
        rows=Names("student", short_labels(ours, end=True)),
        columns=Names("teacher", short_labels(theirs, end=True)),
        texts=texts,
        hover="student %{y}, teacher %{x}: %{z:.3f}",
        caption=f"Colour: from the least alike ({low:.2f}) to the most ({high:.2f}); layers from input to answer.",
        description=f"Heat map of linear CKA, {title[:1].lower()}{title[1:]}: {told}.",
        values=Table(
            f"{title}: values",
            [Column("Student", numeric=False), *map(Column, theirs)],
            [
                [Cell(layer), *(Cell(text, value) for text, value in zip(words, row, strict=True))]
                for layer, words, row in zip(ours, texts, cka, strict=True)
            ],
        ),
    )
