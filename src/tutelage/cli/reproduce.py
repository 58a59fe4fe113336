"""`tutelage reproduce`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from tutelage.cli import figures
from tutelage.cli.arguments import Quiet
from tutelage.cli.complete import method_names
from tutelage.cli.output import AsJson, kept_for_json, print_json, print_table, say


def reproduce(
    methods: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="METHOD…",
            help="Methods that have a study.",
            autocompletion=method_names,
            show_default=False,
        ),
    ] = None,
    everything: Annotated[bool, typer.Option("--all", help="Every method that has a study.")] = False,
    folder: Annotated[
        Path | None, typer.Option("--dir", help="Ledger folder; left out: docs/ledger here.")
    ] = None,
    no_progress: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Put a method's published claim to the test, in miniature, and write the verdict to the ledger.

    The verdict is computed from the paired 95 % interval over the study's seeds: holds, contradicted, or not shown at
    this scale. Finished trials are kept, so a stopped study goes on where it stopped.

    \b
    Examples
      tutelage reproduce nkd uskd
      tutelage reproduce --all
    """
    if bool(methods) == everything:
        raise typer.BadParameter("give names of methods, or --all", param_hint="METHOD")
    from tutelage.studies.ledger import LEDGER
    from tutelage.studies.ledger import reproduce as put_to_the_test
    from tutelage.studies.registry import find_study, study_names

    with kept_for_json(as_json):
        names = list(dict.fromkeys(methods or study_names()))
        for name in names:
            find_study(name)  # one that is not there is said before the others take their minutes
        entries = [put_to_the_test(each, folder=folder, progress=not no_progress) for each in names]
    if as_json:
        print_json(entries if everything or len(entries) > 1 else entries[0])
    else:
        columns = ["method", "verdict", "arms", "difference [95 %]", "seeds", "claim"]
        print_table(columns, [_row(entry) for entry in entries])
        for entry in entries:
            say((folder or LEDGER) / f"{entry['method']}.json")


def _row(entry: dict[str, Any]) -> list[str]:
    low, high = entry["interval"] or (None, None)
    difference = {"mean": entry["mean"], "low": low, "high": high}
    return [
        entry["method"],
        entry["verdict"],
        f"{entry['arm']} to {entry['baseline']}",
        figures.interval(entry["metric"], difference, signed=True),
        str(len(entry["seeds"])),
        entry["claim"],
    ]
