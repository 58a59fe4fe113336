"""What verbs print: tables on standard output, complaints on standard error, or JSON alone."""

from __future__ import annotations

import contextlib
import json
import math
import sys
from collections.abc import Iterator, Sequence
from typing import Annotated, Any

import typer

from tutelage.untrusted import visible, visible_json

PLAIN_WIDTH = 120
"""Width of tables where no terminal says it."""

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON, and nothing else, on standard output.")]


def say(text: object) -> None:
    """Print a line on standard output."""
    typer.echo(visible(str(text)))


def print_json(value: Any) -> None:
    """Print a value as JSON; numbers that JSON has not become null."""
    text = json.dumps(_finite(value), indent=2, ensure_ascii=False, default=str)
    typer.echo(visible_json(text))


@contextlib.contextmanager
def kept_for_json(as_json: bool) -> Iterator[None]:
    """Where JSON is wanted, whatever is printed inside goes to standard error."""
    with contextlib.redirect_stdout(sys.stderr) if as_json else contextlib.nullcontext():
        yield


def print_table(
    columns: Sequence[str],
    rows: Sequence[Sequence[str]],
    *,
    title: str | None = None,
    right: Sequence[str] = (),
) -> None:
    """Print a table; columns named in ``right`` are aligned to the right."""
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=PLAIN_WIDTH)
    table = Table(box=box.SIMPLE_HEAD)
    table.show_header = any(columns)
    for column in columns:
        table.add_column(
            Text(visible(column)), justify="right" if column in right else "left", overflow="fold"
        )
    for row in rows:
        table.add_row(*(Text(visible(cell)) for cell in row))
    if title is not None:
        console.print(Text(visible(title), style="bold"))
    console.print(table)


def complain(kind: str, message: str) -> None:
    """Print ``kind: message`` on standard error, the kind in red."""
    from rich.console import Console
    from rich.text import Text

    text = Text.assemble((f"{kind}:", "bold red"), " ", visible(message))
    Console(stderr=True, highlight=False, soft_wrap=True).print(text)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
