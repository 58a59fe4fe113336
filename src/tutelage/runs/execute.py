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
from tutelage.engine.activations import keep_activations
from tutelage.engine.exhausted import situation_of
from tutelage.engine.interrupt import Interrupted
from tutelage.engine.memory import needed
from tutelage.engine.method import Method
from tutelage.engine.metrics import MetricsLog
from tutelage.engine.progress import progress as display
from tutelage.engine.quantize import floats, release
from tutelage.engine.runtime import Runtime
from tutelage.engine.types import Table
from tutelage.engine.views import to_float
from tutelage.engine.writing import UnwrittenError, writing
from tutelage.models import load_model, merge_lora, save_model
from tutelage.procedures.procedure import Artifacts, Procedure
from tutelage.recipe.schema import Recipe
from tutelage.runs.assemble import Assembly, assemble
from tutelage.runs.checks import check_rows
from tutelage.runs.folder import RunFolder
from tutelage.runs.measured import add_profiles, analysis_of, evaluations
from tutelage.runs.samples import add_samples

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
        A plan: models, rows, steps, the terms of the dry batch, and the memory that a language model's step needs.

    Raises:
        RecipeError, PairingError, ValueError: what a run would refuse.
    """
    loaded, _ = load_source(recipe)
    with cpu_threads(loaded.train.threads):
        assembly, steps, terms, memory = _dry_run(loaded, student, data)
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
        } | ({"memory": memory} if memory else {})


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
    memory: dict[str, str]
    """What a step of a language model needs, in words."""


def _dry_run(recipe: Recipe, student: nn.Module | None, data: Data | None) -> _DryRun:
    """Everything but the teachers' training, and one batch; an error here has cost nothing."""
    assembly = assemble(recipe, student=student, data=data, dry=True)
    check_rows(assembly.data, assembly.task)
    if isinstance(assembly.method, Method):
        trainer = assembly.trainer(None)
        memory = needed(situation_of(trainer)) if assembly.head is not None else {}
        return _DryRun(assembly, trainer.total_steps, trainer.dry_step(), memory)
    rows = to_float(
        assembly.data.train.fetch(list(range(min(recipe.train.batch_size, len(assembly.data.train)))))
    )
    assembly.task.check(rows, None)
    with closing(assembly.procedure_run(None, show_progress=False)) as work:
        assembly.method.check(work)
    return _DryRun(assembly, None, {}, {})


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
            add_profiles(result, assembly, student)
            add_samples(result, assembly, student)
            with writing(opened.path / "student"):
                built = assembly.student._replace(module=student)
                save_model(built, opened.path / "student", beside=_tokenizer(assembly))
        for name, model in models.items():
            built = assembly.teacher_models[name].live._replace(module=model)
            with writing(opened.path / "teachers" / name):
                save_model(built, opened.path / "teachers" / name, beside=_tokenizer(assembly))
        result["seconds"] = time.perf_counter() - started
        opened.write_json("result.json", result)
        if assembly.recipe.output.report:
            from tutelage.report import write_report

            if analysis := analysis_of(assembly, student):
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
        return _plain(artifacts.student or assembly.student.module), artifacts.models
    trainer = assembly.trainer(path / "checkpoints", callbacks)
    trainer.fit()
    student = _plain(trainer.finished())
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
    } | evaluations(assembly, student)
    for callback in callbacks:
        if isinstance(callback, MetricsLog) and result["test"]:
            callback.evaluation("test", trainer.step, trainer.epoch, result["test"])
    return student, {name: teacher.held.model for name, teacher in assembly.trained_teachers.items()}


def _plain(student: nn.Module) -> nn.Module:
    """The student without what only training needs: adapters are merged, blocks keep their activations."""
    merge_lora(student)
    keep_activations(student)
    return student


def _tokenizer(assembly: Assembly) -> Callable[[Path], object] | None:
    """What writes the tokeniser beside a model of text."""
    found = assembly.data.info.tokenizer
    return None if found is None else found.save


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
    kept = {"datasets": artifacts.datasets} if artifacts.datasets else {}
    return {"test": artifacts.metrics, "validation": {}, "tables": tables, **kept, **artifacts.figures}


def _tables(tables: Mapping[str, Table]) -> dict[str, Any]:
    return {
        name: {
            "columns": table.columns,
            "rows": table.rows,
            "plots": [{"x": plot.x, "y": list(plot.y)} for plot in table.plots],
        }
        for name, table in tables.items()
    }


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
