"""`compare`: several methods under one recipe, with the same seeds and the same budget, against a baseline."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import torch

import tutelage.recipe as recipes
from tutelage import catalogue
from tutelage.engine.checkpoint import FolderLock
from tutelage.engine.interrupt import Interrupted
from tutelage.engine.needs import Needs
from tutelage.recipe.schema import Recipe
from tutelage.runs.batch import (
    BatchProgress,
    Json,
    finish_run,
    finished_result,
    read_json,
    run_batch,
    usable_cores,
    write_json,
    write_text,
)
from tutelage.runs.comparison import finite_metrics, summarise
from tutelage.runs.folder import FolderError
from tutelage.runs.plan import Key, Methods, Plan, make_plan
from tutelage.runs.tuning import tune

FILE = "comparison.json"


def compare(
    recipe: Recipe | Mapping[str, Any] | Path | str,
    *,
    methods: Methods | None = None,
    seeds: int | Sequence[int] | None = None,
    baseline: str | None = None,
    folder: Path | str | None = None,
    jobs: int | None = None,
    trials: int | None = None,
    progress: bool | None = None,
) -> Json:
    """Run every method with every seed; write ``comparison.json``, the shared ``recipe.yaml`` and the report.

    All runs share the recipe, so the budget; run ``<folder>/<method>/seed-<n>`` has ``train.seed`` n, so that methods
    are paired over seeds. A second call keeps finished runs, resumes half ones, tries failed ones again, and may add
    methods and seeds. A run that fails stands in the table as failed with its error, and the others go on. A teacher
    that comes from a recipe is trained once.

    Args:
        recipe: a `Recipe`, a mapping, or the name or path of a recipe file; its own method and seed are not used.
        methods: catalogue names, mappings of a name and its options, or ``all``: every method of one training loop that
            the recipe suits. A name that comes twice gets its options into its label. Left out, as the seeds, the
            baseline and the trials: what the recipe's ``compare`` part says.
        seeds: how many (0, 1, …), or which.
        baseline: label of the method that the others are held against; left out: ``none`` where it is there, else the
            first.
        folder: where all is written; left out: the recipe's ``output.dir``, else ``runs/compare-<recipe>``.
        jobs: runs side by side, each in a process of its own. A run has ``train.threads`` threads (1 where the recipe
            leaves them out) whatever ``jobs`` is, so the figures do not depend on it; the seconds may. Left out: as
            many as the processor has cores for; 1 on an accelerator.
        trials: runs that each method gets for tuning its learning rate and what its ``Config.search()`` names, on
            validation data alone, with a seed that is not compared; the first is the recipe as it stands. 0: nothing
            is tuned. The JSON says what was tried, in which ranges, and the seconds.
        progress: show progress on standard error; left out: yes.

    Returns:
        What ``comparison.json`` holds.

    Raises:
        RecipeError, ValueError: found before anything is written or trained.
        FolderError: the folder holds another comparison, or something else.
        RunLockedError: another comparison works in the folder.
        Interrupted, KeyboardInterrupt: stopped; the same call goes on.
    """
    if jobs is not None and jobs < 1:
        raise ValueError(f"jobs is {jobs}; allowed: 1 and above")
    plan = make_plan(recipe, methods, seeds, baseline, trials)
    jobs = jobs or _side_by_side(plan.base)
    path = Path(folder or plan.base.output.dir or Path("runs") / f"compare-{_title(recipe)}")
    before = _check_folder(path, plan)
    started = time.perf_counter()
    total = len(plan.recipes) + (len(plan.options) if plan.trials else 0)
    with FolderLock(path), BatchProgress("run", total, show=progress is not False) as bar:
        if plan.trials:
            _write(path, plan, {}, before)
            plan = plan.tuned(_tune(path, plan, jobs, bar))
        runs = _runs_before(path, plan)
        for (label, seed), run in runs.items():
            bar.advance(_line(label, seed, run, plan.metric) + ", from before")
        table = _write(path, plan, runs, before)
        write_text(path / "recipe.yaml", recipes.dump(plan.base))
        for key, run in _missing_runs(path, plan, runs, jobs):
            runs[key] = run
            table = _write(path, plan, runs, before + time.perf_counter() - started)
            bar.advance(_line(*key, run, plan.metric))
    if plan.base.output.report:
        from tutelage.report import write_report

        write_report([path])
    return table


def tune_once(plan: Plan, label: str, folder: Path) -> Json:
    """One method's search: what `tune` gives."""
    recipe, given = plan.trial(label), plan.options[label]
    return tune(recipe, given, plan.trials, folder, plan.metric, plan.higher_is_better)


