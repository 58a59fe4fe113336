"""`tutelage resume`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tutelage.cli.arguments import Quiet
from tutelage.cli.output import AsJson, kept_for_json, print_json
from tutelage.cli.processes import is_first_process
from tutelage.cli.run import print_result


def resume(
    folder: Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a run.")],
    no_progress: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Go on with a run that was stopped, from its last checkpoint and by the recipe saved with it.

    On the same machine it ends with the weights that the run would have had without the stop, bit for bit.

    \b
    Example
      tutelage resume runs/digits-kd-0
    """
    from tutelage import runs

    with kept_for_json(as_json):
        result = runs.resume(folder, progress=False if no_progress else None)
    if not is_first_process():
        return
    if as_json:
        print_json({"folder": str(result.folder), **result.result})
    else:
        print_result(result.folder, result.result)
