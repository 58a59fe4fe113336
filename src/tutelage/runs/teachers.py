"""A recipe's teacher: a model by name, from an earlier run, or from a recipe that is trained first and reused; or a
store of its outputs."""

from __future__ import annotations

import hashlib
import json
import os
import re
import time
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import tutelage.recipe as recipes
from tutelage.data import Data
from tutelage.engine.checkpoint import FolderLock, RunLockedError
from tutelage.engine.runtime import Runtime
from tutelage.engine.teacher import Teacher
from tutelage.engine.types import Inputs
from tutelage.models import BuiltModel, build_model, load_model
from tutelage.models.language_head import check_packing, language_head
from tutelage.models.weights import CARD
from tutelage.recipe.schema import ModelConfig, Recipe, TeacherConfig
from tutelage.runs.vocabulary import check_recipe_vocabulary, check_vocabulary, vocabulary_of
from tutelage.teachers.local import LocalTeacher
from tutelage.teachers.store import Store, StoredTeacher

_WAIT_SECONDS = 1.0


def teacher_configs(recipe: Recipe) -> Mapping[str, TeacherConfig]:
    """The teachers that a recipe names, by name."""
    if recipe.teacher is None:
        return {}
    return {"teacher": recipe.teacher} if isinstance(recipe.teacher, TeacherConfig) else recipe.teacher


@dataclass
class TeacherModel:
    """Where a teacher's answers come from: a model or, with no model in memory, a store.

    Attributes:
        name: what the model is called.
        untrained: it has random weights here, and would be trained before a run.
    """

    built: BuiltModel | None
    name: str
    store: Store | None = None
    untrained: bool = False
    packed: bool = False
    """Whether its rows hold several documents."""

    @property
    def live(self) -> BuiltModel:
        """The model.

        Raises:
            ValueError: there is only a store.
        """
        if self.built is None:
            raise ValueError(f"the teacher {self.name} is a store of outputs; this needs the model itself")
        return self.built

    @property
    def parameters(self) -> int:
        if self.store is not None:
            return self.store.plan.teacher.parameters
        return sum(parameter.numel() for parameter in self.live.module.parameters())

    def teacher(
        self,
        name: str,
        example: Inputs,
        runtime: Runtime,
        tokens: int | None = None,
        *,
        in_parts: bool = False,
    ) -> Teacher:
        """It, as the trainer takes it.

        Args:
            name: what the recipe calls it.
            example: a few rows, before normalisation.
            tokens: of the vocabulary, for a language model.
            in_parts: leave it in CPU memory.
        """
        if self.store is not None:
            return StoredTeacher(self.store)
        built, head = self.live, None
        if tokens is not None:
            head = language_head(f"teacher `{name}`", built.module, tokens, example)
            if self.packed:
                check_packing(f"teacher `{name}`", built.module, example)
        found = LocalTeacher(name, built.module, example, mean=built.mean, std=built.std, head=head)
        if not in_parts:
            found.held.to(runtime.device)
        return found


def teacher_model(
    name: str,
    config: TeacherConfig,
    data: Data,
    recipe: Recipe,
    runtime: Runtime,
    *,
    dry: bool,
    show_progress: bool | None = None,
) -> TeacherModel:
    """Build one teacher. ``dry``: one that would be trained first gets random weights.

    Raises:
        StoreError: there is no such store, or it cannot be read.
        ValueError: there is no such run, its student was not kept, or this kind of teacher cannot be had here.
    """
    if config.endpoint is not None:
        raise ValueError("teacher.endpoint is not built yet in this version; use model, run, recipe or store")
    if config.store is not None:
        store = Store(Path(config.store), name)
        return TeacherModel(None, store.plan.teacher.model, store)
    packed = data.info.tokenizer is not None and recipe.data.packing != "none"
    if data.info.tokenizer is not None:
        check_vocabulary(name, config, data.info.tokenizer)
    if config.run is not None:
        return _from_run(Path(config.run), config, config.trust_remote_code, packed)
    if config.recipe is not None:
        own = recipes.load_recipe(config.recipe, config.overrides)
        if dry:
            if data.info.tokenizer is not None:
                check_recipe_vocabulary(name, own, recipe, data.info.tokenizer)
            built = _build(own.student, data, own.train.seed, recipe.task)
            return TeacherModel(built, own.student.model, untrained=True, packed=packed)
        folder = trained(own, runtime, show_progress=show_progress)
        if data.info.tokenizer is not None:
            check_vocabulary(name, TeacherConfig(run=str(folder)), data.info.tokenizer)
        return _from_run(folder, config, own.student.trust_remote_code, packed)
    model = ModelConfig.model_validate(
        config.model_dump(exclude={"run", "recipe", "overrides", "store", "endpoint"})
    )
    return TeacherModel(_build(model, data, recipe.train.seed, recipe.task), model.model, packed=packed)


def _build(model: ModelConfig, data: Data, seed: int, task: str) -> BuiltModel:
    # Pretrained weights keep their own head: a fresh one would make a teacher that knows nothing.
    outputs = None if model.weights else data.info.outputs
    built = build_model(
        model,
        outputs=outputs,
        input_shape=data.info.input_shape,
        seed=seed,
        task=task,
        vocabulary=vocabulary_of(data),
    )
    mean = model.mean or built.mean or data.info.mean
    std = model.std or built.std or data.info.std
    return built._replace(mean=mean, std=std)


def _from_run(folder: Path, config: TeacherConfig, trust_remote_code: bool, packed: bool) -> TeacherModel:
    kept = (folder / CARD).exists()  # a model's own folder, such as a run's teachers/<name>
    if not kept and not (folder / "student").is_dir():
        raise ValueError(
            f"teacher.run {folder} has no student/; give the folder of a finished run, or of a teacher that it kept"
        )
    built = load_model(
        folder if kept else folder / "student",
        trust_remote_code=trust_remote_code,
        attention=config.attention,
        dtype=config.dtype,
    )
    return TeacherModel(built, str(built.description.get("model", folder.name)), packed=packed)


def trained(recipe: Recipe, runtime: Runtime, *, show_progress: bool | None = None) -> Path:
    """Folder of the finished run of a teacher's recipe: reused where it was trained before, by fingerprint; a run that
    was stopped goes on. All ranks train it together; others that train the same teacher are waited for."""
    from tutelage.runs.execute import distill

    folder = teachers_root() / fingerprint(recipe)
    # Not the folder's own lock, which the run inside takes.
    claim = FolderLock(teachers_root() / ".claims" / folder.name)
    with ExitStack() as stack:
        while not runtime.on_main(lambda: _taken(claim, stack)):
            time.sleep(_WAIT_SECONDS)
        return distill(recipe, folder=folder, resume=True, progress=show_progress).folder


def _taken(claim: FolderLock, stack: ExitStack) -> bool:
    try:
        stack.enter_context(claim)
    except RunLockedError:
        return False
    return True


def teachers_root() -> Path:
    """Where trained teachers are kept: ``TUTELAGE_TEACHERS``, else ``runs/teachers`` here."""
    return Path(os.environ.get("TUTELAGE_TEACHERS", Path("runs") / "teachers"))


def fingerprint(recipe: Recipe) -> str:
    """What makes a trained teacher this one: its recipe without the place it is written to."""
    content = recipe.model_dump(mode="json", exclude={"output"})
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    model = re.sub(r"[^\w.-]", "-", recipe.student.model)[-60:].lstrip(".-")
    return f"{model}-{digest[:12]}"
