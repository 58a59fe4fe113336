"""One run, from a recipe to a student on disk."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

import tutelage.recipe as recipes
from tutelage.data import Data
from tutelage.engine.interrupt import Interrupted
from tutelage.engine.method import Method
from tutelage.engine.metrics import MetricsLog
from tutelage.engine.progress import LiveProgress, PlainProgress
from tutelage.engine.progress import progress as show
from tutelage.engine.taps import Tapped, outputs_of
from tutelage.engine.types import Batch, Outputs
from tutelage.engine.views import to_float
from tutelage.models import BuiltModel, load_model, profile_model, save_model
from tutelage.procedures.procedure import Artifacts, Procedure
from tutelage.recipe.schema import Recipe
from tutelage.runs.assemble import Assembly, Remembered, assemble
from tutelage.runs.folder import RunFolder, environment

RecipeSource = Recipe | str | Path | Mapping[str, Any]


@dataclass
class RunResult:
    """A finished run: its folder, what ``result.json`` says, and the plain student in eval mode."""

    folder: Path
    result: dict[str, Any]
    student: nn.Module


def distill(
    recipe: RecipeSource,
    *,
    folder: Path | str | None = None,
    resume: bool = False,
    progress: bool | None = None,
    student: nn.Module | None = None,
    data: Data | None = None,
    callbacks: Iterable[object] = (),
) -> RunResult:
    """Run a recipe to its end.

    Args:
        recipe: a `Recipe`, a mapping, or the name or path of a recipe file.
        folder: where the run is written; else ``output.dir``, else ``runs/<recipe>-<method>-<seed>``.
        resume: go on with what the folder holds; a finished run is read back.
        progress: show it; none: where this is the main process.
        student, data: a model and data from Python, in place of the recipe's.
        callbacks: objects that listen to the run's events (`tutelage.engine.events`).

    Raises:
        RecipeError, PairingError, ValueError: found before anything is written or trained.
        FolderError, RunLockedError: the folder cannot be used.
        Interrupted: the run was asked to stop and can be resumed.
    """
    loaded, title = _load(recipe)
    path = Path(folder or loaded.output.dir or Path("runs") / f"{title}-{_name(loaded)}-{loaded.train.seed}")
    opened = RunFolder(path, loaded, resume=resume)
    finished = opened.result
    if finished is not None and finished["status"] == "done":
        return RunResult(path, finished, load_model(path / "student").module.eval())
    with _threads(loaded.train.threads):
        plan = _dry_run(loaded, student, data)
        with _written(opened, plan.runtime.is_main):
            assembly = assemble(loaded, student=student, data=plan.data)
            display = progress is not False and assembly.runtime.is_main
            return _run(assembly, path, opened, display, tuple(callbacks))


def check(
    recipe: RecipeSource, *, student: nn.Module | None = None, data: Data | None = None
) -> dict[str, Any]:
    """Check everything that a run needs, and spend nothing: recipe, pairing, models, and one dry batch.

    Returns:
        A plan: models, rows, steps, and the terms of the dry batch.

    Raises:
        RecipeError, PairingError, ValueError: what a run would refuse.
    """
    loaded, _ = _load(recipe)
    with _threads(loaded.train.threads):
        assembly = _dry_run(loaded, student, data)
        trainer = assembly.trainer(None) if isinstance(assembly.method, Method) else None
        return {
            "method": assembly.name,
            "student": {"model": loaded.student.model, "parameters": _parameters(assembly.student.module)},
            "teachers": {
                name: {
                    "model": assembly.teacher_models[name].name,
                    "parameters": _parameters(teacher.held.model),
                }
                for name, teacher in assembly.teachers.items()
            },
            "data": assembly.data.describe(),
            "device": str(assembly.runtime.device),
            "steps": trainer.total_steps if trainer else None,
            "dry_terms": trainer.dry_step() if trainer else {},
        }


def resume(folder: Path | str, *, progress: bool | None = None) -> RunResult:
    """Go on with the run in a folder, by the recipe that is saved there.

    Raises:
        FileNotFoundError: the folder holds no run.
    """
    saved = Path(folder) / "recipe.yaml"
    if (Path(folder) / "comparison.json").exists():
        raise ValueError(
            f"{folder} holds a comparison; `tutelage compare` with the same --dir goes on with it"
        )
    if not saved.exists():
        raise FileNotFoundError(
            f"{folder} holds no run (no recipe.yaml); give the folder that `tutelage run` printed"
        )
    return distill(saved, folder=folder, resume=True, progress=progress)


def _load(recipe: RecipeSource) -> tuple[Recipe, str]:
    if isinstance(recipe, Recipe):
        return recipe, "run"
    title = Path(recipe).stem if isinstance(recipe, (str, Path)) else "run"
    return recipes.load_recipe(recipe), title


def _name(recipe: Recipe) -> str:
    return "+".join(method.name for method in recipe.method)


def _dry_run(recipe: Recipe, student: nn.Module | None, data: Data | None) -> Assembly:
    """Everything but the teachers' training, and one batch; an error here has cost nothing."""
    assembly = assemble(recipe, student=student, data=data, dry=True)
    if isinstance(assembly.method, Method):
        assembly.trainer(None).dry_step()
    else:
        rows = to_float(
            assembly.data.train.fetch(list(range(min(recipe.train.batch_size, len(assembly.data.train)))))
        )
        assembly.task.check(rows, None)
    return assembly


