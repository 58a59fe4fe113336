"""`Run`: what a procedure works with. Finished parts are journalled in the run's folder and skipped on resume."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from tutelage import catalogue
from tutelage.data import Data
from tutelage.engine.evaluate import evaluate
from tutelage.engine.heads import HeadPlan
from tutelage.engine.loading import Source
from tutelage.engine.loop import Trainer
from tutelage.engine.method import Method
from tutelage.engine.metrics import MetricsLog
from tutelage.engine.progress import progress
from tutelage.engine.rng import derive_seed
from tutelage.engine.runtime import Runtime
from tutelage.engine.taps import Tapped
from tutelage.engine.teacher import Teacher
from tutelage.engine.types import Batch, Outputs
from tutelage.engine.validation import Validation
from tutelage.engine.views import Views
from tutelage.recipe.schema import ModelConfig, Recipe, ViewConfig
from tutelage.tasks import Task
from tutelage.untrusted import FileError, file_name, read_object

Predictor = Callable[[Batch], Outputs]


class Run:
    """A procedure's workplace.

    Attributes:
        recipe: the whole resolved recipe; ``recipe.train`` is the budget of each stage unless the procedure says
            otherwise.
        data, task, teachers, runtime: as assembled from the recipe.
        folder: where parts are journalled; none: nothing is written.
    """

    def __init__(
        self,
        recipe: Recipe,
        runtime: Runtime,
        data: Data,
        task: Task,
        new_student: Callable[[int], nn.Module],
        *,
        teachers: Mapping[str, Teacher] | None = None,
        mean: tuple[float, ...] | None = None,
        std: tuple[float, ...] | None = None,
        head: HeadPlan | None = None,
        new_model: Callable[[ModelConfig, str], nn.Module] | None = None,
        folder: Path | None = None,
        show_progress: bool = False,
        callbacks: Iterable[object] = (),
    ) -> None:
        self.recipe, self.runtime, self.data, self.task = recipe, runtime, data, task
        self.new_student, self._new_model = new_student, new_model
        self.teachers = dict(teachers or {})
        self.mean, self.std, self.head, self.folder = mean, std, head, folder
        self.show_progress, self.callbacks = show_progress, tuple(callbacks)
        self.seed = recipe.train.seed
        self.trained_seconds = 0.0
        self._stack = ExitStack()

    def close(self) -> None:
        """End what stages log to."""
        self._stack.close()

    def once(self, name: str, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """What ``make`` gives: tensors and plain JSON values by name. It runs once, on rank 0 alone; a resumed run and
        the other ranks read it back.

        Raises:
            FileError: a name that cannot be a file's, or a file that is damaged.
        """
        if self.folder is None:
            return make()
        path = self.folder / "once" / f"{file_name(name, 'the part')}.json"
        self.runtime.on_main(lambda: None if path.exists() else _write(path, make()))
        return read_object(path) | _read_tensors(path.with_suffix(".safetensors"))

    def new_model(self, config: ModelConfig, name: str) -> nn.Module:
        """A further model for this run's data, its random weights drawn by the run's seed and ``name``.

        Raises:
            ModelError: there is no such model, or it does not fit the data.
        """
        if self._new_model is None:
            raise TypeError("this Run was made without `new_model`, which builds further models")
        return self._new_model(config, name)

    def trainer(
        self,
        name: str,
        student: nn.Module,
        method: Method,
        source: Source,
        *,
        teachers: Mapping[str, Teacher] | None = None,
        config: Mapping[str, Any] | None = None,
        validation: Validation | None = None,
        views: Sequence[ViewConfig] | None = None,
        normalised_as: Tapped | None = None,
        callbacks: Iterable[object] = (),
    ) -> Trainer:
        """A Trainer with a checkpoint folder of its own, gone on with where it stopped. ``config`` changes fields of
        the recipe's ``train``, ``views`` take the place of ``data.views``; seeds differ by ``name``. Inputs are
        normalised for the recipe's student, or as those of ``normalised_as``."""
        place = self.folder / "stages" / file_name(name, "the stage") if self.folder else None
        train = self.recipe.train
        changes = dict(config or {}) | {"seed": derive_seed(self.seed, name) % 2**31}
        train = type(train).model_validate(train.model_dump() | changes)
        mean, std = (self.mean, self.std) if normalised_as is None else normalised_as.normalisation
        head = self.head if normalised_as is None else normalised_as.head
        loaders = {"train": source} | ({"validation": self.data.validation} if self.data.validation else {})
        own: list[object] = [progress(name)] if self.show_progress and self.runtime.is_main else []
        if place and self.runtime.is_main:
            own.append(self._stack.enter_context(closing(MetricsLog(place, self.recipe.output.trackers))))
        trainer = Trainer(
            self.runtime,
            student,
            method,
            self.task,
            source,
            train,
            teachers=teachers,
            views=Views.of(self.recipe.data, train.seed) if views is None else Views(views, train.seed),
            workers=self.recipe.data.workers,
            loaders=loaders,
            mean=mean,
            std=std,
            head=head,
            validation=validation,
            folder=place / "checkpoints" if place else None,
            callbacks=[*own, *self.callbacks, *callbacks],
        )
        trainer.restore()
        return trainer

    def train(self, name: str, student: nn.Module, method: Method, source: Source, **options: Any) -> Trainer:
        """Train a stage to its end (see `trainer` for the options); a finished one is only read back."""
        trainer = self.trainer(name, student, method, source, **options)
        trainer.fit()
        self.trained_seconds += trainer.progress.seconds
        return trainer

    def method(self, name: str, **options: Any) -> Method:
        """Another method, by its catalogue name."""
        found = catalogue.load(name)
        if not issubclass(found, Method):
            raise TypeError(f"`{name}` is a {found.kind}; only methods of one loop can be composed")
        return found(found.Config(name=name, **options))

    def generator(self, name: str) -> torch.Generator:
        """A generator seeded by the run's seed and ``name``."""
        return torch.Generator().manual_seed(derive_seed(self.seed, "generator", name))

    def clients(self, count: int) -> list[Run]:
        """One Run a client: the same recipe, a folder and a seed of its own."""
        return [self._client(i) for i in range(count)]

    def _client(self, i: int) -> Run:
        client = Run(
            self.recipe,
            self.runtime,
            self.data,
            self.task,
            self.new_student,
            teachers=self.teachers,
            mean=self.mean,
            std=self.std,
            head=self.head,
            new_model=self._new_model,
            folder=self.folder / "clients" / str(i) if self.folder else None,
            show_progress=self.show_progress,
            callbacks=self.callbacks,
        )
        client.seed = derive_seed(self.seed, "client", i) % 2**31
        self._stack.callback(client.close)
        return client

    def predictor(self, model: nn.Module, taps: tuple[str, ...] = ()) -> Predictor:
        """The model's outputs for batches of this run's data, normalised, in eval mode, without gradients."""
        held = Tapped(model, mean=self.mean, std=self.std, head=self.head).to(self.runtime.device).eval()

        def predict(batch: Batch) -> Outputs:
            with torch.no_grad(), self.runtime.autocast():
                return held.outputs(held(batch.inputs, taps))

        return predict

    def validation(self) -> Validation | None:
        """Metrics of a stage's student on the held-out rows, as often as the recipe says; none without such rows."""
        held_out = self.data.validation
        if held_out is None:
            return None
        return Validation(
            lambda trainer: self.evaluate(trainer.predict, held_out), self.recipe.evaluation.every
        )

    def evaluate(
        self,
        model: nn.Module | Teacher | Predictor,
        source: Source | None,
        names: tuple[str, ...] = (),
        *,
        teacher: Teacher | None = None,
    ) -> dict[str, float]:
        """Metrics of a model, or of what gives its outputs, on a source; those that compare it with ``teacher`` where
        one is given; nothing where there is no source."""
        if source is None:
            return {}
        if isinstance(model, nn.Module):
            model = self.predictor(model)
        return evaluate(
            model if callable(model) else model.outputs,
            source,
            self.task,
            names=names or self.recipe.evaluation.metrics,
            group_by=self.recipe.evaluation.group_by,
            batch_size=self.recipe.evaluation.batch_size,
            device=self.runtime.device,
            rank=self.runtime.rank,
            world=self.runtime.world,
            teacher=None if teacher is None else teacher.outputs,
        )


def _write(path: Path, value: dict[str, Any]) -> None:
    """Tensors first, then the JSON that says it is all there; each by rename."""
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors = {name: item.contiguous() for name, item in value.items() if isinstance(item, Tensor)}
    beside = path.with_suffix(".tmp")
    if tensors:
        save_file(tensors, beside)
        beside.replace(path.with_suffix(".safetensors"))
    plain = {name: item for name, item in value.items() if not isinstance(item, Tensor)}
    beside.write_text(json.dumps(plain, allow_nan=False), encoding="utf-8")
    beside.replace(path)


def _read_tensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path) if path.exists() else {}
    except SafetensorError as error:
        raise FileError(f"{path} is damaged: {error}; remove it and the JSON file beside it") from error
