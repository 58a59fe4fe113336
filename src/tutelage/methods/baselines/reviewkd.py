"""reviewkd as a method."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING

from pydantic import Field
from torch import Tensor, nn

from tutelage.engine.method import Paper
from tutelage.engine.types import Batch, Outputs, Taps, Term, Terms
from tutelage.functional.reductions import keep_rows
from tutelage.functional.review import hcl_loss
from tutelage.methods.baselines.choices import (
    Paths,
    Side,
    StageTapsConfig,
    label_term,
    stage_pairs,
    warmup,
)
from tutelage.methods.baselines.model import AttentionFusion
from tutelage.methods.baselines.stages import StageMethod, before_last_activation

if TYPE_CHECKING:
    from tutelage.engine.spec import ModelSpec
    from tutelage.engine.step import Step


class ReviewKDConfig(StageTapsConfig):
    """Options of reviewkd; defaults are those of its code (its CIFAR-100 runs: loss_weight 5)."""

    loss_weight: float = Field(1.0, ge=0, description="Weight of the maps' loss, summed over stages.")
    warmup_epochs: int = Field(
        20, ge=0, description="Epochs over which that weight grows from nothing; 0: none."
    )
    max_width: int = Field(
        512,
        ge=1,
        le=65536,
        description="Most channels of what stages hand on; else the deepest student map's.",
    )
    pooled: bool = Field(True, description="Compare the classifiers' inputs too, as the deepest stage.")
    teacher_preact: bool = Field(
        True, description="Where teacher_taps is left out: its stages before their last activation."
    )
    student_preact: bool = Field(
        False, description="Where student_taps is left out: its stages before their last activation."
    )


class ReviewKD(StageMethod):
    """Labels, and the teacher's map of every stage from that stage of the student fused with all deeper ones.

    The fusing blocks are trained with the student and dropped at the end.
    """

    Config = ReviewKDConfig
    paper = Paper(
        title="Distilling Knowledge via Knowledge Review",
        venue="CVPR",
        year=2021,
        arxiv="2104.09044",
        claim="A student whose deep stages help to meet the teacher's shallow ones beats one trained on labels alone.",
        card="baselines",
        family="vision logits and features",
    )
    needs = dataclasses.replace(StageMethod.needs, couples_rows="norm")
    config: ReviewKDConfig

    def taps(self, teacher: ModelSpec | None, student: ModelSpec) -> Taps:
        assert teacher is not None
        config = self.config
        ours, theirs = stage_pairs(student, teacher, config.student_taps, config.teacher_taps)
        if config.student_preact and config.student_taps is None:
            ours = _before_activation(student, "student", ours)
        if config.teacher_preact and config.teacher_taps is None:
            theirs = _before_activation(teacher, "teacher", theirs)
        if config.pooled:
            ours, theirs = (*ours, _pooled(student, "student")), (*theirs, _pooled(teacher, "teacher"))
        return Taps(student=ours, teacher=theirs, teacher_logits=False)

    def build(self, teacher: ModelSpec | None, student: ModelSpec, example: Batch) -> None:
        super().build(teacher, student, example)
        widths = [shape[0] for shape in self.student_maps.shapes]
        mid = min(self.config.max_width, widths[-1])
        self.fusions = nn.ModuleList(
            AttentionFusion(width, mid, shape[0], fuse=number + 1 < len(widths))
            for number, (width, shape) in enumerate(zip(widths, self.teacher_maps.shapes, strict=True))
        )

    def objective(self, student: Outputs, teacher: Outputs | None, batch: Batch, ctx: Step) -> Terms:
        assert teacher is not None
        theirs = self.teacher_maps(teacher.features)
        reviewed = self._review(self.student_maps(student.features), theirs)
        # Rows that do not count are left out after the fusions, whose BatchNorm then does not depend on the mask.
        kept = keep_rows(batch.mask, *reviewed, *theirs)
        loss = hcl_loss(kept[: len(theirs)], kept[len(theirs) :])
        weight = self.config.loss_weight * warmup(ctx.epoch, self.config.warmup_epochs)
        terms = label_term(self.config.label_weight, student, batch, ctx)
        return terms | {"review": Term(weight * loss)}

    def _review(self, maps: Sequence[Tensor], like: Sequence[Tensor]) -> list[Tensor]:
        """From deep to shallow: what each stage of the student offers, in the shape of the teacher's maps."""
        residual: Tensor | None = None
        reviewed: list[Tensor] = []
        for fusion, features, target in zip(
            reversed(self.fusions), reversed(maps), reversed(like), strict=True
        ):
            out, residual = fusion(features, residual, (target.shape[2], target.shape[3]))
            reviewed.insert(0, out)
        return reviewed


def _before_activation(spec: ModelSpec, side: Side, stages: Paths) -> Paths:
    found = {stage: before_last_activation(spec, stage) for stage in stages}
    if missing := [stage for stage, tap in found.items() if tap is None]:
        warnings.warn(
            f"reviewkd: no activation module ends {', '.join(missing)} of the {side} {spec.name}; what they give is "
            f"taken as it is. Set method.{side}_taps, or method.{side}_preact=false where that is meant",
            stacklevel=2,
        )
    return tuple(tap or stage for stage, tap in found.items())


def _pooled(spec: ModelSpec, side: Side) -> str:
    if spec.head is None:
        raise ValueError(
            f"reviewkd: no single layer gives the logits of the {side} {spec.name}, so that its pooled feature is not "
            "known; set method.pooled=false"
        )
    return spec.pooled
