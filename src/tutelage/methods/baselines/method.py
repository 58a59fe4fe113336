"""The baselines as methods: labels alone, softened logits, and a hint from a middle layer."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from pydantic import Field

from tutelage.engine.layout import layout_of
from tutelage.engine.method import Method, Paper
from tutelage.engine.needs import Needs
from tutelage.engine.types import Batch, Outputs, Taps, Term, Terms
from tutelage.functional.divergences import kd_loss
from tutelage.functional.features import fitnet_loss
from tutelage.functional.reductions import keep_rows
from tutelage.methods.baselines.choices import OneTapConfig, Side, label_term, one_tap
from tutelage.methods.baselines.model import HintRegressor
from tutelage.recipe.config import MethodConfig, Range

if TYPE_CHECKING:
    from tutelage.engine.spec import ModelSpec
    from tutelage.engine.step import Step

_FAMILY = "vision logits and features"


class PlainTrainingConfig(MethodConfig):
    """Nothing to set."""


class PlainTraining(Method):
    """The label loss alone, soft labels included: what a student reaches without any teacher."""

    Config = PlainTrainingConfig
    paper = Paper(
        title="Plain training: the label loss alone",
        venue=None,
        year=None,
        arxiv=None,
        claim="Labels alone are the baseline that every other method has to beat.",
        card="baselines",
        family=_FAMILY,
    )
    needs = Needs(
        teacher="none",
        logits=(),
        fields=("target",),
        tasks=("classification", "multilabel", "regression", "language-model", "token-classification"),
    )

    def objective(self, student: Outputs, teacher: Outputs | None, batch: Batch, ctx: Step) -> Terms:
        return {"label": ctx.label_loss(student, batch)}


class KDConfig(MethodConfig):
    """Options of kd; defaults are those of its CIFAR-100 runs (ImageNet: 0.5, 0.5, temperature 1)."""

    label_weight: float = Field(0.1, ge=0, description="Weight of the label loss.")
    loss_weight: float = Field(0.9, ge=0, description="Weight of the divergence from the teacher.")
    temperature: float = Field(
        4.0, gt=0, le=1000, description="Softens both sides; its square is a factor of the loss."
    )

    @classmethod
    def search(cls) -> dict[str, Range]:
        return super().search() | {"temperature": Range(1.0, 8.0)}


class KD(Method):
    """Labels, and the KL divergence from the teacher's softened probabilities."""

    Config = KDConfig
    paper = Paper(
        title="Distilling the Knowledge in a Neural Network",
        venue="preprint",
        year=2015,
        arxiv="1503.02531",
        claim="With a better teacher, kd reaches a higher mean test accuracy than none under an equal tuning budget.",
        card="baselines",
        family=_FAMILY,
    )
    needs = Needs(scale="log_probs", fields=("target",), tasks=("classification", "token-classification"))
    config: KDConfig

    def objective(self, student: Outputs, teacher: Outputs | None, batch: Batch, ctx: Step) -> Terms:
        assert teacher is not None
        divergence = kd_loss(student.logits, teacher.logits, self.config.temperature, batch.mask)
        terms = label_term(self.config.label_weight, student, batch, ctx)
        return terms | {"kd": Term(self.config.loss_weight * divergence, ctx.items)}


class FitNetConfig(OneTapConfig):
    """Options of fitnet."""

    loss_weight: float = Field(100.0, ge=0, description="Weight of the hint loss.")
    hint_layer: int = Field(
        2,
        ge=1,
        le=1000,
        description="Stage of both models that gives the hint, counted from 1, where no tap is set.",
    )
    two_stage: bool = Field(
        False,
        description="As in the paper: first the hint alone, then labels and softened logits without the hint.",
    )
    hint_share: float = Field(
        0.5, gt=0, lt=1, description="two_stage: share of the steps that train the hint."
    )
    kd_weight: float = Field(0.9, ge=0, description="two_stage: weight of the softened logits' divergence.")
    temperature: float = Field(
        4.0, gt=0, le=1000, description="two_stage: temperature of the softened logits."
    )


class FitNet(Method):
    """Labels, and the squared difference of a projected student map from a map of the teacher.

    In two stages, the first trains the regressor and the student up to its hint by the hint loss alone (deeper
    parameters get no gradient and stay as they are), the second the student by labels and softened logits.
    """

    Config = FitNetConfig
    paper = Paper(
        title="FitNets: Hints for Thin Deep Nets",
        venue="ICLR",
        year=2015,
        arxiv="1412.6550",
        claim="A hint from a middle layer of the teacher trains a thin, deep student better than labels alone.",
        card="baselines",
        family=_FAMILY,
    )
    needs = Needs(
        logits=(),
        teacher_taps=True,
        fields=("target",),
        couples_rows="norm",
        tasks=("classification", "multilabel", "regression"),
    )
    config: FitNetConfig

    def __init__(self, config: FitNetConfig) -> None:
        super().__init__(config)
        if config.two_stage:
            self.needs = dataclasses.replace(  # type: ignore[misc]
                self.needs, logits=("dense",), scale="log_probs", dynamic=True, tasks=("classification",)
            )

    def taps(self, teacher: ModelSpec | None, student: ModelSpec) -> Taps:
        assert teacher is not None
        student_tap = one_tap(student, "student", self.config.student_tap, self._stage)
        teacher_tap = one_tap(teacher, "teacher", self.config.teacher_tap, self._stage)
        return Taps(student=(student_tap,), teacher=(teacher_tap,), teacher_logits=self.config.two_stage)

    def build(self, teacher: ModelSpec | None, student: ModelSpec, example: Batch) -> None:
        assert teacher is not None
        taps = self.taps(teacher, student)
        self.student_tap, self.teacher_tap = taps.student[0], taps.teacher[0]
        self.student_layout = layout_of(student, self.student_tap)
        self.teacher_layout = layout_of(teacher, self.teacher_tap)
        self.regressor = HintRegressor(self.student_layout.shape, self.teacher_layout.shape)

    def objective(self, student: Outputs, teacher: Outputs | None, batch: Batch, ctx: Step) -> Terms:
        assert teacher is not None
        if self.config.two_stage and ctx.step < self.config.hint_share * ctx.total_steps:
            return self._hint(student, teacher, batch)
        terms = label_term(self.config.label_weight, student, batch, ctx)
        if not self.config.two_stage:
            return terms | self._hint(student, teacher, batch)
        divergence = kd_loss(student.logits, teacher.logits, self.config.temperature, batch.mask)
        return terms | {"kd": Term(self.config.kd_weight * divergence)}

    def _hint(self, student: Outputs, teacher: Outputs, batch: Batch) -> Terms:
        # All rows go through the regressor, and rows that do not count are left out after it: its BatchNorm and, under
        # DDP, its collective calls then do not depend on the mask.
        projected = self.regressor(self.student_layout.to_map(student.features[self.student_tap]))
        hint = self.teacher_layout.to_map(teacher.features[self.teacher_tap])
        pair = keep_rows(batch.mask, projected, hint)
        return {"hint": Term(self.config.loss_weight * fitnet_loss(*pair))}

    def _stage(self, spec: ModelSpec, side: Side) -> str:
        stages = spec.stages()
        if len(stages) < self.config.hint_layer:
            raise ValueError(
                f"method.hint_layer={self.config.hint_layer}: the {side} {spec.name} has {len(stages)} stage(s) "
                f"({', '.join(stages) or 'none'}); set a smaller hint_layer, or method.{side}_tap"
            )
        return stages[self.config.hint_layer - 1]
