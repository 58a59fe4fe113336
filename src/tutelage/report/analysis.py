"""What ``analysis.json`` says of a run's answers. What is missing or odd in it becomes empty here, and is not drawn."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tutelage.report.format import number
from tutelage.report.records import listed, mapping, mappings

Matrix = list[list[float]]
Pair = tuple[int, int, int]
"""Target, answer, rows."""


@dataclass(frozen=True)
class Bin:
    """Rows whose confidence lies in one interval; their mean confidence and their accuracy."""

    low: float
    high: float
    rows: int
    confidence: float
    accuracy: float


@dataclass(frozen=True)
class Answers:
    """How one model answered. ``confusion`` holds rows by target and answer; none where there are too many classes."""

    recall: Sequence[float | None]
    confusion: Matrix | None
    confused: Sequence[Pair]
    calibration: Sequence[Bin]


@dataclass(frozen=True)
class Said:
    """One model's answer to one row."""

    answer: int
    confidence: float | None


@dataclass(frozen=True)
class Example:
    """A row on which student and teacher disagree, or a token of one; as a picture or a text where it is one."""

    row: int
    target: int
    student: Said
    teacher: Said
    picture: str
    text: str


@dataclass(frozen=True)
class Analysis:
    """The student's answers on the rows of one split (or on their tokens: ``items``), and its first teacher's where it
    had one."""

    split: str
    items: str
    rows: int
    classes: Sequence[str]
    student: Answers
    teacher: Answers | None
    agreement: Sequence[float | None]
    examples: Sequence[Example]

    @classmethod
    def of(cls, data: dict[str, Any]) -> Analysis | None:
        """None where nothing was analysed."""
        names = [str(name) or str(i) for i, name in enumerate(listed(data.get("classes")))]
        if not names or not mapping(data.get("student")):
            return None
        classes = len(names)
        teacher = mapping(data.get("teacher"))
        return cls(
            split=str(data.get("split") or "held-out"),
            items="tokens" if data.get("items") == "tokens" else "rows",
            rows=_count(data.get("rows")) or 0,
            classes=names,
            student=_answers(mapping(data["student"]), classes),
            teacher=_answers(teacher, classes) if teacher else None,
            agreement=_by_class(data.get("agreement"), classes),
            examples=[
                found
                for given in mappings(data.get("examples"))
                if (found := _example(given, classes)) is not None
            ],
        )

    @property
    def sizes(self) -> list[float | None]:
        """Rows of each class, where the confusion of all classes tells them."""
        confusion = self.student.confusion
        return [None] * len(self.classes) if confusion is None else [sum(row) for row in confusion]


def matrix(value: object, rows: int, columns: int) -> Matrix | None:
    """A whole table of finite numbers of that size, else none."""
    table = [[number(cell) for cell in listed(row)] for row in listed(value)]
    if len(table) != rows or any(len(row) != columns for row in table):
        return None
    found = [[cell for cell in row if cell is not None] for row in table]
    return found if all(len(row) == columns for row in found) else None


def _answers(data: dict[str, Any], classes: int) -> Answers:
    confusion = matrix(data.get("confusion"), classes, classes)
    if confusion is not None and any(count < 0 for row in confusion for count in row):
        confusion = None
    return Answers(
        recall=_by_class(data.get("recall"), classes),
        confusion=confusion,
        confused=_pairs(data.get("confused"), classes),
        calibration=_bins(mapping(data.get("calibration"))),
    )


def _by_class(value: object, classes: int) -> list[float | None]:
    shares = [number(share) for share in listed(value)]
    return shares if len(shares) == classes else [None] * classes


def _pairs(value: object, classes: int) -> list[Pair]:
    found = []
    for pair in listed(value):
        known = [count for item in listed(pair) if (count := _count(item)) is not None]
        if len(known) == 3 and max(known[:2]) < classes:
            found.append((known[0], known[1], known[2]))
    return found


def _bins(data: dict[str, Any]) -> list[Bin]:
    """The bins that have rows."""
    counts, confidence, accuracy = (listed(data.get(key)) for key in ("count", "confidence", "accuracy"))
    found = []
    for i, values in enumerate(zip(counts, confidence, accuracy, strict=False)):
        rows, mean, right = _count(values[0]), number(values[1]), number(values[2])
        if rows and mean is not None and right is not None:
            found.append(Bin(i / len(counts), (i + 1) / len(counts), rows, mean, right))
    return found


def _example(data: dict[str, Any], classes: int) -> Example | None:
    target, row = _class(data.get("target"), classes), _count(data.get("row"))
    student, teacher = (_said(mapping(data.get(who)), classes) for who in ("student", "teacher"))
    if target is None or row is None or student is None or teacher is None:
        return None
    shown = {name: str(data.get(name) or "") for name in ("picture", "text")}
    return Example(row, target, student, teacher, **shown)


def _said(data: dict[str, Any], classes: int) -> Said | None:
    answer = _class(data.get("class"), classes)
    return None if answer is None else Said(answer, number(data.get("confidence")))


def _class(value: object, classes: int) -> int | None:
    found = _count(value)
    return found if found is not None and found < classes else None


def _count(value: object) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and value >= 0 else None