def _tune(path: Path, plan: Plan, jobs: int, bar: BatchProgress) -> dict[str, Json]:
    labels = list(plan.options)
    found: dict[str, Json] = {}
    for position, tuning in run_batch(
        tune_once, [(plan, label, path / label) for label in labels], jobs=jobs
    ):
        if isinstance(tuning, BrokenProcessPool):
            raise tuning
        label = labels[position]
        found[label] = tuning
        bar.advance(
            f"{label}: {plan.trials} trials in {tuning['seconds']:.1f} s, chosen {_values(tuning['chosen'])}"
        )
    return {label: found[label] for label in labels}


def _values(chosen: Mapping[str, float] | None) -> str:
    if chosen is None:
        return "none: every trial failed"
    return ", ".join(f"{key.removeprefix('method.')} {value:.4g}" for key, value in chosen.items())


def _side_by_side(recipe: Recipe) -> int:
    """As many runs as the processor has cores for; an accelerator has one at a time."""
    device = recipe.train.device
    if device != "cpu" and (device != "auto" or torch.accelerator.is_available()):
        return 1
    return max(1, usable_cores() // (recipe.train.threads or 1))


def run_once(recipe: Recipe, place: str, folder: Path, metric: str) -> Json:
    """One run's entry in the table. Whatever stops the run, but an interrupt, makes it a failed one."""
    try:
        result = finish_run(recipe, folder)
    except Interrupted:
        raise
    except Exception as error:
        return _failed(recipe.train.seed, place, f"{type(error).__name__}: {error}")
    return _entry(recipe.train.seed, place, result, metric)


def _missing_runs(path: Path, plan: Plan, runs: Mapping[Key, Json], jobs: int) -> Iterator[tuple[Key, Json]]:
    # By seed first: after each seed the table is complete for the seeds so far.
    keys = [(label, seed) for seed in plan.seeds for label in plan.options if (label, seed) not in runs]
    for label, seed in [key for key in keys if _is_hopeless(plan, key[0])]:
        keys.remove((label, seed))
        last = plan.tuning[label]["trials"][-1]["error"]
        yield (
            (label, seed),
            _failed(seed, _place((label, seed)), f"every tuning trial failed; the last: {last}"),
        )
    calls = [(plan.recipes[key], _place(key), path / _place(key), plan.metric) for key in keys]
    for position, run in run_batch(run_once, calls, jobs=jobs):
        key = keys[position]
        if isinstance(run, BrokenProcessPool):
            run = _failed(key[1], _place(key), f"its process died: {run}")
        yield key, run


def _is_hopeless(plan: Plan, label: str) -> bool:
    return bool(plan.tuning) and plan.tuning[label]["chosen"] is None


def _runs_before(path: Path, plan: Plan) -> dict[Key, Json]:
    """Entries of the runs that are done. Every folder of another recipe is refused here, before anything runs."""
    found = {key: finished_result(recipe, path / _place(key)) for key, recipe in plan.recipes.items()}
    return {
        key: _entry(key[1], _place(key), result, plan.metric)
        for key, result in found.items()
        if result is not None
    }


def _check_folder(path: Path, plan: Plan) -> float:
    """Seconds that earlier calls spent in this folder.

    Raises:
        FolderError: it cannot hold this comparison.
    """
    if path.exists() and not path.is_dir():
        raise FolderError(f"{path} is a file; give a folder")
    saved = read_json(path / FILE)
    if saved is None:
        if path.is_dir() and any(child.name not in (".lock", f".tmp-{FILE}") for child in path.iterdir()):
            raise FolderError(f"{path} is not empty and holds no comparison; give another folder")
        return 0.0
    try:
        shared, teachers = _shared(saved["recipe"]), saved["teachers"]
        trials, seconds = saved["trials"], float(saved["seconds"])
    except (LookupError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise FolderError(
            f"{path / FILE} holds what no comparison writes ({type(error).__name__}: {error}); give another folder"
        ) from error
    if (shared, teachers) != (_shared(plan.base.model_dump(mode="json")), plan.teachers):
        raise FolderError(f"{path} holds a comparison under another recipe; give another folder")
    if trials != plan.trials:
        raise FolderError(
            f"{path} holds a comparison with {trials} tuning trials a method, not {plan.trials}; "
            "give another folder"
        )
    return seconds


def _shared(recipe: Json) -> Json:
    """What all runs of a comparison have in common."""
    train = {key: value for key, value in recipe["train"].items() if key != "seed"}
    return {key: value for key, value in recipe.items() if key not in ("method", "output", "compare")} | {
        "train": train
    }


def _write(path: Path, plan: Plan, runs: Mapping[Key, Json], seconds: float) -> Json:
    done = [key for key in plan.recipes if key in runs and runs[key]["status"] == "done"]
    # A teacher that learns beside a student is not the one that the others share.
    done.sort(key=lambda key: _trains_its_teacher(plan.options[key[0]]["name"]))
    first = (read_json(path / _place(done[0]) / "result.json") or {}) if done else {}
    environment = read_json(path / _place(done[0]) / "environment.json") if done else None
    table = {
        "version": 1,
        "recipe": plan.base.model_dump(mode="json"),
        "metric": plan.metric,
        "higher_is_better": plan.higher_is_better,
        "split": "test" if first.get("test") else "validation",
        "baseline": plan.baseline,
        "trials": plan.trials,
        "teachers": dict(plan.teachers),
        "seeds": list(plan.seeds),
        "teacher": next(iter(first.get("teachers", {}).values()), None),
        "student": first.get("student"),
        "methods": summarise(plan, runs),
        "environment": environment,
        "seconds": round(seconds, 2),
    }
    write_json(path / FILE, table)
    return table


def _trains_its_teacher(name: str) -> bool:
    needs: Needs = catalogue.load(name).needs
    return needs.teacher == "trained"


def _entry(seed: int, place: str, result: Json, metric: str) -> Json:
    metrics = finite_metrics(result)
    value = metrics.get(metric)
    if value is None:
        return _failed(seed, place, f"the run has no finite {metric}")
    return {
        "seed": seed,
        "status": "done",
        "value": value,
        "metrics": metrics,
        "seconds": result.get("train_seconds"),
        "folder": place,
        "error": None,
    }


def _failed(seed: int, place: str, error: str) -> Json:
    nothing: Json = {"value": None, "metrics": {}, "seconds": None}
    return {"seed": seed, "status": "failed", **nothing, "folder": place, "error": error}


def _place(key: Key) -> str:
    return f"{key[0]}/seed-{key[1]}"


def _line(label: str, seed: int, run: Json, metric: str) -> str:
    if run["status"] != "done":
        return f"{label}, seed {seed}: failed: {run['error']}"
    seconds = "" if run["seconds"] is None else f" ({run['seconds']:.1f} s)"
    return f"{label}, seed {seed}: {metric} {run['value']:.4f}{seconds}"


def _title(recipe: object) -> str:
    return Path(recipe).stem if isinstance(recipe, str | Path) else "recipe"
