"""`tutelage methods`."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from tutelage.cli.complete import method_names
from tutelage.cli.output import AsJson, kept_for_json, print_json, print_table


def methods(
    name: Annotated[
        str | None,
        typer.Argument(
            metavar="NAME", help="One method, in full.", autocompletion=method_names, show_default=False
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """List the methods, or show one: paper, claim, needs, and options with their bounds.

    \b
    Examples
      tutelage methods
      tutelage methods nkd
      tutelage methods --json
    """
    from tutelage import catalogue

    with kept_for_json(as_json):
        found = [catalogue.describe(each) for each in ([name] if name else catalogue.names())]
        options = _options(name) if name else []
    if as_json:
        print_json({**found[0], "options": options} if name else found)
    elif name:
        _print_one(found[0], options)
    else:
        rows = [
            [each["name"], each["family"], each["kind"], each["title"], _short(each["missing"])]
            for each in found
        ]
        print_table(["name", "family", "kind", "paper", "not built"], rows)


def _options(name: str) -> list[dict[str, Any]]:
    """A method's options: name, default (none where one must be given), allowed values in words, description."""
    from tutelage import catalogue
    from tutelage.recipe.words import allowed

    schema = catalogue.load(name).Config.model_json_schema()
    return [
        {
            "name": option,
            "default": node.get("default"),
            "allowed": allowed(node, schema.get("$defs", {})),
            "description": node.get("description", ""),
        }
        for option, node in schema["properties"].items()
        if option != "name"
    ]


def _print_one(method: dict[str, Any], options: list[dict[str, Any]]) -> None:
    from tutelage import catalogue
    from tutelage.recipe import shipped
    from tutelage.recipe.words import show

    folder = catalogue.entries()[method["name"]].folder
    recipes = [name for name, path in shipped().items() if path.parent == folder]
    paper = ", ".join(str(part) for part in (method["title"], method["venue"], method["year"]) if part)
    arxiv = f", https://arxiv.org/abs/{method['arxiv']}" if method["arxiv"] else ""
    facts = {
        method["name"]: f"{method['kind']}, {method['family']}",
        "paper": paper + arxiv,
        "claim": method["claim"],
        "needs": "; ".join(method["needs"]),
        "not built": "; ".join(method["missing"]),
        "recipe": ", ".join(recipes),
        "card": str(folder / "README.md"),
    }
    print_table(["", ""], [[key, value] for key, value in facts.items() if value])
    rows = [[each["name"], show(each["default"]), each["allowed"], each["description"]] for each in options]
    print_table(["option", "default", "allowed", "what it does"], rows)


def _short(parts: list[str]) -> str:
    return "" if not parts else parts[0] if len(parts) == 1 else f"{len(parts)} parts"
