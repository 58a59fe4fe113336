"""`tutelage recipes`."""

from __future__ import annotations

import itertools
import re
from pathlib import Path
from typing import Annotated, Any

import typer

from tutelage.cli.output import AsJson, kept_for_json, print_json, print_table, say


def _shipped_names(incomplete: str) -> list[str]:
    from tutelage.recipe import shipped

    return [name for name in shipped() if name.startswith(incomplete)]


def recipes(
    name: Annotated[
        str | None,
        typer.Argument(
            metavar="NAME", help="One recipe: print it.", autocompletion=_shipped_names, show_default=False
        ),
    ] = None,
    copy: Annotated[
        Path | None,
        typer.Option("--copy", metavar="PATH", help="Copy it to a file or folder, to change it there."),
    ] = None,
    schema: Annotated[
        bool, typer.Option("--schema", help="Print the JSON Schema of recipes, for editors.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """List the recipes that are shipped, print one, or copy one.

    \b
    Examples
      tutelage recipes
      tutelage recipes digits --copy my.yaml
      tutelage recipes --schema > recipe.schema.json        then, as first line of a recipe:
                                                            # yaml-language-server: $schema=recipe.schema.json
    """
    from tutelage.recipe import json_schema, shipped

    if schema:
        with kept_for_json(True):
            made = json_schema()
        print_json(made)
    elif name is None and copy is not None:
        raise typer.BadParameter("say which recipe: tutelage recipes NAME --copy PATH", param_hint="--copy")
    elif name is None:
        _list(shipped(), as_json)
    else:
        _one(name, copy, as_json)


def _list(files: dict[str, Path], as_json: bool) -> None:
    found = [_summary(name, file) for name, file in files.items()]
    if as_json:
        print_json(found)
    else:
        columns = ("name", "student", "method", "title")
        print_table(columns, [[each[column] for column in columns] for each in found])


def _one(name: str, copy: Path | None, as_json: bool) -> None:
    from tutelage.recipe.source import find

    file = find(name)
    text = file.read_text(encoding="utf-8")
    if copy is not None:
        target = copy / file.name if copy.is_dir() else copy
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            with target.open("x", encoding="utf-8") as made:  # a link is not followed either
                made.write(text)
        except FileExistsError:
            raise typer.BadParameter(f"{target} exists; give another name", param_hint="--copy") from None
    if as_json:
        copied = {"copied_to": str(target)} if copy is not None else {}
        print_json({**_summary(name, file), **copied, "text": text})
    elif copy is not None:
        say(f"wrote {target}; change it, then: tutelage run {target} --dry-run")
    else:
        typer.echo(text, nl=False)


def _summary(name: str, file: Path) -> dict[str, Any]:
    """What stands in a recipe's file; its title is the first sentence of the comment that it starts with."""
    from tutelage.recipe.source import read

    values = read(file)
    lines = itertools.takewhile(
        lambda line: line.startswith("#"), file.read_text(encoding="utf-8").splitlines()
    )
    comment = " ".join(line.strip("# ") for line in lines)
    teacher, method = values.get("teacher") or {}, values.get("method")
    listed = method if isinstance(method, list) else [method]
    return {
        "name": name,
        "title": re.split(r"[.:](?= |$)", comment, maxsplit=1)[0],
        "task": values.get("task", "classification"),
        "data": values["data"]["path"],
        "teacher": teacher.get("recipe") or teacher.get("model") or teacher.get("run") or ", ".join(teacher),
        "student": values["student"]["model"],
        "method": "+".join(each["name"] if isinstance(each, dict) else str(each) for each in listed),
        "file": str(file),
    }
