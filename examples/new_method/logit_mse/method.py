"""`LogitMSE`: regression on a teacher's logits (Ba and Caruana, NeurIPS 2014)."""

from __future__ import annotations

from pydantic import Field

from tutelage.engine.method import Method, Paper
from tutelage.engine.needs import Needs
from tutelage.engine.step import Step
from tutelage.engine.types import Batch, Outputs, Term, Terms
from tutelage.recipe.config import MethodConfig

from .functional import logit_mse_loss


class LogitMSEConfig(MethodConfig):
    """Options of `logit_mse`."""

    label_weight: float = Field(
        0.0, ge=0, description="Weight of the label loss; the paper trains on logits alone."
    )


class LogitMSE(Method):
    Config = LogitMSEConfig
    paper = Paper(
        title="Do Deep Nets Really Need to be Deep?",
        venue="NeurIPS",
        year=2014,
        arxiv="1312.6184",
        claim="A shallow network learns more from a deep network's logits than from the labels.",
        card="logit_mse",
        family="vision logits",
    )
    needs = Needs(fields=("target",))

    def objective(self, student: Outputs, teacher: Outputs | None, batch: Batch, ctx: Step) -> Terms:
        assert teacher is not None
        terms = {"logit_mse": Term(logit_mse_loss(student.logits, teacher.logits))}
        if self.config.label_weight:
            label = ctx.label_loss(student, batch)
            terms["label"] = Term(self.config.label_weight * label.mean, label.items)
        return terms
