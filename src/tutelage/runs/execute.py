"""One run, from a recipe to a student on disk."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

import tutelage.recipe as recipes
from tutelage.data import Data
from tutelage.engine.interrupt import Interrupted
from tutelage.engine.method import Method
from tutelage.engine.metrics import MetricsLog
from tutelage.engine.progress import progress as display
from tutelage.engine.quantize import floats, release
from tutelage.engine.runtime import Runtime
from tutelage.engine.taps import Tapped, outputs_of
from tutelage.engine.types import Batch, Outputs, Table
from tutelage.engine.views import to_float
from tutelage.engine.writing import UnwrittenError, writing
from tutelage.models import BuiltModel, load_model, profile_model, save_model
from tutelage.procedures.procedure import Artifacts, Procedure
from tutelage.recipe.schema import Recipe
from tutelage.runs.analysis import analyse
from tutelage.runs.assemble import Assembly, Remembered, assemble
from tutelage.runs.checks import check_rows
from tutelage.runs.embeddings import embeddings
from tutelage.runs.folder import RunFolder

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
        progress: show it, and that of a teacher trained first; left out: yes. The main process alone shows any.
        student, data: a model and data from Python, in place of the recipe's.
        callbacks: objects that listen to the run's events (`tutelage.engine.events`).

    Raises:
        RecipeError, PairingError, ValueError: found before anything is written or trained.
        FolderError, RunLockedError: the folder cannot be used.
        Interrupted: the run was asked to stop and can be resumed.
    """
    loaded, title = load_source(recipe)
    path = Path(folder or loaded.output.dir or Path("runs") / f"{title}-{_name(loaded)}-{loaded.train.seed}")
    with cpu_threads(loaded.train.threads):
        runtime = Runtime.of(loaded.train)
        with runtime.naming_the_silent():
            opened = RunFolder(path, loaded, runtime, resume=resume)
            if not opened.finished():
                tried = _dry_run(loaded, student, data).assembly.data
                with opened:
                    if not opened.finished():  # another process may have ended it meanwhile
                        assembly = assemble(loaded, student=student, data=tried, show_progress=progress)
                        return _run(assembly, opened, progress is not False, tuple(callbacks))
            result = opened.finished()
            assert result is not None
            built = load_model(path / "student", trust_remote_code=loaded.student.trust_remote_code)
            return RunResult(path, result, built.module.eval())


