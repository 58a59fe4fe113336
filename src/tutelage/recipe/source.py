"""Where a recipe's values come from: a file, a shipped recipe, YAML text, Python values."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tutelage.recipe.config import Config
from tutelage.recipe.errors import Problem, RecipeError
from tutelage.recipe.library import shipped
from tutelage.recipe.text import LARGEST, read_yaml
from tutelage.recipe.words import nearest, show

Values = dict[str, Any]


def find(source: str | Path) -> Path:
    """The file of a shipped recipe's name, or the path itself.

    Raises:
        RecipeError: there is neither; with the shipped names that come near.
    """
    known = shipped()
    if source in known:
        return known[str(source)]
    path = Path(source)
    if path.is_file():
        return path
    what = "a folder, not a file" if path.is_dir() else "neither a file nor a shipped recipe"
    message = f"{what}{near_names(path)}; `tutelage recipes` lists what is shipped"
    raise RecipeError(str(source), [Problem("", message)])


def near_names(path: Path) -> str:
    """A hint at shipped recipes whose names are like the file's; empty where there is none."""
    known = shipped()
    near = [path.stem] if path.stem in known else nearest(path.stem, known)
    return f"; shipped recipes of about that name: {', '.join(near)}" if near else ""


def read(file: Path) -> Values:
    """The values in a YAML file.

    Raises:
        RecipeError: it cannot be read, is no YAML, or holds no mapping.
    """
    try:
        with file.open("rb") as opened:
            content = opened.read(LARGEST + 1)
        text = content.decode("utf-8", "strict" if len(content) <= LARGEST else "replace")  # refused below
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(str(file), [Problem("", f"cannot be read: {error}")]) from error
    return values_of(text, str(file))


def values_of(text: str, source: str) -> Values:
    """The values in YAML text.

    Raises:
        RecipeError: it is no YAML, or holds no mapping.
    """
    try:
        values = read_yaml(text)
    except ValueError as error:
        raise RecipeError(source, [Problem("", str(error))]) from error
    if values is None:
        raise RecipeError(source, [Problem("", "the recipe is empty; `tutelage recipes digits` prints one")])
    if not isinstance(values, dict):
        raise RecipeError(source, [Problem("", f"a recipe is a mapping; got {show(values)}")])
    return values


def plain(values: Mapping[str, Any]) -> Values:
    """Copies of Python values, as YAML would give them.

    Raises:
        RecipeError: a value that YAML has not.
    """

    def convert(value: Any) -> Any:
        if isinstance(value, Config):
            return value.model_dump(mode="json")
        if isinstance(value, os.PathLike):
            return os.fspath(value)
        raise TypeError(f"{type(value).__name__} is none")

    try:
        copied: Values = json.loads(json.dumps(dict(values), default=convert))
    except (TypeError, ValueError) as error:
        message = f"values are mappings, lists, text, numbers, true, false and null: {error}"
        raise RecipeError("recipe", [Problem("", message)]) from error
    return copied
