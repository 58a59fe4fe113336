"""dkd and dist as methods: both read the teacher's logits alone."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field

from tutelage.engine.method import Method, Paper
from tutelage.engine.needs import Needs
from tutelage.engine.types import Batch, Outputs, Term, Terms
from tutelage.functional.correlation import dist_loss
from tutelage.functional.decoupled import dkd_terms
from tutelage.functional.reductions import keep_rows
from tutelage.methods.baselines.choices import label_term, warmup
from tutelage.recipe.config import MethodConfig, Range

if TYPE_CHECKING:
    from tutelage.engine.spec import ModelSpec
    from tutelage.engine.step import Step

_FAMILY = "vision logits and features"


class DKDConfig(MethodConfig):
    """Options of dkd; defaults are those of its CIFAR-100 runs (ImageNet: beta 0.5, temperature 1, warmup_epochs 1)."""

    label_weight: float = Field(1.0, ge=0, description="Weight of the label loss.")
    loss_weight: float = Field(1.0, ge=0, description="Weight of both parts together.")
    alpha: float = Field(1.0, ge=0, description="Weight of the target class's part.")
    beta: float = Field(8.0, ge=0, description="Weight of the other classes' part.")
    temperature: float = Field(
        4.0, gt=0, le=1000, description="Softens both sides; its square is a factor of both parts."
    )
    warmup_epochs: int = Field(
        20, ge=0, le=1_000_000, description="Epochs over which both parts grow to their full weight."
    )

    @classmethod
    def search(cls) -> dict[str, Range]:
        return super().search() | {"beta": Range.around(8.0), "temperature": Range(1.0, 8.0)}


class DKD(Method):
    """Labels, and the teacher's divergence split in two: the target class against the rest, and the rest by itself."""

    Config = DKDConfig
    paper = Paper(
        title="Decoupled Knowledge Distillation",
        venue="CVPR",
        year=2022,
        arxiv="2203.08679",
        claim="With one teacher and equal tuning, dkd's mean test accuracy is not below that of kd.",
        card="baselines",
        family=_FAMILY,
    )
    needs = Needs(scale="log_probs", fields=("target",))
    config: DKDConfig

    def build(self, teacher: ModelSpec | None, student: ModelSpec, example: Batch) -> None:
        if example.target is not None and example.target.dim() > 1:
            raise ValueError(
                f"dkd tells a row's target class from the others, so it takes class ids; this data's targets have "
                f"shape {list(example.target.shape[1:])} a row"
            )

    def objective(self, student: Outputs, teacher: Outputs | None, batch: Batch, ctx: Step) -> Terms:
        assert teacher is not None
        assert batch.target is not None
        ours, theirs, target = keep_rows(batch.mask, student.logits, teacher.logits, batch.target)
        parts = dkd_terms(ours, theirs, target, temperature=self.config.temperature)
        weight = self.config.loss_weight * warmup(ctx.epoch, self.config.warmup_epochs)
        return label_term(self.config.label_weight, student, batch, ctx) | {
            "target": Term(weight * self.config.alpha * parts.target),
            "nontarget": Term(weight * self.config.beta * parts.nontarget),
        }


class DISTConfig(MethodConfig):
    """Options of dist; defaults are those of its classes (CIFAR-100 runs: beta and gamma 2)."""

    label_weight: float = Field(1.0, ge=0, description="Weight of the label loss.")
    loss_weight: float = Field(1.0, ge=0, description="Weight of both parts together.")
    beta: float = Field(1.0, ge=0, description="Weight of the correlation between classes, by rows.")
    gamma: float = Field(1.0, ge=0, description="Weight of the correlation between rows, by classes.")
    temperature: float = Field(
        1.0, gt=0, le=1000, description="Softens both sides; its square is a factor of the loss."
    )

    @classmethod
    def search(cls) -> dict[str, Range]:
        return super().search() | {"temperature": Range(1.0, 8.0)}


class DIST(Method):
    """Labels, and how well the student's probabilities correlate with the teacher's, by rows and by classes."""

    Config = DISTConfig
    paper = Paper(
        title="Knowledge Distillation from A Stronger Teacher",
        venue="NeurIPS",
        year=2022,
        arxiv="2205.10536",
        claim="Correlations are what a student can keep of a much stronger teacher: they train it better than labels.",
        card="baselines",
        family=_FAMILY,
    )
    needs = Needs(scale="log_probs", fields=("target",), couples_rows="loss")
    config: DISTConfig

    def objective(self, student: Outputs, teacher: Outputs | None, batch: Batch, ctx: Step) -> Terms:
        assert teacher is not None
        config = self.config
        ours, theirs = keep_rows(batch.mask, student.logits, teacher.logits)
        loss = dist_loss(ours, theirs, config.beta, config.gamma, config.temperature)
        return label_term(config.label_weight, student, batch, ctx) | {
            "dist": Term(config.loss_weight * loss)
        }
