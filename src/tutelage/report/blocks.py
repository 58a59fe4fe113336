"""What a page is made of. Plain values: text is text (the templates escape it), figures are plotly's own mappings."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

Tone = Literal["", "good", "bad", "quiet"]


@dataclass(frozen=True)
class Style:
    """How one series looks in every figure: a colour of the theme (a CSS variable's name), a marker, a dash."""

    color: str
    symbol: str = "circle"
    dash: str = "solid"

    @property
    def paint(self) -> str:
        """The colour as figures carry it; the page's script puts the theme's value in its place."""
        return f"var(--{self.color})"


@dataclass(frozen=True)
class Cell:
    text: str
    sort: float | str | None = None
    """What the column is sorted by; none sorts last in both directions."""
    detail: str = ""
    """A second, smaller line."""
    tone: Tone = ""
    style: Style | None = None


@dataclass(frozen=True)
class Column:
    label: str
    numeric: bool = True
    note: str = ""
    """What the column means, shown below the table."""


@dataclass(frozen=True)
class Table:
    kind: ClassVar[str] = "table"
    caption: str
    columns: Sequence[Column]
    rows: Sequence[Sequence[Cell]]
    foot: Sequence[Sequence[Cell]] = ()
    """Rows that stay last however the table is sorted."""
    sortable: bool = False
    sorted_by: int | None = None
    """The column that the rows already follow, with ``descending``."""
    descending: bool = True

    @property
    def notes(self) -> list[Column]:
        return [column for column in self.columns if column.note]


@dataclass(frozen=True)
class Series:
    """One entry of a legend: every trace whose ``meta`` is the key belongs to it."""

    key: str
    label: str
    style: Style


@dataclass(frozen=True)
class Figure:
    kind: ClassVar[str] = "figure"
    title: str
    caption: str
    description: str
    """What the picture shows, in words, for who cannot see it."""
    traces: Sequence[dict[str, Any]]
    layout: dict[str, Any]
    height: int = 300
    series: Sequence[Series] = ()
    """Its own legend; none where a shared legend stands above several figures."""
    values: Table | None = None
    wide: bool = False
    least_width: int = 0
    """Pixels that it needs; on a narrower screen it scrolls sideways."""

    @property
    def payload(self) -> dict[str, Any]:
        return {"data": list(self.traces), "layout": {**self.layout, "height": self.height}}


@dataclass(frozen=True)
class Figures:
    """A grid of figures under one legend (or each with its own)."""

    kind: ClassVar[str] = "figures"
    figures: Sequence[Figure]
    legend: Sequence[Series] = ()

    @property
    def laid_out(self) -> list[tuple[Figure, bool]]:
        """Each figure, and whether it spans both columns: one that would stand alone in its row does."""
        narrow = [figure for figure in self.figures if not figure.wide]
        alone = narrow[-1] if len(narrow) % 2 else None
        return [(figure, figure.wide or figure is alone) for figure in self.figures]


@dataclass(frozen=True)
class Picture:
    source: str
    """A data URI, checked by who made this."""
    description: str
    facts: Sequence[tuple[str, Cell]]
    """What is known of it, by name."""


@dataclass(frozen=True)
class Pictures:
    kind: ClassVar[str] = "pictures"
    pictures: Sequence[Picture]


@dataclass(frozen=True)
class Text:
    kind: ClassVar[str] = "text"
    text: str


@dataclass(frozen=True)
class Notice:
    """Something that the reader must know: what is missing, what failed."""

    kind: ClassVar[str] = "notice"
    text: str
    tone: Tone = ""
    detail: str = ""
    """Preformatted, for example an error's text."""


@dataclass(frozen=True)
class Facts:
    kind: ClassVar[str] = "facts"
    facts: Sequence[tuple[str, str]]


@dataclass(frozen=True)
class Code:
    kind: ClassVar[str] = "code"
    label: str
    text: str


@dataclass(frozen=True)
class Folded:
    kind: ClassVar[str] = "folded"
    summary: str
    blocks: Sequence[Block]


Block = Table | Figures | Pictures | Text | Notice | Facts | Code | Folded


@dataclass(frozen=True)
class Tile:
    """One number that a reader should take away."""

    label: str
    value: str
    detail: str = ""


@dataclass(frozen=True)
class Section:
    title: str
    blocks: Sequence[Block]
    short: str = ""
    """Its name in the table of contents."""


@dataclass(frozen=True)
class Part:
    """One run or one comparison: headline, numbers, sections."""

    eyebrow: str
    title: str
    verdict: str
    chips: Sequence[tuple[str, Tone]] = ()
    tiles: Sequence[Tile] = ()
    sections: Sequence[Section] = ()
    notices: Sequence[Notice] = field(default_factory=tuple)
