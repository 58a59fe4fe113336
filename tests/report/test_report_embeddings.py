"""Embeddings in the report: a picture a model, and nothing where the file is odd."""

from __future__ import annotations

from typing import Any

import pytest

from tutelage.report.blocks import Figures
from tutelage.report.embedding import DRAWN, embedding_section


def data(classes: int = 3, rows: int = 9) -> dict[str, Any]:
    points = [[float(i), -float(i)] for i in range(rows)]
    model = {"points": points, "shares": [0.5, 0.25]}
    return {"classes": [i % classes for i in range(rows)], "models": {"student": model, "teacher": model}}


def figures(found: dict[str, Any], classes: int) -> Figures:
    section = embedding_section(found, [f"<b>{i}" for i in range(classes)])
    assert section is not None
    assert isinstance(section.blocks[1], Figures)
    return section.blocks[1]


def test_a_trace_a_class_and_a_picture_a_model() -> None:
    drawn = figures(data(), 3)
    assert [figure.title for figure in drawn.figures] == [
        "Embeddings of the student",
        "Embeddings of the teacher",
    ]
    traces = drawn.figures[0].traces
    assert [trace["x"] for trace in traces] == [[0, 3, 6], [1, 4, 7], [2, 5, 8]]
    assert [series.key for series in drawn.legend] == [trace["meta"] for trace in traces]
    assert traces[0]["name"] == "&lt;b&gt;0", "plotly reads tags in names"
    assert "50% and 25%" in drawn.figures[0].caption


def test_of_many_classes_the_most_frequent() -> None:
    found = data(classes=20, rows=50)  # classes 0 to 9 have three rows, the others two
    assert [series.key for series in figures(found, 20).legend] == [f"class {i}" for i in range(DRAWN)]


@pytest.mark.parametrize(
    "odd",
    [
        {},
        {"classes": [0, 7], "models": {"student": {"points": [[0, 0], [1, 1]]}}},
        {"classes": [0], "models": {"student": {"points": [[0, "x"]]}}},
        {"classes": [0], "models": {"student": {"points": [[0, float("nan")]]}}},
        {"classes": [0, 1], "models": {"student": {"points": [[0, 0]]}}},
        {"classes": "abc", "models": 3},
    ],
)
def test_odd_files_are_not_drawn(odd: dict[str, Any]) -> None:
    assert embedding_section(odd, ["a", "b", "c"]) is None
