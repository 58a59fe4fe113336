"""The teacher's fine-tuning: likely labels, and answers that differ within a class."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from tutelage.data import targets
from tutelage.engine.loading import Source
from tutelage.engine.method import Method
from tutelage.engine.needs import Needs
from tutelage.engine.passes import TrainingRows
from tutelage.engine.rng import derive_seed
from tutelage.engine.runtime import Runtime
from tutelage.engine.taps import Tapped, outputs_of
from tutelage.engine.types import Batch, Outputs, Term, Terms
from tutelage.engine.views import Views, to_float
from tutelage.functional.classes import ClassSums, class_sums
from tutelage.functional.reductions import keep_rows, upcast
from tutelage.methods.mcmi.config import MCMIConfig
from tutelage.methods.mcmi.figures import figures
from tutelage.methods.mcmi.functional import mcmi_loss, normalised, update_class_centroids

if TYPE_CHECKING:
    from tutelage.engine.loop import Trainer
    from tutelage.engine.spec import ModelSpec
    from tutelage.engine.step import Step

Row = dict[str, float]


class FineTune(Method):
    """One training of the teacher; the "student" of its Trainer is the teacher.

    ``kept`` is the model after the last epoch whose training accuracy held, ``history`` its figures by epoch.
    """

    Config = MCMIConfig
    needs = Needs(teacher="none", logits=(), fields=("target",), sharding="ddp")
    config: MCMIConfig

    centroids: Tensor

    def build(self, teacher: ModelSpec | None, student: ModelSpec, example: Batch) -> None:
        assert student.module is not None
        classes = student.outputs or 0
        self.register_buffer("centroids", torch.full((classes, classes), 1 / classes))
        self.kept = copy.deepcopy(student.module).requires_grad_(False)
        self.history: list[Row] = []

    def prepare(self, data: Any, student: nn.Module, teacher: Any) -> None:
        assert isinstance(student, Tapped)
        self.centroids.copy_(self._means(data, student, release=self.config.release_mode))

    def objective(self, student: Outputs, teacher: Outputs | None, batch: Batch, ctx: Step) -> Terms:
        assert batch.target is not None
        logits, target = keep_rows(batch.mask, student.logits, batch.target)
        parts = mcmi_loss(logits, target, self.centroids, cmi_weight=self.config.cmi_weight)
        return {"label": Term(parts.cross_entropy), "cmi": Term(-self.config.cmi_weight * parts.cmi)}

    def after_step(self, ctx: Step) -> None:
        if self.config.centroids == "ema":
            self._move(ctx)
        elif self.config.centroids == "epoch" and (ctx.step + 1) % ctx.steps_per_epoch == 0:
            self.centroids.copy_(self._means(ctx.data, ctx.setup.student, release=False))

    def get_extra_state(self) -> Any:
        return {"history": self.history}

    def set_extra_state(self, state: Any) -> None:
        self.history = state["history"]

    @torch.no_grad()
    def _means(self, data: TrainingRows, model: Tapped, *, release: bool) -> Tensor:
        """Class means over the training rows: in eval mode on rows as they are, or as the authors' code has it, in
        train mode on augmented rows, which moves BatchNorm's statistics too."""
        model.train(release)
        found = ClassSums(torch.zeros_like(self.centroids), torch.zeros_like(self.centroids[0]))
        for batch in data.batches(augmented=release):
            assert batch.target is not None
            logits, target = keep_rows(batch.mask, outputs_of(model(batch.inputs)).logits, batch.target)
            found = found.plus(class_sums(upcast(logits).softmax(1), target, len(self.centroids)))
        return normalised(data.runtime.sum(found.sums))

    def _move(self, ctx: Step) -> None:
        """The moving average: the same places within their class for all classes, drawn anew in every step."""
        by_class, fewest = rows_by_class(targets(ctx.data), len(self.centroids))
        generator = torch.Generator().manual_seed(
            derive_seed(ctx.data.views.seed, "mcmi centroids", ctx.step)
        )
        places = torch.randperm(fewest, generator=generator)[: self.config.ema_samples]
        batch = to_float(ctx.data.fetch(by_class[:, places].flatten().tolist()).to(self.centroids.device))
        logits = upcast(ctx.student(batch, frozen=True).logits)
        shaped = logits.view(len(self.centroids), len(places), -1)
        self.centroids.copy_(update_class_centroids(self.centroids, shaped, decay=self.config.ema_decay))


class Watch:
    """Measures the teacher before the first step and after every epoch, and ends its training where the training
    accuracy has fallen too far."""

    def __init__(
        self, method: FineTune, sources: dict[str, Source], runtime: Runtime, batch_size: int
    ) -> None:
        self.method = method
        self.rows = {
            name: TrainingRows(source, Views((), 0), runtime, batch_size) for name, source in sources.items()
        }

    def on_fit_start(self, trainer: Trainer) -> None:
        if not self.method.history:
            self.method.history.append(self._measured(trainer))

    def on_step_end(self, trainer: Trainer) -> None:
        if trainer.step % trainer.loader.steps_per_epoch:
            return
        now, history = self._measured(trainer), self.method.history
        history.append(now)
        if now["accuracy_train"] < history[0]["accuracy_train"] - self.method.config.largest_drop:
            trainer.progress.stopped_early = True
        else:
            self.method.kept.load_state_dict(trainer.student.model.state_dict())

    def _measured(self, trainer: Trainer) -> Row:
        row: Row = {}
        for name, rows in self.rows.items():
            found = figures(trainer.predict, rows.batches(), rows.runtime.sum).values()
            row |= {f"{figure}_{name}": value for figure, value in found.items()}
        return row


def rows_by_class(labels: Tensor, classes: int) -> tuple[Tensor, int]:
    """Positions ``[classes, fewest]`` of the first rows of every class, and how many the smallest class has.

    Raises:
        ValueError: a class has no rows.
    """
    counts = labels.bincount(minlength=classes)
    fewest = int(counts.min())
    if fewest == 0:
        raise ValueError(f"class {int(counts.argmin())} has no training rows; mcmi needs some of every class")
    order = labels.argsort(stable=True)
    starts = counts.cumsum(0) - counts
    return order[starts[:, None] + torch.arange(fewest)], fewest
