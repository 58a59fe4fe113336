"""`Study`: a published claim, and how it is put to the test. All of it is fixed before the first run.

A method's folder has ``study.py`` with ``STUDIES = {"<catalogue name>": Study(...)}``. Methods are named through the
registry, in the recipes of the arms; a study never imports one.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tutelage.runs.statistics import Difference, paired_difference

LEAST_SEEDS = 5
NAME = re.compile(r"[a-z0-9][a-z0-9+_.-]*")

Overrides = Mapping[str, Any]
"""Dotted recipe keys and the values that one trial gives them: ``{"train.optimizer.lr": 0.1}``; a number is a place in
a list: ``{"method.1.loss_weight": 2.0}``."""

Measure = Callable[[Mapping[str, Any]], Mapping[str, float]]
"""From what a trial's ``result.json`` holds (tables, teachers), further figures that stand beside its test metrics."""

RunArm = Callable[[int, Path], Mapping[str, float]]
"""An arm that is no recipe: a seed and a folder of its own in, test metrics out."""


@dataclass(frozen=True)
class Arm:
    """One way to train, run once a seed and trial.

    Attributes:
        method: the recipe's method entry: a catalogue name, a mapping of a name and its options, or several of those
            (methods combined).
        grid: overrides of the study's recipe, one mapping a trial. The trial with the best validation metric is chosen
            for each seed; of equal ones the first, so the published setting stands first.
        run: in place of a recipe, where an arm is no training run; then there is one trial and no tuning.
        teacher: overrides of the study's teacher, where the arm has another one.
    """

    method: str | Mapping[str, Any] | Sequence[Mapping[str, Any]] | None = None
    grid: tuple[Overrides, ...] = ({},)
    run: RunArm | None = None
    teacher: Overrides = field(default_factory=dict)

    def __post_init__(self) -> None:
        if (self.method is None) == (self.run is None):
            raise ValueError(
                "an Arm has either a method (it is run by the study's recipe) or a function `run`"
            )
        if not self.grid:
            raise ValueError(
                "an Arm's grid needs at least one trial; the empty mapping is the recipe as it is"
            )
        if self.run is not None and self.grid != ({},):
            raise ValueError("an Arm with a function `run` has no grid: overrides belong to recipes")


@dataclass(frozen=True)
class Comparison:
    """``arm`` against ``baseline``, paired over seeds, in one metric of the test data (none: the study's own)."""

    arm: str
    baseline: str
    claim: str
    metric: str | None = None
    higher_is_better: bool = True


class Results:
    """Test metrics of the chosen trials: what a `Study`'s ``falsified`` reads."""

    def __init__(self, metrics: Mapping[str, Sequence[Mapping[str, float]]]) -> None:
        self._metrics = metrics

    def values(self, arm: str, metric: str) -> list[float]:
        """One value a seed, in the order of the study's seeds. A KeyError names what is missing."""
        rows = self._metrics[arm]
        for row in rows:
            if metric not in row:
                raise KeyError(
                    f"arm `{arm}` has no metric {metric!r}; it has {', '.join(sorted(row)) or 'none'}"
                )
        return [float(row[metric]) for row in rows]

    def difference(self, arm: str, baseline: str, metric: str) -> Difference:
        """Paired differences ``arm - baseline`` over the seeds, as they are: above 0 means higher, not better."""
        return paired_difference(self.values(arm, metric), self.values(baseline, metric))


