"""A teacher that comes from a recipe of its own: which file that is, and where its data is."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tutelage.recipe.errors import Problem
from tutelage.recipe.library import shipped
from tutelage.recipe.source import Values, find, near_names, read
from tutelage.recipe.words import show


def resolve_teachers(values: Values, folder: Path, own: Path | None) -> list[Problem]:
    """Make every teacher's ``recipe`` a shipped name or an absolute path, in place.

    Args:
        folder: what a relative path is relative to.
        own: the file of this very recipe, which cannot be its own teacher.
    """
    problems = []
    for where, teacher in _teachers_with_recipe(values.get("teacher")):
        name = teacher["recipe"]
        found = _resolve(name, folder)
        if found is None:
            message = f"got {show(name)}; no such file in {folder.resolve()}, no shipped recipe{near_names(Path(name))}"
            problems.append(Problem(f"{where}.recipe", message))
        elif own is not None and find(found).resolve() == own.resolve():
            problems.append(Problem(f"{where}.recipe", f"got {show(name)}, which is this very recipe"))
        else:
            teacher["recipe"] = found
    return problems


def follow_data(values: Values, before: Any) -> None:
    """Let teachers that learn from the same data find it where an override has moved it, in place.

    Args:
        before: ``data.path`` without overrides. A teacher whose own recipe has the same gets the new one as the first
            of its ``overrides``.
    """
    now = _data_path(values)
    if now == before or not isinstance(now, str):
        return
    for _, teacher in _teachers_with_recipe(values.get("teacher")):
        given = teacher.get("overrides") or []
        if _data_path(read(find(teacher["recipe"]))) == before and isinstance(given, list):
            teacher["overrides"] = [f"data.path={json.dumps(now)}", *given]


def _teachers_with_recipe(teacher: Any) -> Iterator[tuple[str, dict[str, Any]]]:
    if not isinstance(teacher, dict):
        return
    named = {f"teacher.{name}": entry for name, entry in teacher.items()}
    for where, entry in ({"teacher": teacher} | named).items():
        if isinstance(entry, dict) and isinstance(entry.get("recipe"), str):
            yield where, entry


def _resolve(name: str, folder: Path) -> str | None:
    """A shipped name where it is one or the file is one, else the file's absolute path; None where there is neither."""
    known = shipped()
    if name in known:
        return name
    file = (folder / name).resolve()
    if file.is_file():
        return next((other for other, path in known.items() if path.resolve() == file), str(file))
    # A copied recipe still names its teacher's file, which stayed where it was.
    stem = name.removesuffix(".yaml")
    return stem if stem in known else None


def _data_path(values: Any) -> Any:
    data = values.get("data")
    return data.get("path") if isinstance(data, dict) else None
