"""What a comparison is made of: every run's whole recipe, checked before any of them starts."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import tutelage.recipe as recipes
from tutelage import catalogue
from tutelage.engine.method import Method
from tutelage.recipe.schema import Recipe
from tutelage.runs.batch import Json
from tutelage.runs.teachers import fingerprint, teacher_configs
from tutelage.runs.tuning import check_tuning, with_values
from tutelage.tasks import build_task

Key = tuple[str, int]
"""Label of a method, and seed."""

Methods = Literal["all"] | Sequence[str | Mapping[str, Any]]
"""Names, or mappings of a name and its options; ``all``: every method of one training loop that the recipe suits."""


@dataclass(frozen=True)
class Plan:
    """Every run of a comparison, checked, before any of them starts.

    Attributes:
        base: the recipe that all share.
        options: label → the method's options as they were given.
        seeds: one run a method and seed.
        baseline: label of the method that the others are held against.
        recipes: the whole recipe of each run.
        teachers: fingerprints of the recipes that teachers are trained by, by name: a file may change, its path not.
        metric: what the table ranks by; ``higher_is_better`` says how.
        trials: tuning runs of each method; 0: nothing is tuned.
        tuning: label → what `tune` found; empty where nothing is tuned.
    """

    base: Recipe
    options: Mapping[str, Json]
    seeds: tuple[int, ...]
    baseline: str
    recipes: Mapping[Key, Recipe]
    teachers: Mapping[str, str]
    metric: str
    higher_is_better: bool
    trials: int = 0
    tuning: Mapping[str, Json] = field(default_factory=dict)

    def tuned(self, tuning: Mapping[str, Json]) -> Plan:
        """The same comparison, each method with the values that were chosen for it."""
        recipes = {
            (label, seed): _variant(
                self.base, self.options[label], seed, (tuning[label]["chosen"] or {}) if tuning else {}
            )
            for label, seed in self.recipes
        }
        return replace(self, recipes=recipes, tuning=tuning)

    def trial(self, label: str) -> Recipe:
        """The recipe of a method's trials. Their seed is none of those that are compared."""
        return _variant(self.base, self.options[label], max(self.seeds) + 1)


def make_plan(
    recipe: Recipe | Mapping[str, Any] | Path | str,
    methods: Methods | None = None,
    seeds: int | Sequence[int] | None = None,
    baseline: str | None = None,
    trials: int | None = None,
) -> Plan:
    """Resolve and check every run. What is left out comes from the recipe's ``compare`` part.

    Raises:
        RecipeError: a recipe, method or option that is not valid.
        ValueError: no method or seed, one of them twice, a baseline that is not among the methods, or a search that
            cannot work.
    """
    base = recipe if isinstance(recipe, Recipe) else recipes.load_recipe(recipe)
    own = base.compare
    options = _labelled(_chosen(base, own.methods if methods is None else methods))
    numbers = _numbers(own.seeds if seeds is None else seeds)
    metric, higher_is_better = _metric(base)
    trials = own.trials if trials is None else trials
    if trials:
        check_tuning(base, trials)
    return Plan(
        base=base,
        options=options,
        seeds=numbers,
        baseline=_baseline(baseline or own.baseline, options),
        recipes={
            (label, seed): _variant(base, options[label], seed) for label in options for seed in numbers
        },
        teachers={
            name: fingerprint(recipes.load_recipe(config.recipe, config.overrides))
            for name, config in teacher_configs(base).items()
            if config.recipe is not None
        },
        metric=metric,
        higher_is_better=higher_is_better,
        trials=trials,
    )


def _chosen(base: Recipe, methods: Methods | None) -> Sequence[str | Mapping[str, Any]]:
    """Methods as they are compared: those that the recipe has too, by name, with the options that they have there."""
    own = {
        method.name: {"name": method.name, **method.model_dump(mode="json", exclude_defaults=True)}
        for method in base.method
    }
    if methods is None:
        methods = list(dict.fromkeys(["none", *own]))
    elif methods == "all":
        methods = _comparable(base)
    if isinstance(methods, str):
        raise ValueError(f"methods is {methods!r}; give a list of names, or `all`")
    return [own.get(method, method) if isinstance(method, str) else method for method in methods]


def _comparable(base: Recipe) -> list[str]:
    """Every method of one training loop that is made for the recipe's task and has what it needs of a teacher."""
    found = []
    for name in catalogue.names():
        method = catalogue.load(name)
        fits = base.task in method.needs.tasks and (
            base.teacher is not None or method.needs.teacher == "none"
        )
        if fits and issubclass(method, Method):
            found.append(name)
    return found


def _metric(base: Recipe) -> tuple[str, bool]:
    """What the table ranks by, and whether higher is better: ``evaluation.best``, else the first metric there is."""
    higher = build_task(base.task, outputs=2).higher_is_better
    metric = base.evaluation.best or next(iter(base.evaluation.metrics or higher))
    name = metric.partition("[")[0]
    if name not in higher:
        raise ValueError(f"evaluation names the metric {metric!r}; {base.task} has {', '.join(higher)}")
    return metric, higher[name]


def _variant(base: Recipe, method: Json, seed: int, tuned: Mapping[str, float] | None = None) -> Recipe:
    """The recipe of one run. Every run has the same number of threads, whatever runs beside it."""
    content = base.model_dump(mode="json", exclude_unset=True)
    content.pop("compare", None)
    content["method"] = method
    content["train"] |= {"seed": seed, "threads": base.train.threads or 1}
    content["output"] = content.get("output", {}) | {"dir": None, "report": False}
    return recipes.load_recipe(with_values(content, tuned or {}))


def _labelled(methods: Sequence[str | Mapping[str, Any]]) -> dict[str, Json]:
    """Methods by label: the name, and where a name comes twice its options too."""
    if not methods:
        raise ValueError(
            "methods is empty; give a list of names, or of mappings of a name and its options, or `all`"
        )
    entries = [{"name": method} if isinstance(method, str) else dict(method) for method in methods]
    names = [str(entry.get("name")) for entry in entries]
    labelled: dict[str, Json] = {}
    for name, entry in zip(names, entries, strict=True):
        given = ",".join(f"{key}={value}" for key, value in entry.items() if key != "name")
        label = name if names.count(name) == 1 or not given else f"{name}-{given}"
        label = re.sub(r"[^\w.,=+-]", "_", label)
        if label in labelled:
            raise ValueError(f"methods has {label!r} twice; give each once, or with other options")
        labelled[label] = entry
    return labelled


def _numbers(seeds: int | Sequence[int]) -> tuple[int, ...]:
    numbers = tuple(range(seeds)) if isinstance(seeds, int) else tuple(seeds)
    if not numbers or len(set(numbers)) != len(numbers):
        raise ValueError(
            f"seeds is {seeds!r}; give a number of seeds, 1 or more, or a list of different ones"
        )
    return numbers


def _baseline(wanted: str | None, options: Mapping[str, Json]) -> str:
    if wanted is None:
        return "none" if "none" in options else next(iter(options))
    if wanted not in options:
        near = difflib.get_close_matches(wanted, options, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"baseline {wanted!r} is not among the methods {', '.join(options)}{hint}")
    return wanted