@dataclass(frozen=True)
class Study:
    """One claim and its test.

    Attributes:
        claim: the claim in one sentence.
        primary: arm and baseline whose paired difference in ``metric`` gives the verdict.
        beyond: a second pair, where the claim is that a gain grows: the verdict is then on how much larger the primary
            pair's difference is than this one's.
        arms: every arm by name, which names its folder too; all have the same number of trials.
        metric: primary metric of the test data, taken after the last epoch.
        higher_is_better: of ``metric``.
        margin: what the low end of the interval must pass for ``holds``; 0 where the card leaves it to be confirmed.
        selection: validation metric that chooses among trials; None: ``metric``. Higher is better as for ``metric``.
        seeds: at least five; one pair a seed.
        recipe: what all arms share, as a mapping without ``method`` and ``teacher``.
        teacher: recipe of the teacher, trained once a seed; None: no arm has one.
        seeded: dotted keys of ``recipe`` (and, but for ``method.*``, of ``teacher``) that are set to the seed.
        secondary: further comparisons, reported beside the verdict.
        measure: further figures of every trial; comparisons and ``falsified`` may name them.
        falsified_if: the card's own condition in words; ``falsified`` computes it.
    """

    claim: str
    primary: tuple[str, str]
    arms: Mapping[str, Arm]
    falsified_if: str
    falsified: Callable[[Results], bool]
    beyond: tuple[str, str] | None = None
    metric: str = "accuracy"
    higher_is_better: bool = True
    margin: float = 0.0
    selection: str | None = None
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    recipe: Mapping[str, Any] = field(default_factory=dict)
    teacher: Mapping[str, Any] | None = None
    seeded: tuple[str, ...] = ("data.seed", "train.seed")
    secondary: tuple[Comparison, ...] = ()
    measure: Measure | None = None

    def __post_init__(self) -> None:
        if len(set(self.seeds)) != len(self.seeds) or len(self.seeds) < LEAST_SEEDS:
            raise ValueError(f"seeds are {self.seeds}; a study has at least {LEAST_SEEDS}, all different")
        if not (math.isfinite(self.margin) and self.margin >= 0):
            raise ValueError(f"margin is {self.margin}; allowed: 0 and above")
        for name in self.arms:
            if not NAME.fullmatch(name) or name == "teacher":
                raise ValueError(
                    f"arm {name!r}: small letters, digits and + - _ . make a name; `teacher` is taken"
                )
        compared = (name for pair in self.secondary for name in (pair.arm, pair.baseline))
        for name in (*self.primary, *(self.beyond or ()), *compared):
            if name not in self.arms:
                near = difflib.get_close_matches(name, self.arms, n=1)
                hint = f"; nearest: {near[0]}" if near else ""
                raise ValueError(f"no arm named {name!r}; arms are {', '.join(self.arms)}{hint}")
        trials = {name: len(arm.grid) for name, arm in self.arms.items()}
        if len(set(trials.values())) > 1:
            raise ValueError(f"every arm has the same tuning budget; trials are {trials}")

    @property
    def trials(self) -> int:
        """Trials of each arm and seed."""
        return len(next(iter(self.arms.values())).grid)

    def trial_recipe(self, arm: str, seed: int, trial: int) -> dict[str, Any]:
        """The recipe of one trial as a mapping, still without its teacher."""
        chosen = self.arms[arm]
        method = {"name": chosen.method} if isinstance(chosen.method, str) else chosen.method
        recipe = with_overrides({**self.recipe, "method": method}, dict.fromkeys(self.seeded, seed))
        return with_overrides(recipe, chosen.grid[trial])

    @property
    def teachers(self) -> tuple[Overrides, ...]:
        """Overrides of each teacher, that of most arms first: none of them."""
        if self.teacher is None:
            return ()
        others = [arm.teacher for arm in self.arms.values() if arm.teacher]
        return ({}, *(own for place, own in enumerate(others) if own not in others[:place]))

    def teacher_recipe(self, seed: int, overrides: Overrides | None = None) -> dict[str, Any]:
        """The teacher's recipe for one seed. Raises ValueError where the study has no teacher."""
        if self.teacher is None:
            raise ValueError("this study has no teacher")
        keys = [key for key in self.seeded if not key.startswith("method.")]
        return with_overrides(self.teacher, {**dict.fromkeys(keys, seed), **(overrides or {})})


def with_overrides(recipe: Mapping[str, Any], overrides: Overrides) -> dict[str, Any]:
    """A deep copy of ``recipe`` in which each dotted key of ``overrides`` has its value."""
    copy: dict[str, Any] = _copied(recipe)
    for key, value in overrides.items():
        *path, last = key.split(".")
        place: Any = copy
        for name in path:
            place = place[int(name)] if isinstance(place, list) else place.setdefault(name, {})
            if not isinstance(place, dict | list):
                raise ValueError(f"override {key!r}: {name!r} holds {place!r}, not a mapping")
        place[int(last) if isinstance(place, list) else last] = value
    return copy


def _copied(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _copied(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_copied(entry) for entry in value]
    return value
