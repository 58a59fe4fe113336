"""Recipes from files, text and Python values, with overrides; every error at once."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ValidationError

from tutelage.recipe.config import Config
from tutelage.recipe.errors import Problem, RecipeError, problems_of
from tutelage.recipe.export import schema_for
from tutelage.recipe.overrides import apply_overrides
from tutelage.recipe.schema import Recipe
from tutelage.recipe.source import Values, find, plain, read, values_of
from tutelage.recipe.teachers import follow_data, resolve_teachers

C = TypeVar("C", bound=Config)

VERSION = 1


def load_recipe(
    source: str | Path | Mapping[str, Any] | Recipe,
    overrides: Sequence[str] = (),
    *,
    folder: Path | None = None,
) -> Recipe:
    """A validated recipe.

    Args:
        source: a YAML file, the name of a shipped recipe (`tutelage.recipe.shipped`), values as YAML would give them,
            or a recipe.
        overrides: ``key=value`` in order; see `tutelage.recipe.overrides.apply_overrides`. One that moves ``data.path``
            moves it for a teacher's recipe that learns from the same data too.
        folder: what a teacher's recipe file is relative to; left out: the file's folder, else the current one.

    Raises:
        RecipeError: every error, one line each, with the field's path, the value, what is allowed and the nearest name.
    """
    if isinstance(source, Recipe):
        source = source.model_dump(mode="json")
    if isinstance(source, Mapping):
        return _build(plain(source), overrides, folder or Path(), "recipe")
    file = find(source)
    return _build(read(file), overrides, folder or file.parent, str(source), own=file)


def parse_recipe(text: str, overrides: Sequence[str] = (), *, folder: Path | None = None) -> Recipe:
    """A validated recipe from YAML text; otherwise as `load_recipe`."""
    return _build(values_of(text, "recipe"), overrides, folder or Path(), "recipe")


def validate(model: type[C], values: Mapping[str, Any], source: str = "options") -> C:
    """One part of a recipe (any `Config`) from plain values, with the errors that a recipe gives.

    Raises:
        RecipeError: every error.
    """
    config, problems = _validate(model, plain(values))
    if config is None:
        raise RecipeError(source, problems)
    return config


def _build(
    written: Values, overrides: Sequence[str], folder: Path, source: str, own: Path | None = None
) -> Recipe:
    values, problems = apply_overrides(written, overrides)
    _check_version(values.get("version"), source)
    problems += resolve_teachers(values, folder, own)
    if not problems:
        data = written.get("data")
        follow_data(values, data.get("path") if isinstance(data, dict) else None)
    recipe, wrong = _validate(Recipe, values)
    if recipe is None or problems:
        raise RecipeError(source, problems + wrong)
    return recipe


def _check_version(given: Any, source: str) -> None:
    """A newer format is refused alone: its other keys are not unknown but new."""
    if isinstance(given, int) and given > VERSION:
        message = (
            f"got {given}; tutelage {version('tutelage')} reads version {VERSION}: upgrade it with "
            "`pip install --upgrade tutelage`"
        )
        raise RecipeError(source, [Problem("version", message)])


def _validate(model: type[C], values: Values) -> tuple[C | None, list[Problem]]:
    """Strictly, as JSON: text is no number, true is no 1."""
    try:
        return model.model_validate_json(json.dumps(values), strict=True), []
    except ValidationError as error:
        schema = schema_for(model, values)
        return None, problems_of(error, values, schema, schema.get("$defs", {}))
