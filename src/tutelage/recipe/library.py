"""Recipes that come with the package: those by task, and those in the methods' own folders."""

from __future__ import annotations

from pathlib import Path

from tutelage import catalogue

FOLDER = Path(__file__).resolve().parent.parent / "recipes"


def shipped() -> dict[str, Path]:
    """Files by name, sorted.

    ``recipes/<task>/<name>.yaml`` has its file's name, one in ``recipes/benchmarks/`` that folder's before it; a method
    folder's ``recipe.yaml`` has the folder's name, and its ``recipe-<name>.yaml`` that name.

    Raises:
        CatalogueError: two files have one name.
    """
    found: dict[str, Path] = {}
    by_task = [(_name(path), path) for path in FOLDER.glob("*/*.yaml")]
    for name, path in sorted(by_task) + _of_methods():
        other = found.setdefault(name, path)
        if other != path:
            raise catalogue.CatalogueError(
                f"two shipped recipes are named {name!r}: {other} and {path}; rename one"
            )
    return dict(sorted(found.items()))


def _name(path: Path) -> str:
    benchmark = path.parent.name == "benchmarks"
    return f"benchmarks/{path.stem}" if benchmark else path.stem


def _of_methods() -> list[tuple[str, Path]]:
    folders = sorted({entry.folder for entry in catalogue.entries().values()})
    own = [(folder.name, folder / "recipe.yaml") for folder in folders]
    further = [
        (path.stem.removeprefix("recipe-"), path)
        for folder in folders
        for path in folder.glob("recipe-*.yaml")
    ]
    return [(name, path) for name, path in own + sorted(further) if path.is_file()]
