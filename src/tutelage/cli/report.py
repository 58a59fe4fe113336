"""`tutelage report`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tutelage.cli.output import say


def report(
    folders: Annotated[list[Path], typer.Argument(metavar="RUN", help="Folders of runs or of comparisons.")],
    out: Annotated[
        Path | None, typer.Option("--out", help="File to write; left out: report.html where the folders are.")
    ] = None,
) -> None:
    """Write the report of runs or comparisons anew: one HTML file that needs nothing else.

    \b
    Examples
      tutelage report runs/digits-kd-0
      tutelage report runs/digits-kd-0 runs/digits-nkd-0 --out both.html
    """
    from tutelage.report import write_report

    say(write_report(folders, out))