def check(
    recipe: RecipeSource, *, student: nn.Module | None = None, data: Data | None = None
) -> dict[str, Any]:
    """Check everything that a run needs, and spend nothing: recipe, pairing, models, and one dry batch.

    Returns:
        A plan: models, rows, steps, and the terms of the dry batch.

    Raises:
        RecipeError, PairingError, ValueError: what a run would refuse.
    """
    loaded, _ = load_source(recipe)
    with cpu_threads(loaded.train.threads):
        assembly, steps, terms = _dry_run(loaded, student, data)
        return {
            "method": assembly.name,
            "student": {"model": loaded.student.model, "parameters": _parameters(assembly.student.module)},
            "teachers": {
                name: {"model": model.name, "parameters": model.parameters}
                for name, model in assembly.teacher_models.items()
            },
            "data": assembly.data.describe(),
            "device": str(assembly.runtime.device),
            "steps": steps,
            "dry_terms": terms,
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


def load_source(recipe: RecipeSource) -> tuple[Recipe, str]:
    """The recipe, and a title for what is made of it."""
    if isinstance(recipe, Recipe):
        return recipe, "run"
    title = Path(recipe).stem if isinstance(recipe, (str, Path)) else "run"
    return recipes.load_recipe(recipe), title


def _name(recipe: Recipe) -> str:
    return "+".join(method.name for method in recipe.method)


class _DryRun(NamedTuple):
    assembly: Assembly
    steps: int | None
    terms: dict[str, float]


def _dry_run(recipe: Recipe, student: nn.Module | None, data: Data | None) -> _DryRun:
    """Everything but the teachers' training, and one batch; an error here has cost nothing."""
    assembly = assemble(recipe, student=student, data=data, dry=True)
    check_rows(assembly.data, assembly.task)
    if isinstance(assembly.method, Method):
        trainer = assembly.trainer(None)
        return _DryRun(assembly, trainer.total_steps, trainer.dry_step())
    rows = to_float(
        assembly.data.train.fetch(list(range(min(recipe.train.batch_size, len(assembly.data.train)))))
    )
    assembly.task.check(rows, None)
    with closing(assembly.procedure_run(None, show_progress=False)) as work:
        assembly.method.check(work)
    return _DryRun(assembly, None, {})


def _run(
    assembly: Assembly, opened: RunFolder, show_progress: bool, listeners: tuple[object, ...]
) -> RunResult:
    started = time.perf_counter()
    own: list[Any] = []
    one_loop = isinstance(assembly.method, Method)  # a procedure's stages log and show for themselves
    if assembly.runtime.is_main and one_loop:
        own.append(MetricsLog(opened.path, assembly.recipe.output.trackers))
        if show_progress:
            own.append(display(f"{assembly.name} seed {assembly.recipe.train.seed}"))
    opened.note_environment(assembly.runtime.device)
    result, ending = _identity(assembly), {"status": "failed", "error": None}
    try:
        with assembly.runtime.naming_the_silent():
            student, models = _train(assembly, opened.path, result, (*own, *listeners), show_progress)
        ending["status"] = "done"
    except Interrupted:
        ending["status"] = "stopped"
        raise
    except Exception as error:
        ending["error"] = f"{type(error).__name__}: {error}"
        raise
    finally:
        for callback in own:
            callback.close()
        if ending["status"] != "done":
            with suppress(UnwrittenError):  # what ended the run is what is told
                opened.write_json("result.json", ending | _identity(assembly))
    result |= ending

    def finish() -> dict[str, Any]:
        """Rank 0 measures and writes."""
        with floats(student):
            _add_profiles(result, assembly, student)
            with writing(opened.path / "student"):
                save_model(assembly.student._replace(module=student), opened.path / "student")
        for name, model in models.items():
            built = assembly.teacher_models[name].live._replace(module=model)
            with writing(opened.path / "teachers" / name):
                save_model(built, opened.path / "teachers" / name)
        result["seconds"] = time.perf_counter() - started
        opened.write_json("result.json", result)
        if assembly.recipe.output.report:
            from tutelage.report import write_report

            if analysis := _analysis(assembly, student):
                opened.write_json("analysis.json", analysis)
            with writing(opened.path / "report.html"):
                write_report([opened.path])
        return result

    result = assembly.runtime.on_main(finish)
    release(student)
    return RunResult(opened.path, result, student)


def _train(
    assembly: Assembly,
    path: Path,
    result: dict[str, Any],
    callbacks: tuple[object, ...],
    show_progress: bool,
) -> tuple[nn.Module, dict[str, nn.Module]]:
    """The student that ships, and the teachers that were trained, by name; what is known goes into ``result``."""
    if isinstance(assembly.method, Procedure):
        work = assembly.procedure_run(path, show_progress=show_progress, callbacks=callbacks)
        with closing(work):
            artifacts = assembly.method.run(work)
        result |= _procedure_result(artifacts)
        return artifacts.student or assembly.student.module, artifacts.models
    trainer = assembly.trainer(path / "checkpoints", callbacks)
    trainer.fit()
    student = trainer.finished()
    for name, module in trainer.plain_teachers().items():
        assembly.live_teachers[name].held = module  # rank 0 alone measures and saves them
    progress = trainer.progress
    result |= {
        "steps": trainer.step,
        "epochs": trainer.step / trainer.loader.steps_per_epoch,
        "train_seconds": progress.seconds,
        "stopped_early": progress.stopped_early,
        "tables": _tables(trainer.tables()),
        "best": {
            "step": progress.best_step,
            "metric": assembly.best_metric(),
            "value": _best_value(assembly, progress.best),
        },
    } | _evaluations(assembly, student)
    for callback in callbacks:
        if isinstance(callback, MetricsLog) and result["test"]:
            callback.evaluation("test", trainer.step, trainer.epoch, result["test"])
    return student, {name: teacher.held.model for name, teacher in assembly.trained_teachers.items()}


def _add_profiles(result: dict[str, Any], assembly: Assembly, student: nn.Module) -> None:
    """Parameters, FLOPs and latency of the student and its teachers."""
    result["student"] = {
        "model": assembly.recipe.student.model,
        **_profile(assembly, student, assembly.student),
    }
    for name, model in assembly.teacher_models.items():
        if model.store is not None:
            part = model.store.plan.teacher
            profile = {"parameters": part.parameters, "flops": part.flops}
        else:
            profile = _profile(assembly, assembly.live_teachers[name].held.model, model.live)
        result["teachers"][name] = {**result["teachers"].get(name, {}), "model": model.name, **profile}


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
    tables = _tables(artifacts.tables)
    return {"test": artifacts.metrics, "validation": {}, "tables": tables, **artifacts.figures}


def _tables(tables: Mapping[str, Table]) -> dict[str, Any]:
    return {
        name: {
            "columns": table.columns,
            "rows": table.rows,
            "plots": [{"x": plot.x, "y": list(plot.y)} for plot in table.plots],
        }
        for name, table in tables.items()
    }


def _evaluations(assembly: Assembly, student: nn.Module) -> dict[str, Any]:
    """Metrics of what ships, and of the teachers, on validation and test data. Agreement is with the first teacher that
    is a model; a store brings what was measured when it was made, where that was on the same rows."""
    predict = _predictor(assembly, student)
    students: dict[str, dict[str, float]] = {}
    teachers: dict[str, dict[str, dict[str, float]]] = {name: {} for name in assembly.teachers}
    for split, source in (("validation", assembly.data.validation), ("test", assembly.data.test)):
        # Ids are unique within a split only, so each split is remembered apart.
        remembered = {name: Remembered(teacher) for name, teacher in assembly.live_teachers.items()}
        students[split] = assembly.evaluate(predict, source, next(iter(remembered.values()), None))
        for name, teacher in remembered.items():
            teachers[name][split] = assembly.evaluate(teacher, source)
        for name, model in assembly.teacher_models.items():
            if model.store is not None and source is not None:
                teachers[name][split] = model.store.metrics(split, source.fingerprint)
    return {"validation": students["validation"], "test": students["test"] or None, "teachers": teachers}


def _analysis(assembly: Assembly, student: nn.Module) -> dict[str, Any] | None:
    """What the report shows of single answers; for a classifier that one training loop made, on held-out rows."""
    split = "test" if assembly.data.test is not None else "validation"
    source = assembly.data.test if assembly.data.test is not None else assembly.data.validation
    if source is None or assembly.task.name != "classification" or isinstance(assembly.method, Procedure):
        return None
    teacher = next(iter(assembly.live_teachers.values()), None)
    found = analyse(
        _predictor(assembly, student),
        None if teacher is None else teacher.outputs,
        source,
        classes=assembly.task.outputs,
        class_names=assembly.data.info.class_names,
        batch_size=assembly.recipe.evaluation.batch_size,
        device=assembly.runtime.device,
    )
    models = {"student": _held(assembly, student)}
    if teacher is not None:
        models["teacher"] = teacher.held
    seen = embeddings(
        models,
        source,
        batch_size=assembly.recipe.evaluation.batch_size,
        device=assembly.runtime.device,
    )
    return {"split": split, **found, "embeddings": seen}


def _held(assembly: Assembly, student: nn.Module) -> Tapped:
    """What ships, with its normalisation, on the device and in eval mode."""
    held = Tapped(student, mean=assembly.student.mean, std=assembly.student.std)
    return held.to(assembly.runtime.device).eval()


def _predictor(assembly: Assembly, student: nn.Module) -> Callable[[Batch], Outputs]:
    """The student's outputs of a batch, normalised, in eval mode and without gradients."""
    held = _held(assembly, student)

    def predict(batch: Batch) -> Outputs:
        with torch.no_grad(), assembly.runtime.autocast():
            return outputs_of(held(batch.inputs))

    return predict


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
def cpu_threads(count: int | None) -> Iterator[None]:
    """Run the block with so many threads; none: as many as there are."""
    before = torch.get_num_threads()
    if count is not None:
        torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
