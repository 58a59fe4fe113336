"""`compare`: several methods under one recipe, with the same seeds and the same budget, against a baseline."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import tutelage.recipe as recipes
from tutelage.engine.checkpoint import FolderLock
from tutelage.engine.interrupt import Interrupted
from tutelage.recipe.schema import Recipe
from tutelage.runs.batch import (
    BatchProgress,
    Json,
    finish_run,
    finished_result,
    read_json,
    run_batch,
    write_json,
    write_text,
)
from tutelage.runs.comparison import Key, Plan, finite_metrics, make_plan, summarise
from tutelage.runs.folder import FolderError

FILE = "comparison.json"


def compare(
    recipe: Recipe | Mapping[str, Any] | Path | str,
    *,
    methods: Sequence[str | Mapping[str, Any]],
    seeds: int | Sequence[int],
    baseline: str | None = None,
    folder: Path | str | None = None,
    jobs: int = 1,
    progress: bool | None = None,
) -> Json:
    """Run every method with every seed; write ``comparison.json``, the shared ``recipe.yaml`` and the report.

    All runs share the recipe, so the budget; run ``<folder>/<method>/seed-<n>`` has ``train.seed`` n, so that methods
    are paired over seeds. A second call keeps finished runs, resumes half ones, tries failed ones again, and may add
    methods and seeds. A run that fails stands in the table as failed with its error, and the others go on. A teacher
    that comes from a recipe is trained once.

    Args:
        recipe: a `Recipe`, a mapping, or the name or path of a recipe file; its own method and seed are not used.
        methods: catalogue names, or mappings of a name and its options. A name that comes twice gets its options into
            its label.
        seeds: how many (0, 1, …), or which.
        baseline: label of the method that the others are held against; left out: ``none`` where it is there, else the
            first.
        folder: where all is written; left out: the recipe's ``output.dir``, else ``runs/compare-<recipe>``.
        jobs: runs side by side, each in a process of its own. A run has ``train.threads`` threads (1 where the recipe
            leaves them out) whatever ``jobs`` is, so the figures do not depend on it; the seconds may.
        progress: show progress on standard error; left out: yes.

    Returns:
        What ``comparison.json`` holds.

    Raises:
        RecipeError, ValueError: found before anything is written or trained.
        FolderError: the folder holds another comparison, or something else.
        RunLockedError: another comparison works in the folder.
        Interrupted, KeyboardInterrupt: stopped; the same call goes on.
    """
    if jobs < 1:
        raise ValueError(f"jobs is {jobs}; allowed: 1 and above")
    plan = make_plan(recipe, methods, seeds, baseline)
    path = Path(folder or plan.base.output.dir or Path("runs") / f"compare-{_title(recipe)}")
    before = _check_folder(path, plan)
    runs = _runs_before(path, plan)
    started = time.perf_counter()
    with FolderLock(path), BatchProgress("run", len(plan.recipes), show=progress is not False) as bar:
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
    calls = [(plan.recipes[key], _place(key), path / _place(key), plan.metric) for key in keys]
    for position, run in run_batch(run_once, calls, jobs=jobs):
        key = keys[position]
        if isinstance(run, BrokenProcessPool):
            run = _failed(key[1], _place(key), f"its process died: {run}")
        yield key, run


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
    if (_shared(saved["recipe"]), saved["teachers"]) != (
        _shared(plan.base.model_dump(mode="json")),
        plan.teachers,
    ):
        raise FolderError(f"{path} holds a comparison under another recipe; give another folder")
    return float(saved["seconds"])


def _shared(recipe: Json) -> Json:
    """What all runs of a comparison have in common."""
    train = {key: value for key, value in recipe["train"].items() if key != "seed"}
    return {key: value for key, value in recipe.items() if key not in ("method", "output")} | {"train": train}


def _write(path: Path, plan: Plan, runs: Mapping[Key, Json], seconds: float) -> Json:
    done = [key for key in plan.recipes if key in runs and runs[key]["status"] == "done"]
    first = (read_json(path / _place(done[0]) / "result.json") or {}) if done else {}
    environment = read_json(path / _place(done[0]) / "environment.json") if done else None
    table = {
        "version": 1,
        "recipe": plan.base.model_dump(mode="json"),
        "metric": plan.metric,
        "higher_is_better": plan.higher_is_better,
        "split": "test" if first.get("test") else "validation",
        "baseline": plan.baseline,
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
