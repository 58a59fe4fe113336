"""From a recipe to the objects of a run: data, task, models, teachers, method."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from tutelage import catalogue
from tutelage.data import Data, open_data
from tutelage.engine.combine import Combined
from tutelage.engine.distributed import is_sharded
from tutelage.engine.evaluate import evaluate
from tutelage.engine.heads import HeadPlan
from tutelage.engine.loading import Source
from tutelage.engine.loop import Trainer
from tutelage.engine.method import Method
from tutelage.engine.metrics import check_trackers
from tutelage.engine.needs import PairingError
from tutelage.engine.rng import derive_seed
from tutelage.engine.runtime import Runtime
from tutelage.engine.teacher import Teacher
from tutelage.engine.validation import Validation
from tutelage.engine.views import Views, to_float
from tutelage.models import BuiltModel, build_model
from tutelage.models.language_head import check_packing, language_head
from tutelage.procedures.procedure import Procedure
from tutelage.procedures.run import Run
from tutelage.recipe.schema import ModelConfig, Recipe
from tutelage.runs.checks import check_evaluation, check_fit
from tutelage.runs.teachers import TeacherModel, teacher_configs, teacher_model
from tutelage.runs.vocabulary import check_student_vocabulary, own_tokenizer, vocabulary_of
from tutelage.tasks import LanguageModel, Task, build_task
from tutelage.teachers.local import LocalTeacher


@dataclass
class Assembly:
    """Everything a run is made of, before anything is written.

    Attributes:
        head: where a student that is a language model makes its logits.
    """

    recipe: Recipe
    runtime: Runtime
    data: Data
    task: Task
    student: BuiltModel
    teachers: dict[str, Teacher]
    teacher_models: dict[str, TeacherModel]
    method: Method | Procedure
    head: HeadPlan | None = None

    @property
    def name(self) -> str:
        return "+".join(method.name for method in self.recipe.method)

    @property
    def trained_teachers(self) -> dict[str, LocalTeacher]:
        """Teachers that learn with the student, by name."""
        return self.live_teachers if self.method.needs.teacher == "trained" else {}

    @property
    def live_teachers(self) -> dict[str, LocalTeacher]:
        """Teachers that are models in this process, by name."""
        return {name: teacher for name, teacher in self.teachers.items() if isinstance(teacher, LocalTeacher)}

    @property
    def whole_teachers(self) -> dict[str, LocalTeacher]:
        """Those of them that lie on one process, which can run them by itself."""
        return {name: teacher for name, teacher in self.live_teachers.items() if not is_sharded(teacher.held)}

    @property
    def loaders(self) -> dict[str, Source]:
        """Sources that a method may ask for by name."""
        found = {"train": self.data.train, "validation": self.data.validation}
        return {name: source for name, source in found.items() if source is not None}

    def trainer(self, folder: Path | None, callbacks: tuple[object, ...] = ()) -> Trainer:
        """The Trainer of a method that is one loop."""
        if not isinstance(self.method, Method):
            raise TypeError(f"`{self.name}` is a procedure; it makes Trainers of its own")
        recipe = self.recipe
        return Trainer(
            self.runtime,
            self.student.module,
            self.method,
            self.task,
            self.data.train,
            recipe.train,
            stream=self.data.stream,
            teachers=self.teachers,
            views=Views.of(recipe.data, recipe.train.seed),
            loaders=self.loaders,
            workers=recipe.data.workers,
            mean=self.student.mean,
            std=self.student.std,
            head=self.head,
            validation=self._validation(),
            folder=folder,
            callbacks=callbacks,
        )

    def procedure_run(
        self, folder: Path | None, *, show_progress: bool, callbacks: tuple[object, ...] = ()
    ) -> Run:
        """The workplace of a procedure."""
        recipe = self.recipe

        def new_model(config: ModelConfig, name: str, outputs: int = self.data.info.outputs) -> nn.Module:
            built = build_model(
                config,
                outputs=outputs,
                input_shape=self.data.info.input_shape,
                seed=derive_seed(recipe.train.seed, name),
                task=recipe.task,
                vocabulary=vocabulary_of(self.data),
            )
            return built.module

        def new_student(outputs: int) -> nn.Module:
            return new_model(recipe.student, "student", outputs)

        return Run(
            recipe,
            self.runtime,
            self.data,
            self.task,
            new_student,
            teachers=self.teachers,
            mean=self.student.mean,
            std=self.student.std,
            head=self.head,
            new_model=new_model,
            folder=folder,
            show_progress=show_progress,
            callbacks=callbacks,
        )

    def _validation(self) -> Validation | None:
        best = self.best_metric()
        if best is None:
            return None
        return Validation(
            self._on_validation, self.recipe.evaluation.every, (best, self.task.higher_is_better[best])
        )

    def _on_validation(self, trainer: Trainer) -> dict[str, float]:
        """The student's metrics, and under ``<teacher>.<metric>`` those of teachers that learn too."""
        metrics = self.evaluate(trainer.predict, self.data.validation)
        for name, teacher in self.trained_teachers.items():
            theirs = self.evaluate(teacher.outputs, self.data.validation)
            metrics |= {f"{name}.{metric}": value for metric, value in theirs.items()}
        return metrics

    def best_metric(self) -> str | None:
        """The validation metric that says which checkpoint is best; none without validation data."""
        if self.data.validation is None:
            return None
        options = self.recipe.evaluation
        return options.best or next(iter(options.metrics or self.task.higher_is_better))

    def evaluate(self, student: Any, source: Source | None, teacher: Any = None) -> dict[str, float]:
        """Metrics on a source, by the recipe's ``evaluation``; nothing where there is no source."""
        if source is None:
            return {}
        options, early = self.recipe.evaluation, self.recipe.train.early_stop
        needed = [name for name in (options.best, early and early.metric) if name] if options.metrics else []
        return evaluate(
            student,
            source,
            self.task,
            names=tuple(dict.fromkeys((*options.metrics, *needed))),
            group_by=options.group_by,
            batch_size=options.batch_size,
            device=self.runtime.device,
            rank=self.runtime.rank,
            world=self.runtime.world,
            teacher=teacher,
        )


def assemble(
    recipe: Recipe,
    *,
    student: nn.Module | None = None,
    data: Data | None = None,
    dry: bool = False,
    show_progress: bool | None = None,
) -> Assembly:
    """Build everything that a recipe names. ``dry``: a teacher that would be trained first gets random weights;
    ``show_progress``: of such training.

    Raises:
        PairingError: method, teachers, data and launch do not fit together; every reason at once.
        ValueError: a model, a data set or a setting that cannot be used.
    """
    runtime = Runtime.of(recipe.train)
    if data is None:
        with runtime.main_first():
            data = open_data(recipe.data, recipe.task, own_tokenizer(recipe.student))
    if student is None and data.info.tokenizer is not None:
        check_student_vocabulary(recipe.student, recipe.data, data.info.tokenizer)
    task = build_task(
        recipe.task,
        data.info.outputs,
        label_smoothing=recipe.train.label_smoothing,
        class_names=data.info.class_names,
    )
    built = build_model(
        student if student is not None else recipe.student,
        outputs=data.info.outputs,
        input_shape=data.info.input_shape,
        seed=derive_seed(recipe.train.seed, "student"),
        task=recipe.task,
        vocabulary=vocabulary_of(data),
    )
    built = normalised(built, recipe.student, data)
    example = to_float(data.train.fetch(list(range(min(2, len(data.train))))))
    models = {
        name: teacher_model(name, config, data, recipe, runtime, dry=dry, show_progress=show_progress)
        for name, config in teacher_configs(recipe).items()
    }
    tokens = data.info.outputs if isinstance(task, LanguageModel) else None
    method = build_method(recipe)
    # Such a teacher may be larger than the device: the Trainer brings it there part by part.
    in_parts = isinstance(method, Method) and (
        recipe.train.offload_teacher or runtime.shares_teachers(recipe.train)
    )
    teachers = {
        name: model.teacher(name, example.inputs, runtime, tokens, in_parts=in_parts)
        for name, model in models.items()
    }
    check_evaluation(recipe, task, data)
    check_trackers(recipe.output.trackers)
    check_fit(recipe, method, models, teachers, data, runtime)
    if method.needs.teacher != "trained":
        for teacher in teachers.values():
            if isinstance(teacher, LocalTeacher):
                teacher.freeze()
    head = None
    if tokens is not None:
        head = language_head("the student", built.module, tokens, example.inputs)
        if recipe.data.packing != "none":
            check_packing("the student", built.module, example.inputs)
    return Assembly(recipe, runtime, data, task, built, teachers, models, method, head)


def build_method(recipe: Recipe) -> Method | Procedure:
    """The recipe's method, or its methods as one.

    Raises:
        PairingError: methods that cannot be combined.
    """
    methods: list[Method | Procedure] = [catalogue.load(config.name)(config) for config in recipe.method]
    if len(methods) == 1:
        return methods[0]
    loops = [method for method in methods if isinstance(method, Method)]
    if len(loops) != len(methods):
        names = ", ".join(
            config.name for config, m in zip(recipe.method, methods, strict=True) if m not in loops
        )
        raise PairingError(f"{names} cannot be combined: a procedure runs alone")
    return Combined(loops, recipe.train.label_weight)


def normalised(built: BuiltModel, config: ModelConfig, data: Data) -> BuiltModel:
    """Input normalisation: what the recipe says, else the weights' own, else the data's."""
    if config.mean is not None or config.std is not None:
        return built._replace(mean=config.mean or (0.0,), std=config.std or (1.0,))
    return built if built.mean is not None else built._replace(mean=data.info.mean, std=data.info.std)
