"""Tables for the terminal. rich is imported where it is used, so that the report does not need it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from tutelage.report.blocks import Cell, Column, Table
from tutelage.report.leaderboard import leaderboard
from tutelage.report.records import Comparison, mapping
from tutelage.report.tables import against_teacher
from tutelage.report.verdict import run_verdict

if TYPE_CHECKING:
    import rich.table

_TURNS_TEXT = (0x200E, 0x200F, *range(0x202A, 0x202F), *range(0x2066, 0x206A))
_CONTROL = dict.fromkeys((*range(9), *range(11, 32), *range(127, 160), *_TURNS_TEXT))
STYLES = {"good": "green", "bad": "red", "quiet": "dim", "": ""}


def summary_table(comparison: dict[str, Any]) -> rich.table.Table:
    """The leaderboard of ``comparison.json`` for the terminal, best method first, the teacher last."""
    return _rich(leaderboard(Comparison.of(Path(), mapping(comparison)), {}))


def run_summary(result: dict[str, Any]) -> rich.table.Table:
    """A run's ``result.json`` for the terminal: student against teacher, with the verdict as title."""
    verdict = run_verdict(mapping(result))
    table = against_teacher(mapping(result))
    if table is None:
        return _rich(Table("Run", [Column("Run", numeric=False)], [[Cell(verdict)]]))
    return _rich(table, title=verdict)


def _rich(table: Table, title: str = "") -> rich.table.Table:
    import rich.box
    import rich.table
    from rich.text import Text

    notes = ". ".join(f"{column.label}: {column.note}" for column in table.notes)
    made = rich.table.Table(
        title=Text(_plain(title), style="not italic") if title else None,
        caption=Text(_plain(notes)) if notes else None,
        title_justify="left",
        caption_justify="left",
        box=rich.box.SIMPLE_HEAD,
    )
    for column in table.columns:
        made.add_column(Text(_plain(column.label)), justify="right" if column.numeric else "left")
    for i, row in enumerate(table.rows):
        made.add_row(*map(_text, row), end_section=i == len(table.rows) - 1 and bool(table.foot))
    for row in table.foot:
        made.add_row(*map(_text, row))
    return made


def _text(cell: Cell) -> Any:
    from rich.text import Text

    text = Text(_plain(cell.text), style=STYLES[cell.tone])
    return text.append(f"\n{_plain(cell.detail)}", style="dim") if cell.detail else text


def _plain(text: str) -> str:
    """Without what would move the cursor, colour the terminal or turn text round."""
    return text.translate(_CONTROL)
