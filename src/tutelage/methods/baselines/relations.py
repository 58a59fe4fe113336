"""rkd, pkt and sp as methods: how the rows of a batch lie to each other in one feature of each model."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING

from pydantic import Field
from torch import Tensor

from tutelage.engine.method import Method, Paper
from tutelage.engine.needs import Needs
from tutelage.engine.types import Batch, Outputs, Taps, Term, Terms
from tutelage.functional.reductions import keep_rows
from tutelage.functional.relations import pkt_loss, rkd_loss, sp_loss
from tutelage.methods.baselines.choices import (
    OneTapConfig,
    Side,
    label_term,
    last_stage,
    one_tap,
    pooled_feature,
)

if TYPE_CHECKING:
    from tutelage.engine.spec import ModelSpec
    from tutelage.engine.step import Step

_FAMILY = "vision logits and features"


class RelationConfig(OneTapConfig):
    """Options that all three have."""

    loss_weight: float = Field(1.0, ge=0, description="Weight of the difference between the relations.")


class Relation(Method, ABC):
    """Labels, and a loss between the relations of a batch's rows.

    Features are flattened, so any tap serves, and the sides may differ in width.
    """

    needs = Needs(
        logits=(),
        teacher_taps=True,
        fields=("target",),
        couples_rows="loss",
        tasks=("classification", "multilabel", "regression"),
    )
    config: RelationConfig

    @abstractmethod
    def difference(self, student: Tensor, teacher: Tensor) -> Tensor:
        """The loss between two features of the same rows, ``[batch, ...]``."""

    def default_tap(self, spec: ModelSpec, side: Side) -> str:
        return pooled_feature(spec, side)

    def taps(self, teacher: ModelSpec | None, student: ModelSpec) -> Taps:
        assert teacher is not None
        student_tap = one_tap(student, "student", self.config.student_tap, self.default_tap)
        teacher_tap = one_tap(teacher, "teacher", self.config.teacher_tap, self.default_tap)
        return Taps(student=(student_tap,), teacher=(teacher_tap,), teacher_logits=False)

    def build(self, teacher: ModelSpec | None, student: ModelSpec, example: Batch) -> None:
        taps = self.taps(teacher, student)
        self.student_tap, self.teacher_tap = taps.student[0], taps.teacher[0]

    def objective(self, student: Outputs, teacher: Outputs | None, batch: Batch, ctx: Step) -> Terms:
        assert teacher is not None
        ours, theirs = student.features[self.student_tap], teacher.features[self.teacher_tap]
        difference = self.difference(*keep_rows(batch.mask, ours, theirs))
        terms = label_term(self.config.label_weight, student, batch, ctx)
        return terms | {self.config.name: Term(self.config.loss_weight * difference)}


class RKDConfig(RelationConfig):
    """Options of rkd."""

    distance_weight: float = Field(25.0, ge=0, description="Weight of the distances within the loss.")
    angle_weight: float = Field(50.0, ge=0, description="Weight of the angles within the loss.")
    squared: bool = Field(False, description="Compare squared distances.")
    eps: float = Field(1e-12, gt=0, le=1, description="Least squared distance of two rows.")


class RKD(Relation):
    """Labels, and the distances and angles between rows in the pooled feature."""

    Config = RKDConfig
    paper = Paper(
        title="Relational Knowledge Distillation",
        venue="CVPR",
        year=2019,
        arxiv="1904.05068",
        claim="Distances and angles between the teacher's embeddings train a student better than labels alone.",
        card="baselines",
        family=_FAMILY,
    )
    config: RKDConfig

    def difference(self, student: Tensor, teacher: Tensor) -> Tensor:
        config = self.config
        return rkd_loss(
            student, teacher, config.distance_weight, config.angle_weight, config.squared, config.eps
        )


class PKTConfig(RelationConfig):
    """Options of pkt."""

    loss_weight: float = Field(
        30_000.0, ge=0, description="Weight of the divergence, a mean over all pairs of rows."
    )
    eps: float = Field(1e-7, gt=0, le=1, description="Added to norms and probabilities.")


class PKT(Relation):
    """Labels, and the distribution of each row's cosine similarities to the others in the pooled feature."""

    Config = PKTConfig
    paper = Paper(
        title="Learning Deep Representations with Probabilistic Knowledge Transfer",
        venue="ECCV",
        year=2018,
        arxiv="1803.10837",
        claim="A student that keeps the distribution of the teacher's similarities beats one trained on labels alone.",
        card="baselines",
        family=_FAMILY,
    )
    config: PKTConfig

    def difference(self, student: Tensor, teacher: Tensor) -> Tensor:
        return pkt_loss(student, teacher, self.config.eps)


class SPConfig(RelationConfig):
    """Options of sp."""

    loss_weight: float = Field(
        3000.0, ge=0, description="Weight of the difference, a mean over all pairs of rows."
    )


class SP(Relation):
    """Labels, and the inner products of the rows' maps at the last stage, each row of them at length 1."""

    Config = SPConfig
    paper = Paper(
        title="Similarity-Preserving Knowledge Distillation",
        venue="ICCV",
        year=2019,
        arxiv="1907.09682",
        claim="A student that keeps the teacher's similarities between activations beats one trained on labels alone.",
        card="baselines",
        family=_FAMILY,
    )
    config: SPConfig

    def difference(self, student: Tensor, teacher: Tensor) -> Tensor:
        return sp_loss(student, teacher)

    def default_tap(self, spec: ModelSpec, side: Side) -> str:
        return last_stage(spec, side)
