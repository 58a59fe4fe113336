"""Arguments that several verbs share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tutelage.cli.complete import override_keys, recipe_names

RecipeName = Annotated[
    str,
    typer.Argument(
        metavar="RECIPE", help="A YAML file, or the name of a shipped recipe.", autocompletion=recipe_names
    ),
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="KEY=VALUE",
        help="Fields to set, by path: train.epochs=30 method=nkd method.gamma=2 data.limit=500",
        autocompletion=override_keys,
        show_default=False,
    ),
]
Quiet = Annotated[bool, typer.Option("--no-progress", help="Show no progress.")]


def given_folder(folder: Path | None, own: str | None, otherwise: str) -> Path:
    """The folder on the command line, else the recipe's own, else one in ``runs/``."""
    return folder or (Path(own) if own else Path("runs") / otherwise)
