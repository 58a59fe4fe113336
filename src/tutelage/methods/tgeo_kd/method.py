"""TGeo-KD as a method: the student follows labels and teacher by a ratio of its own for every row; the network that
gives the ratios learns from what one step of the student does to the loss on held-out rows."""

from __future__ import annotations

import contextlib
import warnings
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import torch
from pydantic import Field
from torch import Tensor, nn

from tutelage.engine.compile import eager
from tutelage.engine.distributed import average_gradients
from tutelage.engine.method import Method, OptimSpec, Paper
from tutelage.engine.needs import Needs
from tutelage.engine.rng import derive_seed, seeded
from tutelage.engine.types import Batch, Outputs, Plot, Table, Term, Terms
from tutelage.engine.views import to_float
from tutelage.functional.classes import ClassSums, class_ids, class_sums
from tutelage.functional.divergences import forward_kl
from tutelage.functional.reductions import keep_rows, masked_mean, upcast
from tutelage.methods.tgeo_kd.bilevel import Derivative, Parameters, directional_derivative
from tutelage.methods.tgeo_kd.functional import (
    Edges,
    tgeo_alpha_gradient,
    tgeo_state,
)
from tutelage.methods.tgeo_kd.model import FusionRatio
from tutelage.methods.tgeo_kd.record import RatioRecord
from tutelage.recipe.config import MethodConfig, Range
from tutelage.recipe.schema import OptimizerConfig, ScheduleConfig

if TYPE_CHECKING:
    from tutelage.engine.spec import ModelSpec
    from tutelage.engine.step import Step

MEASURED = 2000
"""Training rows whose final ratios are held against the teacher's correctness."""
BINS = 10
Width = Annotated[int, Field(ge=1)]


class TGeoKDConfig(MethodConfig):
    """Options of tgeo_kd; defaults are for images (the authors' tabular runs: temperature 1.5, outer_every 1, warmup
    0)."""

    temperature: float = Field(
        4.0, gt=0, le=1000, description="Softens both sides of the divergence; its square is a factor of it."
    )
    edges: Edges = Field(
        "signed",
        description="What the ratio network reads: signed edges (the paper), or squared ones (the code).",
    )
    class_mean: bool = Field(
        True,
        description="Let it read the teacher's mean prediction of the class too; else the teacher's own twice.",
    )
    hidden: tuple[Width, ...] = Field((32, 16), description="Widths of the ratio network's hidden layers.")
    learn: bool = Field(
        True, description="Train the ratio network; else it stays as drawn, as in the authors' code."
    )
    outer_every: int = Field(5, ge=1, description="Steps between two updates of the ratio network.")
    warmup: float = Field(1.0, ge=0, description="Epochs before its first update.")
    ratio_optimizer: OptimizerConfig = Field(
        OptimizerConfig(name="adam", lr=1e-3), description="The ratio network's optimiser."
    )
    ratio_schedule: ScheduleConfig = Field(
        ScheduleConfig(name="constant"), description="The ratio network's learning rate over the run."
    )
    derivative: Derivative = Field(
        "forward",
        description="How the outer gradient is found: in forward mode, exact, or by central differences. A student "
        "with layers that have no forward-mode rule gets the latter, with a warning.",
    )

    @classmethod
    def search(cls) -> dict[str, Range]:
        return {"temperature": Range(1.0, 8.0)}


class Rows(NamedTuple):
    """What counts of a batch: logits of both sides ``[rows, classes]``, targets, and class ids ``[rows]``."""

    student: Tensor
    teacher: Tensor
    target: Tensor
    labels: Tensor

    @classmethod
    def of(cls, batch: Batch, student: Outputs, teacher: Outputs) -> Rows:
        assert batch.target is not None
        ours, theirs, target = keep_rows(batch.mask, student.logits, teacher.logits, batch.target)
        return cls(upcast(ours), upcast(theirs.detach()), target, class_ids(target))


class Losses(NamedTuple):
    """Both losses of every row: the divergence with the temperature's square, and the label loss."""

    kd: Tensor
    label: Tensor


