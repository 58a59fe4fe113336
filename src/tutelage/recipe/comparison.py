"""The ``compare`` part of a recipe: a benchmark that can be repeated by its name alone."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from tutelage.recipe.config import Config

Name = Annotated[str, Field(min_length=1)]


class CompareConfig(Config):
    """What `tutelage compare` compares, where the command line leaves it out."""

    methods: Literal["all"] | tuple[Name | dict[str, Any], ...] | None = Field(
        None,
        description="Names, or mappings of a name and its options; all: every method of one training loop that suits "
        "the recipe; left out: none and the recipe's own.",
    )
    seeds: int | tuple[int, ...] = Field(5, description="How many seeds (0, 1, …), or which.")
    baseline: Name | None = Field(
        None, description="What the others are held against; left out: none, else the first."
    )
    trials: int = Field(
        0, ge=0, le=10_000, description="Tuning runs of each method, judged on validation data; 0: no tuning."
    )
