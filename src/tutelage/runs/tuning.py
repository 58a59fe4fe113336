"""Tuning for a comparison: the same number of trials for every method, on validation data alone.

A trial is a run like any other, in a folder of its own. What it tries is a pure function of the seed, its number and
the trials before it, so a search that was killed goes on as if nothing had happened, without a database.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tutelage.recipe as recipes
from tutelage.engine.interrupt import Interrupted
from tutelage.engine.rng import derive_seed
from tutelage.recipe.config import Range
from tutelage.recipe.schema import Recipe
from tutelage.runs.batch import Json, finish_run

if TYPE_CHECKING:
    from optuna.distributions import FloatDistribution
    from optuna.trial import FrozenTrial

LEARNING_RATE = "train.optimizer.lr"
RANDOM_TRIALS = 5
"""Trials before the sampler learns from earlier ones. The very first is the recipe as it stands."""


def check_tuning(recipe: Recipe, trials: int) -> None:
    """Whether tuning can work.

    Raises:
        ValueError: a number of trials below 0, or no validation data to judge them by.
        ImportError: Optuna is not installed.
    """
    if trials < 0:
        raise ValueError(f"trials is {trials}; allowed: 1 and above, or 0 for no tuning")
    if recipe.data.validation is None:
        raise ValueError("tuning judges trials on validation data, and data.validation is not set; set it")
    _optuna()


def search_ranges(recipe: Recipe, given: Mapping[str, Any]) -> dict[str, Range]:
    """What is tuned: the learning rate, and what the method's ``Config.search()`` names but for ``given`` options."""
    ranges = {LEARNING_RATE: Range.around(recipe.train.optimizer.lr)}
    (method,) = recipe.method
    own = {f"method.{name}": found for name, found in type(method).search().items() if name not in given}
    return ranges | own


def tune(
    recipe: Recipe, given: Mapping[str, Any], trials: int, folder: Path, metric: str, higher_is_better: bool
) -> Json:
    """Search one method's options.

    Args:
        recipe: of every trial, the method's options and the seed of the search included.
        given: the method's options that the user set; they stay.
        trials: how many runs.
        folder: holds ``trial-<n>`` folders; finished trials there are read back.
        metric: of the validation data, after the last epoch.
        higher_is_better: of ``metric``.

    Returns:
        ``ranges`` (low and high by dotted key), ``trials`` (number, values, metric, seconds of training, error), the
        ``chosen`` values (none where every trial failed) and the ``seconds`` of all trials.
    """
    ranges = search_ranges(recipe, given)
    done: list[Json] = []
    for number in range(trials):
        values = _suggest(recipe, ranges, done, higher_is_better)
        done.append(_trial(number, _changed(recipe, values), values, folder / f"trial-{number}", metric))
    scored = [trial for trial in done if trial["value"] is not None]
    sign = 1 if higher_is_better else -1
    best = max(scored, key=lambda trial: sign * trial["value"], default=None)
    return {
        "ranges": {key: [found.low, found.high] for key, found in ranges.items()},
        "seed": recipe.train.seed,
        "trials": done,
        "chosen": None if best is None else best["values"],
        "seconds": round(sum(trial["seconds"] for trial in done), 2),
    }


def _suggest(
    recipe: Recipe, ranges: Mapping[str, Range], done: list[Json], higher_is_better: bool
) -> dict[str, float]:
    if not done:
        return {key: _present(recipe, key) for key in ranges}
    optuna = _optuna()
    seed = derive_seed(recipe.train.seed, "tuning", len(done)) % 2**32
    study = optuna.create_study(
        direction="maximize" if higher_is_better else "minimize",
        sampler=optuna.samplers.TPESampler(seed=seed, n_startup_trials=RANDOM_TRIALS),
    )
    space = {
        key: optuna.distributions.FloatDistribution(found.low, found.high, log=True)
        for key, found in ranges.items()
    }
    study.add_trials([_told(trial, space) for trial in done])
    asked = study.ask(space)
    return {key: _rounded(asked.params[key], ranges[key]) for key in ranges}


def _told(trial: Json, space: Mapping[str, FloatDistribution]) -> FrozenTrial:
    optuna = _optuna()
    # An option's present value may lie outside of what is searched.
    inside = {key: value for key, value in trial["values"].items() if _lies_in(value, space[key])}
    told: FrozenTrial = optuna.trial.create_trial(
        params=inside,
        distributions={key: space[key] for key in inside},
        value=trial["value"],
        state=optuna.trial.TrialState.FAIL if trial["value"] is None else optuna.trial.TrialState.COMPLETE,
    )
    return told


def _lies_in(value: float, found: FloatDistribution) -> bool:
    return bool(found.low <= value <= found.high)


def _rounded(value: float, found: Range) -> float:
    """Four digits are plenty, and readable in a table."""
    return min(max(float(f"{value:.4g}"), found.low), found.high)


def _present(recipe: Recipe, key: str) -> float:
    if key == LEARNING_RATE:
        return recipe.train.optimizer.lr
    return float(getattr(recipe.method[0], key.removeprefix("method.")))


def with_values(content: Json, values: Mapping[str, float]) -> Json:
    """A recipe's mapping (one method) with tuned values in their places."""
    method, train = dict(content["method"]), dict(content["train"])
    for key, value in values.items():
        if key == LEARNING_RATE:
            train["optimizer"] = dict(train.get("optimizer", {})) | {"lr": value}
        else:
            method[key.removeprefix("method.")] = value
    return content | {"method": method, "train": train}


def _changed(recipe: Recipe, values: Mapping[str, float]) -> Recipe:
    content = recipe.model_dump(mode="json", exclude_unset=True)
    content["method"] = recipe.method[0].model_dump(mode="json", exclude_unset=True)
    return recipes.load_recipe(with_values(content, values))


def _trial(number: int, recipe: Recipe, values: dict[str, float], folder: Path, metric: str) -> Json:
    trial: Json = {"number": number, "values": values, "value": None, "seconds": 0.0, "error": None}
    try:
        result = finish_run(recipe, folder)
    except Interrupted:
        raise
    except Exception as error:
        return trial | {"error": f"{type(error).__name__}: {error}"}
    value = (result["validation"] or {}).get(metric)
    if value is None or not math.isfinite(value):
        return trial | {
            "seconds": result["train_seconds"],
            "error": f"the run has no finite validation {metric}",
        }
    return trial | {"value": value, "seconds": result["train_seconds"]}


def _optuna() -> Any:
    try:
        import optuna
    except ImportError:
        raise ImportError("tuning needs Optuna; install it with: pip install 'tutelage[search]'") from None
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna
