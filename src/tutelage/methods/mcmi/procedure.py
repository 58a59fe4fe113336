"""MCMI as a procedure: the teacher is tuned, then a student learns from it by any method."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from tutelage import catalogue
from tutelage.data import subset, targets
from tutelage.engine.combine import merged
from tutelage.engine.loading import Source
from tutelage.engine.loop import Trainer
from tutelage.engine.method import Method, Paper
from tutelage.engine.needs import Needs, PairingError
from tutelage.engine.passes import TrainingRows
from tutelage.engine.types import Batch, Outputs, Plot, Table
from tutelage.engine.views import Views, to_float
from tutelage.methods.mcmi.config import MCMIConfig
from tutelage.methods.mcmi.figures import figures
from tutelage.methods.mcmi.finetune import FineTune, Watch, rows_by_class
from tutelage.methods.mcmi.pictures import cam_table
from tutelage.procedures.procedure import Artifacts, Procedure
from tutelage.procedures.run import Run
from tutelage.procedures.stages import predictions, share_of_each
from tutelage.teachers.local import LocalTeacher

TEMPERATURES = (1.0, 2.0, 4.0, 8.0)
"""At which both teachers' CMI is measured: a higher temperature raises it too."""


class MCMI(Procedure):
    """A teacher whose answers within a class differ more, and a student of it."""

    Config = MCMIConfig
    paper = Paper(
        title="Bayes Conditional Distribution Estimation for Knowledge Distillation Based on Conditional Mutual "
        "Information",
        venue="ICLR",
        year=2024,
        arxiv="2401.08732",
        claim="Students of the MCMI teacher have a higher mean test accuracy than students of the MLL teacher, most in "
        "few-shot.",
        card="mcmi",
        family="vision logits",
    )
    needs = Needs(live=True, fields=("target",), sharding="ddp")
    config: MCMIConfig

    def __init__(self, config: MCMIConfig) -> None:
        super().__init__(config)
        taught = student_method(config)
        self.needs = merged([type(self).needs, taught.needs])  # type: ignore[misc]

    def check(self, run: Run) -> None:
        self._teacher(run)
        labels = targets(run.data.train)
        if labels.dim() != 1 or labels.is_floating_point():
            raise ValueError("mcmi looks at the answers to each class's rows, so it takes class ids")
        classes = run.data.info.outputs
        rows_by_class(labels, classes)
        unknown = [k for k in self.config.omit if k >= classes]
        if unknown or len(set(self.config.omit)) >= classes:
            raise ValueError(
                f"method.omit is {list(self.config.omit)}; the data has classes 0 to {classes - 1}, and one at least "
                "must stay"
            )

    def run(self, run: Run) -> Artifacts:
        """Tune the teacher, train the student, measure both. See `Procedure.run`."""
        given = self._teacher(run)
        tuned, history, stopped = self._tuned(run, given)
        source = self._rows(run)
        taught = self._taught(run, tuned, source)
        student, teachers = taught.finished(), {"MLL teacher": given, "MCMI teacher": tuned}
        compared = {name: self._figures(run, teacher) for name, teacher in teachers.items()}
        tables = taught.tables() | {
            "teacher by epoch": by_epoch(history),
            "teachers": side_by_side(compared),
            "CMI by temperature": self._by_temperature(run, teachers),
        }
        shown = run.data.test if run.data.test is not None else run.data.validation
        if shown is not None and self.config.pictures:
            cams = cam_table(teachers, shown, self.config.pictures, run.data.info.class_names)
            tables |= {"Eigen-CAM": cams} if cams else {}
        name = next(iter(run.teachers))
        return Artifacts(
            student=student,
            metrics=self._measured(run, student, run.data.test),
            models={name: tuned.held.model},
            tables=tables,
            figures={
                "validation": self._measured(run, student, run.data.validation),
                "teachers": {name: held_out_metrics(compared["MCMI teacher"])},
                "train_seconds": run.trained_seconds,
                "student_rows": len(source),
                "teacher_stopped_early": stopped,
                "teacher_fingerprints": {
                    "given": given.spec.fingerprint(),
                    "tuned": tuned.spec.fingerprint(),
                },
            },
        )

    def _teacher(self, run: Run) -> LocalTeacher:
        if len(run.teachers) != 1:
            raise PairingError(f"mcmi tunes one teacher; this recipe has {len(run.teachers)}")
        teacher = next(iter(run.teachers.values()))
        if not isinstance(teacher, LocalTeacher):
            raise PairingError("mcmi tunes its teacher, so it needs a live model, not stored answers")
        return teacher

    def _tuned(self, run: Run, given: LocalTeacher) -> tuple[LocalTeacher, list[dict[str, float]], bool]:
        """The tuned teacher, its figures by epoch, and whether its accuracy fell too far."""
        config, method = self.config, FineTune(self.config)
        model = copy.deepcopy(given.held.model).requires_grad_(True)
        train = run.data.train
        sources = {"train": train} | ({"validation": run.data.validation} if run.data.validation else {})
        watch = Watch(method, sources, run.runtime, run.recipe.evaluation.batch_size)
        changes = {
            "epochs": max(config.epochs, 1),
            "steps": None,
            "batch_size": min(config.batch_size, len(train)),
            "accumulate": 1,
            "optimizer": config.optimizer.model_dump(),
            "schedule": config.schedule.model_dump(),
            "ema": None,
            "early_stop": None,
        }
        options: dict[str, Any] = {"config": changes, "normalised_as": given.held, "callbacks": [watch]}
        if config.epochs == 0:  # measured, and left as it is
            trainer = run.trainer("teacher", model, method, train, **options)
            watch.on_fit_start(trainer)
        else:
            trainer = run.train("teacher", model, method, train, **options)
        stopped = trainer.progress.stopped_early
        if stopped:
            warnings.warn(
                f"mcmi: in epoch {len(method.history) - 1} the teacher's training accuracy fell more than "
                f"{config.largest_drop:g} below where it began, so its tuning ended and the epoch before counts; lower "
                "method.cmi_weight",
                stacklevel=2,
            )
        return self._as_teacher(run, given, method.kept), method.history, stopped

    def _as_teacher(self, run: Run, given: LocalTeacher, model: nn.Module) -> LocalTeacher:
        example = to_float(run.data.train.fetch([0, 0]).to(run.runtime.device))
        mean, std = given.held.normalisation
        return LocalTeacher(given.spec.name, model, example.inputs, mean=mean, std=std).freeze()

    def _rows(self, run: Run) -> Source:
        """What the student sees: a share of every class, without the omitted ones."""
        labels = targets(run.data.train)
        rows = torch.arange(len(labels))
        if self.config.fraction is not None:
            rows = torch.tensor(share_of_each(labels, self.config.fraction, run.generator("few-shot")))
        rows = rows[~torch.isin(labels[rows], torch.tensor(self.config.omit, dtype=labels.dtype))]
        return run.data.train if len(rows) == len(labels) else subset(run.data.train, rows)

    def _taught(self, run: Run, teacher: LocalTeacher, source: Source) -> Trainer:
        """The student's finished training."""
        return run.train(
            "student",
            run.new_student(run.data.info.outputs),
            student_method(self.config),
            source,
            teachers={teacher.spec.name: teacher},
            config={"batch_size": min(run.recipe.train.batch_size, len(source))},
            validation=run.validation(),
        )

    def _measured(self, run: Run, model: nn.Module, source: Source | None) -> dict[str, float]:
        """The task's metrics, and the accuracy on omitted classes where there are some."""
        if source is None:
            return {}
        metrics = run.evaluate(model, source)
        if not self.config.omit:
            return metrics
        size = run.recipe.evaluation.batch_size
        found = predictions(run.predictor(model), source, run.runtime.device, size)
        unseen = torch.isin(found.target, torch.tensor(self.config.omit, dtype=found.target.dtype))
        hits = (found.logits.argmax(1) == found.target).double()
        parts = {"accuracy_omitted": hits[unseen], "accuracy_seen": hits[~unseen]}
        return metrics | {name: float(part.mean()) for name, part in parts.items() if len(part)}

    def _figures(self, run: Run, teacher: LocalTeacher) -> dict[str, dict[str, float]]:
        """A teacher's figures on training, validation and test rows."""
        data = {"train": run.data.train, "validation": run.data.validation, "test": run.data.test}
        return {
            part: figures(teacher.outputs, passes(run, source), run.runtime.sum).values()
            for part, source in data.items()
            if source is not None
        }

    def _by_temperature(self, run: Run, teachers: dict[str, LocalTeacher]) -> Table:
        """CMI on training rows of what each teacher says at several temperatures."""

        def cmi(teacher: LocalTeacher, temperature: float) -> float:
            def softened(batch: Batch) -> Outputs:
                return Outputs(teacher.outputs(batch).logits / temperature)

            return figures(softened, passes(run, run.data.train), run.runtime.sum).values()["cmi"]

        rows = [[by, *(cmi(teacher, by) for teacher in teachers.values())] for by in TEMPERATURES]
        names = [f"CMI of the {name}" for name in teachers]
        return Table(["temperature", *names], rows, (Plot("temperature", tuple(names)),))


def passes(run: Run, source: Source) -> Iterator[Batch]:
    """Every row once, as evaluation sees it; each rank gets its share."""
    rows = TrainingRows(source, Views((), 0), run.runtime, run.recipe.evaluation.batch_size)
    return rows.batches()


def side_by_side(compared: Mapping[str, Mapping[str, Mapping[str, float]]]) -> Table:
    rows = [
        [name, part, found["cmi"], found["accuracy"], found["loss"]]
        for name, parts in compared.items()
        for part, found in parts.items()
    ]
    return Table(["teacher", "rows", "cmi", "accuracy", "loss"], rows)


def held_out_metrics(parts: Mapping[str, Mapping[str, float]]) -> dict[str, dict[str, float]]:
    """What the report shows of the teacher beside its student."""
    return {
        part: {name: found[name] for name in ("accuracy", "loss")}
        for part, found in parts.items()
        if part != "train"
    }


def student_method(config: MCMIConfig) -> Method:
    """What the student learns by.

    Raises:
        PairingError: it reads no frozen teacher, or is a procedure itself.
        ValueError: no such method, or options that it refuses.
    """
    name = config.student_method
    found = catalogue.load(name)
    if not issubclass(found, Method) or found.needs.teacher != "frozen":
        raise PairingError(
            f"method.student_method is `{name}`; mcmi takes a method of one training loop that learns from a teacher "
            "that stays as it is, such as kd"
        )
    return found(found.Config(name=name, **config.student_options))


def by_epoch(history: list[dict[str, float]]) -> Table:
    """The teacher's figures by epoch, its start first, and the curve of accuracy over CMI."""
    columns = list(history[0])
    rows = [[epoch, *(row[name] for name in columns)] for epoch, row in enumerate(history)]
    parts = [name.removeprefix("cmi_") for name in columns if name.startswith("cmi_")]
    curves = tuple(Plot(f"cmi_{part}", (f"accuracy_{part}",)) for part in parts)
    return Table(["epoch", *columns], rows, (*curves, Plot("epoch", tuple(f"cmi_{part}" for part in parts))))
