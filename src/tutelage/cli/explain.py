"""`tutelage explain`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tutelage.cli.output import AsJson, kept_for_json, print_json, print_table, say


def explain(
    folder: Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a finished run.")],
    rows: Annotated[int, typer.Option(min=2, help="Held-out rows to look at.")] = 512,
    as_json: AsJson = False,
) -> None:
    """Show which layers of student and teacher represent data alike (linear CKA, 0 to 1).

    It is written into the run's folder, and the report is drawn anew with it.

    \b
    Example
      tutelage explain runs/digits-kd-0
    """
    with kept_for_json(as_json):
        from tutelage.report import write_report
        from tutelage.runs import explain as explaining

        found = explaining.explain(folder, rows=rows)
        page = write_report([folder])
    if as_json:
        print_json(found)
        return
    student = found["student"]
    for name, teacher in found["teachers"].items():
        columns = ["student", *teacher["layers"]]
        values = [
            [layer, *(f"{value:.2f}" for value in row)]
            for layer, row in zip(student["layers"], teacher["cka"], strict=True)
        ]
        title = (
            f"CKA of {student['model']} with {name} {teacher['model']}, {found['rows']} {found['split']} rows"
        )
        print_table(columns, values, title=title, right=columns[1:])
    say(page)
