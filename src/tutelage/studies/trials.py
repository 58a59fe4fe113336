"""Runs every trial of a study. Each one's outcome is one JSON file, so a second call runs only what is missing."""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tutelage.engine.interrupt import Interrupted
from tutelage.recipe import load_recipe
from tutelage.runs.batch import BatchProgress, finish_run, read_json, run_batch, write_json
from tutelage.studies.registry import FoundStudy, find_study
from tutelage.studies.study import Study, with_overrides

THREADS = 1
"""Of every trial, whatever runs beside it: so figures do not depend on ``jobs``."""
TEACHER = "teacher"
RUNS = "runs"
FIXED = {
    "train.threads": THREADS,
    "train.device": "cpu",
    # A trial takes seconds: one that was cut short starts again.
    "train.checkpoint.every": 1_000_000,
    "train.checkpoint.keep": 1,
    "output.report": False,
}


@dataclass(frozen=True)
class Outcome:
    """One trial: metrics after the last epoch, seconds, and why it failed where it did."""

    arm: str
    seed: int
    trial: int
    status: str
    error: str | None = None
    validation: dict[str, float] = field(default_factory=dict)
    test: dict[str, float] = field(default_factory=dict)
    seconds: float = 0.0

    @property
    def label(self) -> str:
        return f"{self.arm}, seed {self.seed}, trial {self.trial}"


def run_study(found: FoundStudy, folder: Path, *, jobs: int, progress: bool) -> list[Outcome]:
    """Outcomes of every trial, the teachers' (arm ``teacher``) included, from ``folder`` or by running them."""
    study = found.study
    teachers = [(TEACHER, seed, number) for seed in study.seeds for number in range(len(study.teachers))]
    trials = [
        (arm, seed, trial) for seed in study.seeds for arm in study.arms for trial in range(study.trials)
    ]
    with BatchProgress(found.name, len(teachers) + len(trials), show=progress) as bar:
        outcomes = list(_run_all(found.name, teachers, folder, jobs, bar, study.metric))
        errors = {(o.seed, o.trial): o.error for o in outcomes if o.status != "done"}
        able = []
        for arm, seed, trial in trials:
            error = errors.get((seed, _teacher_number(study, arm)))
            if error is None:
                able.append((arm, seed, trial))
            else:
                outcomes.append(Outcome(arm, seed, trial, "failed", f"its teacher failed: {error}"))
        outcomes += _run_all(found.name, able, folder, jobs, bar, study.metric)
    return outcomes


def run_trial(name: str, arm: str, seed: int, trial: int, folder: Path) -> dict[str, Any]:
    """Run one trial of the study ``name``, keep its outcome in its folder, and return it as JSON values.

    Whatever stops the trial but an interrupt makes it a failed one.
    """
    place = trial_folder(folder, arm, seed, trial)
    try:
        outcome = _run_arm(find_study(name), arm, seed, trial, folder)
    except Interrupted:
        raise
    except Exception as error:
        outcome = Outcome(arm, seed, trial, "failed", f"{type(error).__name__}: {error}")
    content = asdict(outcome)
    write_json(place / "trial.json", content)
    return content


def run_folder(folder: Path, recipe: Mapping[str, Any]) -> Path:
    """Where a recipe is run: beside the studies' folders, under its content, so that what studies share is run once."""
    content = json.dumps(recipe, sort_keys=True)
    return (folder.parent / RUNS / hashlib.sha256(content.encode()).hexdigest()[:20]).resolve()


def trial_folder(folder: Path, arm: str, seed: int, trial: int) -> Path:
    return folder / arm / f"seed-{seed}" / f"trial-{trial}"


def _run_all(
    name: str, keys: Iterable[tuple[str, int, int]], folder: Path, jobs: int, bar: BatchProgress, metric: str
) -> Iterator[Outcome]:
    missing = []
    for arm, seed, trial in keys:
        kept = read_json(trial_folder(folder, arm, seed, trial) / "trial.json")
        if kept and kept["status"] == "done":
            bar.advance(f"{arm}, seed {seed}, trial {trial}: kept from before")
            yield Outcome(**kept)
        else:
            missing.append((name, arm, seed, trial, folder))
    for position, result in run_batch(run_trial, missing, jobs=jobs):
        if isinstance(result, BrokenProcessPool):
            _, arm, seed, trial, _ = missing[position]
            outcome = Outcome(arm, seed, trial, "failed", f"a worker process died: {result}")
        else:
            outcome = Outcome(**result)
        bar.advance(_line(outcome, metric))
        yield outcome


def _run_arm(found: FoundStudy, arm: str, seed: int, trial: int, folder: Path) -> Outcome:
    study = found.study
    function = None if arm == TEACHER else study.arms[arm].run
    if function is not None:
        place = trial_folder(folder, arm, seed, trial) / "run"
        place.mkdir(parents=True, exist_ok=True)
        started = time.perf_counter()
        test = _finite(function(seed, place))
        return Outcome(arm, seed, trial, "done", test=test, seconds=time.perf_counter() - started)
    recipe = _recipe(study, arm, seed, trial, folder)
    result = finish_run(load_recipe(recipe), run_folder(folder, recipe))
    measured = study.measure(result) if study.measure and arm != TEACHER else {}
    validation, test = _finite(result["validation"] or {}), _finite({**(result["test"] or {}), **measured})
    return Outcome(arm, seed, trial, "done", None, validation, test, result["seconds"])


def _recipe(study: Study, arm: str, seed: int, trial: int, folder: Path) -> dict[str, Any]:
    """What a trial is asked for; of the teachers ``trial`` is the number in ``study.teachers``."""
    if arm == TEACHER:
        return with_overrides(study.teacher_recipe(seed, study.teachers[trial]), FIXED)
    recipe = with_overrides(study.trial_recipe(arm, seed, trial), FIXED)
    if study.teacher:
        taught = _recipe(study, TEACHER, seed, _teacher_number(study, arm), folder)
        recipe["teacher"] = {"run": str(run_folder(folder, taught))}
    return recipe


def _teacher_number(study: Study, arm: str) -> int:
    return study.teachers.index(study.arms[arm].teacher) if study.teacher else 0


def _finite(metrics: Mapping[str, float]) -> dict[str, float]:
    bad = [f"{name} is {value}" for name, value in metrics.items() if not math.isfinite(value)]
    if bad:
        raise ValueError(f"the trial ended with {', '.join(bad)}")
    return {name: float(value) for name, value in metrics.items()}


def _line(outcome: Outcome, metric: str) -> str:
    if outcome.status != "done":
        return f"{outcome.label}: failed: {outcome.error}"
    value = outcome.test.get(metric)
    return f"{outcome.label}: {metric} {'missing' if value is None else format(value, '.4f')} ({outcome.seconds:.1f} s)"
