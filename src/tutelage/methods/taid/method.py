"""TAID as a method: a divergence from a target that moves from the student to the teacher, beside the label loss."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from tutelage.engine.method import Method, Paper
from tutelage.engine.needs import Needs
from tutelage.engine.types import Batch, Outputs, Plot, Table, Term, Terms
from tutelage.functional.analytic import Divergence, make_divergence
from tutelage.methods.taid.functional import TaidStep, mixed_logits, taid_step
from tutelage.recipe.config import MethodConfig, Range
from tutelage.tasks.token_losses import divergence_terms

if TYPE_CHECKING:
    from tutelage.engine.spec import ModelSpec
    from tutelage.engine.step import Step

POINTS = 50
"""Rows of the table of the schedule, at most: a long run keeps the last state of each part of it."""
COLUMNS = ["step", "t", "momentum", "loss", "delta_t"]


class TAIDConfig(MethodConfig):
    """Options of taid; defaults are the authors'. Their ``distil_ratio`` r is here a ``loss_weight`` of r and a
    ``label_weight`` of 1 - r."""

    t_start: float = Field(0.4, ge=0, lt=1, description="The teacher's weight in the target at first.")
    t_end: float = Field(1.0, gt=0, le=1, description="The teacher's weight at the last step at the latest.")
    alpha: float = Field(
        5e-4, ge=0, le=1, description="How far the weight may run ahead of the line, a step."
    )
    beta: float = Field(0.99, ge=0, le=1, description="Momentum of the loss's relative fall.")
    adaptive: bool = Field(
        True, description="Let the fall of the loss move the weight; false: the line alone."
    )
    update_every: Literal["step", "forward"] = Field(
        "step",
        description="Move the weight once a step, by the mean loss over micro-batches and ranks; or after every "
        "forward, as the authors' code.",
    )
    divergence: Literal[
        "forward_kl",
        "reverse_kl",
        "symmetric_kl",
        "skewed_forward_kl",
        "skewed_reverse_kl",
        "generalized_jsd",
        "adaptive_kl",
        "total_variation",
    ] = Field("forward_kl", description="Of the target from the student; the paper's is forward_kl.")
    options: dict[str, float] = Field({}, description="Of that divergence: skew, beta, mu or weight.")
    schedule_loss: Literal["cross_entropy", "kl"] = Field(
        "cross_entropy",
        description="What moves the weight under forward_kl: the cross-entropy with the target (the code), or the KL "
        "(the paper). Another divergence moves it by its own value.",
    )
    label_weight: float = Field(0.0, ge=0, description="Weight of the label loss.")
    loss_weight: float = Field(1.0, gt=0, description="Weight of the divergence from the target.")
    fused: bool = Field(
        True, description="From hidden states and heads, chunk by chunk; false: from logits, made whole."
    )

    @classmethod
    def conflicts(cls, values: Mapping[str, Any]) -> list[str]:
        start, end = values["t_start"], values["t_end"]
        reasons = []
        if isinstance(start, int | float) and isinstance(end, int | float) and start > end:
            reasons.append(
                f"t_start is {start}, above t_end, {end}: the target moves to the teacher; swap them"
            )
        name, options = values["divergence"], values["options"]
        if values["schedule_loss"] == "kl" and name != "forward_kl":
            reasons.append(f"schedule_loss: kl belongs to divergence: forward_kl; {name} has one value alone")
        if isinstance(options, Mapping) and "subtract_entropy" in options:
            reasons.append("options.subtract_entropy is said by schedule_loss: kl has it, cross_entropy not")
        elif isinstance(name, str) and isinstance(options, Mapping):
            try:
                make_divergence(name, **options)
            except (TypeError, ValueError) as error:
                reasons.append(f"options: {error}")
        return reasons

    @property
    def all_options(self) -> dict[str, Any]:
        """What the divergence is made with."""
        if self.divergence == "forward_kl":
            return {"subtract_entropy": self.schedule_loss == "kl"}
        return self.options

    @classmethod
    def search(cls) -> dict[str, Range]:
        return {"t_start": Range(0.1, 0.8), "alpha": Range.around(5e-4)}


class TAID(Method):
    """The schedule's state is in 0-dim float64 buffers, the same on all ranks; no step waits for a device to read
    it."""

    Config: ClassVar[type[MethodConfig]] = TAIDConfig
    paper = Paper(
        title="TAID: Temporally Adaptive Interpolated Distillation for Efficient Knowledge Transfer in Language Models",
        venue="ICLR",
        year=2025,
        arxiv="2501.16937",
        claim="A target that moves from the student to the teacher lets the student gain from ever larger teachers, "
        "where plain KL falls off.",
        card="taid",
        family="white-box LLM",
    )
    needs = Needs(
        scale="log_probs",  # what logits of a row have in common cancels out of the mixture
        fields=("target",),
        tasks=("language-model", "token-classification", "classification"),
    )
    config: TAIDConfig

    t: Tensor
    momentum: Tensor
    previous: Tensor
    delta_t: Tensor
    pending: Tensor
    path: Tensor

    def build(self, teacher: ModelSpec | None, student: ModelSpec, example: Batch) -> None:
        start = TaidStep(*torch.tensor([self.config.t_start, 0.0, math.nan, math.nan], dtype=torch.float64))
        for name, value in start._asdict().items():
            self.register_buffer(name, value.clone())
        self.register_buffer("pending", torch.zeros(2, dtype=torch.float64))
        self.register_buffer("path", torch.full((POINTS, len(COLUMNS)), math.nan, dtype=torch.float64))

    @property
    def state(self) -> TaidStep:
        return TaidStep(self.t, self.momentum, self.previous, self.delta_t)

    def objective(self, student: Outputs, teacher: Outputs | None, batch: Batch, ctx: Step) -> Terms:
        assert teacher is not None
        config = self.config
        name: str = config.divergence
        options = config.all_options
        fused = config.fused and student.hidden is not None and student.head is not None
        if fused:
            of = make_divergence(name, **options)
            assert isinstance(of, Divergence)
            name, options = "taid", {"t": self.t, "of": of}
        else:
            teacher = Outputs(mixed_logits(student.logits, teacher.logits, self.t))
        terms = divergence_terms(
            name,
            student,
            teacher,
            batch,
            ctx,
            options=options,
            label_weight=config.label_weight,
            loss_weight=config.loss_weight,
            fused=fused,
            alone=self.alone,
        )
        found = terms.pop(name)
        self._take_up(found, batch, ctx)
        return terms | {"taid": found}

    def _take_up(self, found: Term, batch: Batch, ctx: Step) -> None:
        """Keep a micro-batch's loss for the schedule, with how many items it is the mean of."""
        count = self.count(batch)[found.items]
        self.pending[0] += found.mean.detach().double() / self.config.loss_weight * count
        self.pending[1] += count
        if self.config.update_every == "forward":
            self._move(ctx, ctx.step)

    def after_step(self, ctx: Step) -> None:
        if self.config.update_every == "step":
            self._move(ctx, ctx.step + 1)

    @torch.no_grad()
    def _move(self, ctx: Step, done: int) -> None:
        """The schedule after the losses kept, of all ranks; ``done`` optimiser steps have been taken."""
        config = self.config
        total, items = ctx.mean(self.pending)
        loss = total / items
        after = taid_step(
            self.state,
            loss,
            done / ctx.total_steps,
            config.t_start,
            config.t_end,
            config.alpha,
            config.beta,
            config.adaptive,
        )
        for now, then in zip(self.state, after, strict=True):
            # Where nothing counted there is no loss; from one that is not finite the schedule would not recover.
            now.copy_(torch.where(loss.isfinite(), then, now))
        self.pending.zero_()
        step = self.t.new_full((), ctx.step + 1)
        self.path[ctx.step * POINTS // ctx.total_steps] = torch.stack([step, *self.state])

    def tables(self) -> dict[str, Table]:
        rows = [
            [int(row[0]), *(value if math.isfinite(value) else None for value in row[1:])]
            for row in self.path.tolist()
            if math.isfinite(row[0])
        ]
        drawn = tuple(Plot("step", (name,)) for name in COLUMNS[1:])
        return {"taid schedule": Table(COLUMNS, rows, drawn)}