class TGeoKD(Method):
    """Labels and the teacher's softened probabilities, weighed for every row by a network that reads how right student
    and teacher are and how far apart.

    The ratio network moves with the student's optimiser, not before it, so the student's step uses the ratio from
    before the update. Under gradient accumulation every micro-batch has a virtual step of its own.
    """

    Config = TGeoKDConfig
    paper = Paper(
        title="Less or More From Teacher: Exploiting Trilateral Geometry For Knowledge Distillation",
        venue="ICLR",
        year=2024,
        arxiv="2312.15112",
        claim="Learned sample-wise ratios give the student a higher mean test accuracy than the best constant ratio of "
        "a grid at equal budget, also with outliers.",
        card="tgeo_kd",
        family="vision logits",
    )
    needs = Needs(fields=("target",), loaders=("validation",), sharding="ddp", dynamic=True)
    config: TGeoKDConfig

    class_mean: Tensor

    def build(self, teacher: ModelSpec | None, student: ModelSpec, example: Batch) -> None:
        assert teacher is not None
        classes = teacher.outputs
        if classes is None:
            raise ValueError(f"tgeo_kd: the number of classes of {teacher.name} is not known")
        self.register_buffer("class_mean", torch.zeros(classes, classes))
        width = {"signed": 5, "squared": 9}[self.config.edges]
        self.ratio = FusionRatio(width * classes, self.config.hidden)
        self.record = RatioRecord()
        self.derivative: Derivative = self.config.derivative

    def prepare(self, data: Any, student: nn.Module, teacher: Any) -> None:
        """Means by class of what the teacher says of the training rows."""
        if not self.config.class_mean:
            return
        found = ClassSums(torch.zeros_like(self.class_mean), torch.zeros_like(self.class_mean[0]))
        for batch in data.batches(augmented=True):  # as a store has it
            logits, target = keep_rows(batch.mask, teacher.outputs(batch).logits, batch.target)
            said = upcast(logits).softmax(1)
            found = found.plus(class_sums(said, class_ids(target), len(self.class_mean)))
        self.class_mean.copy_(ClassSums(*map(data.runtime.sum, found)).means)

    def count(self, batch: Batch) -> dict[str, int | Tensor]:
        """The held-out loss weighs the same in every micro-batch, however many of its training rows count."""
        return super().count(batch) | {"held_out": 1}

    def optimizers(self) -> dict[str, OptimSpec]:
        ratio = OptimSpec(("method.*",), self.config.ratio_optimizer, self.config.ratio_schedule)
        return {"student": OptimSpec(("student.*",)), "ratio": ratio}

    def active(self, ctx: Step) -> set[str]:
        return {"student", "ratio"} if self._learns(ctx) else {"student"}

    def step(self, ctx: Step) -> Terms:
        teacher, learns = ctx.teacher(), self._learns(ctx)
        # Every pass of the student over this batch has the same dropout.
        seed = derive_seed(ctx.seed, "passes") if learns else None
        with seeded(seed) if seed is not None else contextlib.nullcontext():
            student = ctx.student()
        rows = Rows.of(ctx.batch, student, teacher)
        losses, ratio = self.losses(rows, ctx), self.ratios(rows)
        self.record.add(ratio, rows.teacher.argmax(1) == rows.labels)
        share = ratio.detach()
        terms = {
            "label": Term(masked_mean((1 - share) * losses.label)),
            "kd": Term(masked_mean(share * losses.kd)),
        }
        if seed is not None:
            with eager(ctx.setup.student.model):
                terms["outer"] = self._outer(losses, ratio, teacher, ctx, seed)
            ctx.seen["student"] = student
        return terms

    def losses(self, rows: Rows, ctx: Step) -> Losses:
        kd = self.config.temperature**2 * forward_kl(rows.student, rows.teacher, self.config.temperature)
        return Losses(kd, ctx.setup.task.row_losses(rows.student, rows.target))

    def ratios(self, rows: Rows) -> Tensor:
        """``[rows]``; gradients reach the ratio network alone."""
        ours, theirs = rows.student.detach().softmax(1), rows.teacher.softmax(1)
        mean = self.class_mean[rows.labels] if self.config.class_mean else theirs
        ratio: Tensor = self.ratio(tgeo_state(ours, theirs, rows.target, mean, edges=self.config.edges))
        return ratio

    def after_step(self, ctx: Step) -> None:
        self.record.take(ctx.gather)
        done = ctx.step + 1
        if done % ctx.steps_per_epoch == 0 or done == ctx.total_steps:
            self.record.close(ctx.epoch + 1)

    def tables(self) -> dict[str, Table]:
        return {"ratio by epoch": self.record.table()}

    def measure(self, ctx: Step) -> dict[str, Table]:
        """The final ratios by the probability that the teacher gives to a row's true class."""
        count, total = (self.class_mean.new_zeros(BINS) for _ in range(2))
        for batch in ctx.data.batches(augmented=True, most=MEASURED):
            rows = Rows.of(batch, ctx.student(batch, frozen=True), ctx.teacher(batch))
            ratio = self.ratios(rows)
            certain = rows.teacher.softmax(1).gather(1, rows.labels[:, None])[:, 0]
            bins = (certain * BINS).long().clamp(max=BINS - 1)
            count.index_add_(0, bins, torch.ones_like(ratio))
            total.index_add_(0, bins, ratio)
        count, total = (ctx.gather(part[None]).sum(0) for part in (count, total))
        table = [
            [(i + 0.5) / BINS, ratio / number, number / float(count.sum())]
            for i, (number, ratio) in enumerate(zip(count.tolist(), total.tolist(), strict=True))
            if number
        ]
        columns = ["teacher_probability", "mean_ratio", "share_of_rows"]
        drawn = (Plot("teacher_probability", ("mean_ratio",)),)
        return {"ratio by teacher correctness": Table(columns, table, drawn)}

    def _learns(self, ctx: Step) -> bool:
        due = ctx.step % self.config.outer_every == 0
        return self.config.learn and due and ctx.step >= self.config.warmup * ctx.steps_per_epoch

    def _outer(self, losses: Losses, ratio: Tensor, teacher: Outputs, ctx: Step, seed: int) -> Term:
        """The held-out loss after a virtual step, whose gradient reaches the ratio network."""
        lr = max(ctx.learning_rate("student"), 1e-12)  # a schedule may end at 0
        parameters = {name: value for name, value in ctx.parameters().items() if value.requires_grad}
        share = ratio.detach()
        inner = (share * losses.kd + (1 - share) * losses.label).sum()
        gradient = _gradients(inner, parameters, retain_graph=True)
        rows = ctx.mean(share.new_tensor(float(len(share)))).clamp(min=1 / ctx.setup.runtime.world)
        moved = {
            name: (value.detach() - lr / rows * gradient[name]).requires_grad_()
            for name, value in parameters.items()
        }
        held_out = to_float(next(ctx.loader("validation")))
        outer = ctx.label_loss(ctx.student(held_out, params=moved), held_out).mean
        direction = _gradients(outer, moved)
        slope = self._directional(parameters, direction, teacher, ctx, seed)
        # Over the rows of all ranks: gradients are averaged over ranks, so each divides by the mean number of rows.
        wanted = (tgeo_alpha_gradient(slope, lr) * ratio).sum() * (len(share) / rows)
        return Term(outer.detach() + wanted - wanted.detach(), "held_out")

    def _directional(
        self, parameters: Parameters, direction: Parameters, teacher: Outputs, ctx: Step, seed: int
    ) -> Tensor:
        """Derivative of every row's ``kd - label`` along ``direction``."""

        def gap(params: Parameters) -> Tensor:
            with seeded(seed):
                found = self.losses(Rows.of(ctx.batch, ctx.student(params=params), teacher), ctx)
            return found.kd - found.label

        try:
            return directional_derivative(gap, parameters, direction, self.derivative)
        except NotImplementedError as error:
            self.derivative = "difference"
            reason = str(error).partition("\n")[0]
            warnings.warn(
                f"tgeo_kd: the outer gradient is found by central differences, since a layer of the student has no "
                f"forward-mode rule ({reason}); method.derivative=difference says so from the start",
                stacklevel=2,
            )
            return directional_derivative(gap, parameters, direction, self.derivative)


def _gradients(loss: Tensor, parameters: Parameters, *, retain_graph: bool = False) -> dict[str, Tensor]:
    """Gradients by name, averaged over ranks; zeros where a parameter has no part in the loss."""
    values = list(parameters.values())
    found: list[Tensor | None] = list(
        torch.autograd.grad(
            loss, values, retain_graph=retain_graph, allow_unused=True, materialize_grads=True
        )
    )
    average_gradients(found)
    return {name: part for name, part in zip(parameters, found, strict=True) if part is not None}
