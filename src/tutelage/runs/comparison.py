"""What a comparison is made of, and the table that its results give. Nothing here runs anything."""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tutelage.recipe as recipes
from tutelage.recipe.schema import Recipe
from tutelage.runs.assemble import teacher_configs
from tutelage.runs.batch import Json
from tutelage.runs.statistics import mean_interval, paired_difference
from tutelage.runs.teachers import fingerprint
from tutelage.tasks import build_task

Key = tuple[str, int]
"""Label of a method, and seed."""


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
    """

    base: Recipe
    options: Mapping[str, Json]
    seeds: tuple[int, ...]
    baseline: str
    recipes: Mapping[Key, Recipe]
    teachers: Mapping[str, str]
    metric: str
    higher_is_better: bool


def make_plan(
    recipe: Recipe | Mapping[str, Any] | Path | str,
    methods: Sequence[str | Mapping[str, Any]],
    seeds: int | Sequence[int],
    baseline: str | None,
) -> Plan:
    """Resolve and check every run.

    Raises:
        RecipeError: a recipe, method or option that is not valid.
        ValueError: no method or seed, one of them twice, or a baseline that is not among the methods.
    """
    base = recipe if isinstance(recipe, Recipe) else recipes.load_recipe(recipe)
    options = _labelled(methods)
    numbers = _numbers(seeds)
    metric, higher_is_better = _metric(base)
    return Plan(
        base=base,
        options=options,
        seeds=numbers,
        baseline=_baseline(baseline, options),
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
    )


def _metric(base: Recipe) -> tuple[str, bool]:
    """What the table ranks by, and whether higher is better: ``evaluation.best``, else the first metric there is."""
    higher = build_task(base.task, outputs=2).higher_is_better
    metric = base.evaluation.best or next(iter(base.evaluation.metrics or higher))
    name = metric.partition("[")[0]
    if name not in higher:
        raise ValueError(f"evaluation names the metric {metric!r}; {base.task} has {', '.join(higher)}")
    return metric, higher[name]


def _variant(base: Recipe, method: Json, seed: int) -> Recipe:
    """The recipe of one run. Every run has the same number of threads, whatever runs beside it."""
    content = base.model_dump(mode="json", exclude_unset=True)
    content["method"] = method
    content["train"] |= {"seed": seed, "threads": base.train.threads or 1}
    content["output"] = content.get("output", {}) | {"dir": None, "report": False}
    return recipes.load_recipe(content)


def _labelled(methods: Sequence[str | Mapping[str, Any]]) -> dict[str, Json]:
    """Methods by label: the name, and where a name comes twice its options too."""
    if isinstance(methods, str) or not methods:
        raise ValueError(
            f"methods is {methods!r}; give a list of names, or of mappings of a name and its options"
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


def finite_metrics(result: Json) -> Json:
    """Metrics on test data, or on validation data where there is no test data; None in place of what is no number."""
    metrics = result.get("test") or result.get("validation") or {}
    return {
        name: value if value is not None and math.isfinite(value) else None for name, value in metrics.items()
    }


def summarise(plan: Plan, runs: Mapping[Key, Json]) -> list[Json]:
    """The comparison's ``methods``: by method its runs so far, their mean and interval, and the paired difference to
    the baseline over the seeds that both have finished (``pairs`` of them)."""
    done = {
        label: {seed: runs[label, seed]["value"] for seed in plan.seeds if _is_done(runs.get((label, seed)))}
        for label in plan.options
    }
    return [
        {
            "name": label,
            "options": {key: value for key, value in plan.options[label].items() if key != "name"},
            "runs": [runs[label, seed] for seed in plan.seeds if (label, seed) in runs],
            **_mean(list(done[label].values())),
            "difference": None if label == plan.baseline else _difference(done[label], done[plan.baseline]),
            "seconds": _mean_seconds([runs[label, seed]["seconds"] for seed in done[label]]),
        }
        for label in plan.options
    ]


def _is_done(run: Json | None) -> bool:
    return run is not None and run["status"] == "done"


def _mean(values: Sequence[float]) -> Json:
    if not values:
        return {"mean": None, "low": None, "high": None}
    interval = mean_interval(values)
    return {"mean": interval.mean, "low": interval.low, "high": interval.high}


def _difference(arm: Mapping[int, float], baseline: Mapping[int, float]) -> Json | None:
    seeds = [seed for seed in arm if seed in baseline]
    if not seeds:
        return None
    found = paired_difference([arm[seed] for seed in seeds], [baseline[seed] for seed in seeds])
    return {"mean": found.mean, "low": found.low, "high": found.high, "p": found.p, "pairs": len(seeds)}


def _mean_seconds(seconds: Sequence[float | None]) -> float | None:
    known = [value for value in seconds if value is not None]
    return sum(known) / len(known) if known else None