def _run(
    assembly: Assembly, path: Path, opened: RunFolder, display: bool, listeners: tuple[object, ...]
) -> RunResult:
    started = time.perf_counter()
    main = assembly.runtime.is_main
    log = MetricsLog(path, assembly.recipe.output.trackers) if main else None
    if main:
        opened.write_json("environment.json", environment(assembly.runtime.device))
    shown = show(f"{assembly.name} seed {assembly.recipe.train.seed}") if display else None
    own = tuple(callback for callback in (log, shown) if callback is not None)
    status, error = "failed", None
    try:
        outcome = _train(assembly, path, (*own, *listeners), display)
        status = "done"
    except Interrupted:
        status = "stopped"
        raise
    except Exception as caught:
        error = f"{type(caught).__name__}: {caught}"
        raise
    finally:
        for callback in own:
            callback.close()  # type: ignore[attr-defined]
        if status != "done" and main:
            opened.write_json("result.json", {"status": status, "error": error, **_identity(assembly)})
    if not main:
        return RunResult(path, outcome.result, outcome.student)
    outcome.result |= {"status": status, "error": None, "seconds": time.perf_counter() - started}
    save_model(outcome.built._replace(module=outcome.student), path / "student")
    opened.write_json("result.json", outcome.result)
    if assembly.recipe.output.report:
        from tutelage.report import write_report

        write_report([path])
    return RunResult(path, outcome.result, outcome.student)


@dataclass
class _Outcome:
    result: dict[str, Any]
    student: nn.Module
    built: BuiltModel


def _train(assembly: Assembly, path: Path, callbacks: tuple[object, ...], display: bool) -> _Outcome:
    result = _identity(assembly)
    if isinstance(assembly.method, Procedure):
        artifacts = assembly.method.run(
            assembly.procedure_run(path, show_progress=display, callbacks=_own(callbacks))
        )
        result |= _procedure_result(artifacts)
        student = artifacts.student or assembly.student.module
    else:
        trainer = assembly.trainer(path / "checkpoints", callbacks)
        trainer.fit()
        student = trainer.finished()
        progress = trainer.progress
        result |= {
            "steps": trainer.step,
            "epochs": trainer.step / trainer.loader.steps_per_epoch,
            "train_seconds": progress.seconds,
            "stopped_early": progress.stopped_early,
            "best": {
                "step": progress.best_step,
                "metric": assembly.best_metric(),
                "value": _best_value(assembly, progress.best),
            },
        } | _evaluations(assembly, student)
        for callback in callbacks:
            if isinstance(callback, MetricsLog):
                for split in ("validation", "test"):
                    if result[split]:
                        callback.evaluation(split, trainer.step, trainer.epoch, result[split])
    result["student"] = {
        "model": assembly.recipe.student.model,
        **_profile(assembly, student, assembly.student),
    }
    for name, model in assembly.teacher_models.items():
        teacher = result["teachers"].setdefault(name, {})
        teacher |= {
            "model": model.name,
            **_profile(assembly, assembly.teachers[name].held.model, model.built),
        }
    return _Outcome(result, student, assembly.student)


def _own(callbacks: tuple[object, ...]) -> tuple[object, ...]:
    """The user's callbacks: a procedure's Trainers bring log and display of their own."""
    return tuple(c for c in callbacks if not isinstance(c, (MetricsLog, LiveProgress, PlainProgress)))


def _identity(assembly: Assembly) -> dict[str, Any]:
    return {
        "name": assembly.name,
        "methods": [method.name for method in assembly.recipe.method],
        "seed": assembly.recipe.train.seed,
        "data": assembly.data.describe(),
        "versions": {"torch": torch.__version__},
        "teachers": {},
        "tables": {},
    }


def _procedure_result(artifacts: Artifacts) -> dict[str, Any]:
    tables = {
        name: {"columns": table.columns, "rows": table.rows} for name, table in artifacts.tables.items()
    }
    return {"test": artifacts.metrics, "validation": {}, "tables": tables, **artifacts.figures}


def _evaluations(assembly: Assembly, student: nn.Module) -> dict[str, Any]:
    """Metrics of what ships, and of the teachers, on validation and test data. Agreement is with the first teacher."""
    device = assembly.runtime.device
    held = Tapped(student, mean=assembly.student.mean, std=assembly.student.std).to(device).eval()

    def predict(batch: Batch) -> Outputs:
        with torch.no_grad(), assembly.runtime.autocast():
            return outputs_of(held(batch.inputs))

    # Ids are unique within a split only, so each split is remembered apart.
    on_validation = next((Remembered(teacher) for teacher in assembly.teachers.values()), None)
    validation = assembly.evaluate(predict, assembly.data.validation, on_validation)
    remembered = {name: Remembered(teacher) for name, teacher in assembly.teachers.items()}
    test = assembly.evaluate(predict, assembly.data.test, next(iter(remembered.values()), None))
    teachers = {
        name: {"test": assembly.evaluate(teacher, assembly.data.test)} for name, teacher in remembered.items()
    }
    return {"validation": validation, "test": test or None, "teachers": teachers}


def _profile(assembly: Assembly, module: nn.Module, built: BuiltModel) -> dict[str, Any]:
    row = to_float(assembly.data.train.fetch([0]).to(assembly.runtime.device))
    inputs = Tapped(module, mean=built.mean, std=built.std).to(assembly.runtime.device).normalise(row.inputs)
    return dict(profile_model(module.eval(), inputs)._asdict())


def _best_value(assembly: Assembly, value: float | None) -> float | None:
    metric = assembly.best_metric()
    if value is None or metric is None:
        return None
    return value if assembly.task.higher_is_better[metric] else -value


def _parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


@contextmanager
def _written(opened: RunFolder, main: bool) -> Iterator[None]:
    """The main process holds the folder; the others only read."""
    if not main:
        yield
        return
    with opened:
        yield


@contextmanager
def _threads(count: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    if count is not None:
        torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
