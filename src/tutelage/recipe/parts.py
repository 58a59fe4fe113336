"""Kinds of values that several parts of a recipe share."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field

Positive = Annotated[float, Field(gt=0)]
Share = Annotated[float, Field(gt=0, lt=1)]
Rows = Annotated[int, Field(ge=1)]
ClassId = Annotated[int, Field(ge=0)]
Text = Annotated[str, Field(min_length=1)]


def is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
