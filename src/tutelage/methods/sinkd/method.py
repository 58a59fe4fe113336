"""SinKD as a method: labels, the teacher's softened output sample by sample, and the transport between both sides'
outputs of a batch."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field
from torch import Tensor

from tutelage.engine.method import Method, Paper
from tutelage.engine.needs import Needs
from tutelage.engine.types import Batch, Outputs, Term, Terms
from tutelage.methods.sinkd.compared import Compared
from tutelage.methods.sinkd.functional import annealed_temperature, sinkd_loss
from tutelage.recipe.config import MethodConfig, Range
from tutelage.tasks.token_losses import divergence_terms

if TYPE_CHECKING:
    from tutelage.engine.spec import ModelSpec
    from tutelage.engine.step import Step


class SinKDConfig(MethodConfig):
    """Options of sinkd; defaults are those of the authors' GLUE runs."""

    alpha: float = Field(
        0.9, ge=0, le=1, description="Weight of the KD term; the label loss has the rest, 1 - alpha."
    )
    kd_temperature: float = Field(
        2.0, gt=0, le=1000, description="Softens both sides of the KD term; its square is no factor."
    )
    anneal: bool = Field(False, description="Lower that temperature to 1, epoch by epoch.")
    beta: float = Field(0.8, ge=0, description="Weight of the transport term, beside its scale.")
    scale: float = Field(
        0.001, ge=0, description="Factor of the transport, which is a sum over the rows (tokens) compared."
    )
    reduction: Literal["sum", "mean"] = Field(
        "sum", description="sum: the term grows with the micro-batch, as in the code; mean: it does not."
    )
    temperature: float = Field(2.0, gt=0, le=1000, description="Softens both sides of the transport.")
    epsilon: float = Field(
        0.1, gt=0, le=100, description="Weight of the plan's entropy; small makes it sharp."
    )
    n_iters: int = Field(20, ge=1, le=10_000, description="Sinkhorn's iterations.")
    most_tokens: int = Field(
        512,
        ge=2,
        le=65_536,
        description="Tokens of a micro-batch, of all ranks, that are compared; of more, so many are drawn. "
        "Memory grows with it times the vocabulary, time with its square.",
    )
    fused: bool = Field(
        True,
        description="Labels and KD from hidden states and heads, chunk by chunk; false: from logits, made whole.",
    )

    @classmethod
    def search(cls) -> dict[str, Range]:
        return {"scale": Range(0.001, 0.1), "kd_temperature": Range(1.0, 8.0)}


class SinKD(Method):
    """Labels and KD are means over this rank's rows or tokens; the transport is that of the micro-batch's rows or
    tokens on all ranks, which exchange no more than those that are compared."""

    Config: ClassVar[type[MethodConfig]] = SinKDConfig
    paper = Paper(
        title="Sinkhorn Distance Minimization for Knowledge Distillation",
        venue="COLING",
        year=2024,
        arxiv="2402.17110",
        claim="Where the outputs of teacher and student hardly overlap, the Sinkhorn distance of a batch's outputs "
        "teaches the student more than KL, reverse KL or JS divergence.",
        card="sinkd",
        family="white-box LLM",
    )
    needs = Needs(
        scale="log_probs",
        fields=("target",),
        couples_rows="loss",
        tasks=("classification", "token-classification", "language-model"),
    )
    config: SinKDConfig
    sees_all_ranks = False
    """All ranks' rows are brought together here, the few that are compared, and not every row for every term."""

    def build(self, teacher: ModelSpec | None, student: ModelSpec, example: Batch) -> None:
        if student.outputs == 1:
            raise ValueError(
                "sinkd: the student has one output, whose softmax is always 1; use task: regression, and a method "
                "that is defined for it (tutelage methods)"
            )

    def objective(self, student: Outputs, teacher: Outputs | None, batch: Batch, ctx: Step) -> Terms:
        assert teacher is not None
        config = self.config
        terms: Terms = {}
        if config.alpha:
            terms = divergence_terms(
                "forward_kl",
                student,
                teacher,
                batch,
                ctx,
                options={"subtract_entropy": False},
                label_weight=1 - config.alpha,
                loss_weight=config.alpha,
                temperature=self.kd_temperature(ctx),
                fused=config.fused,
                alone=self.alone,
            )
            terms["kd"] = terms.pop("forward_kl")
        else:
            terms["label"] = ctx.label_loss(student, batch)
        if config.beta and config.scale:
            terms["sinkhorn"] = Term(config.beta * self.transport(student, teacher, batch, ctx), ctx.items)
        return terms

    def kd_temperature(self, ctx: Step) -> float:
        """Of this epoch."""
        if not self.config.anneal:
            return self.config.kd_temperature
        epochs = math.ceil(ctx.total_steps / ctx.steps_per_epoch)
        return annealed_temperature(ctx.epoch, epochs, self.config.kd_temperature)

    def transport(self, student: Outputs, teacher: Outputs, batch: Batch, ctx: Step) -> Tensor:
        """Scaled cost over the rows or tokens of all ranks that are compared."""
        config = self.config
        compared = Compared.of(batch, ctx, config.most_tokens)
        return sinkd_loss(
            compared.logits(student),
            compared.logits(teacher),
            temperature=config.temperature,
            epsilon=config.epsilon,
            n_iters=config.n_iters,
            scale=config.scale,
            reduction=config.reduction,
        )
