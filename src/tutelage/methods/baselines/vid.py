"""vid as a method."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from pydantic import Field
from torch import nn

from tutelage.engine.method import Paper
from tutelage.engine.types import Batch, Outputs, Term, Terms
from tutelage.functional.maps import pooled_alike
from tutelage.functional.reductions import keep_rows
from tutelage.functional.variational import vid_loss
from tutelage.methods.baselines.choices import StageTapsConfig, label_term
from tutelage.methods.baselines.model import VIDRegressor
from tutelage.methods.baselines.stages import StageMethod

if TYPE_CHECKING:
    from tutelage.engine.spec import ModelSpec
    from tutelage.engine.step import Step


class VIDConfig(StageTapsConfig):
    """Options of vid."""

    loss_weight: float = Field(1.0, ge=0, description="Weight of the likelihood, summed over stages.")
    variance: float = Field(5.0, ge=0.01, le=1e6, description="Variance of every channel at the start.")
    eps: float = Field(1e-5, gt=0, le=1e-3, description="Least variance of a channel.")


class VID(StageMethod):
    """Labels, and the likelihood of the teacher's maps under Gaussians that the student's maps predict.

    Means come from a small network a stage, variances are one learned number a channel; both are dropped at the end.
    """

    Config = VIDConfig
    paper = Paper(
        title="Variational Information Distillation for Knowledge Transfer",
        venue="CVPR",
        year=2019,
        arxiv="1904.05835",
        claim="A student whose maps carry more information about the teacher's maps beats one trained on labels alone.",
        card="baselines",
        family="vision logits and features",
    )
    config: VIDConfig

    def build(self, teacher: ModelSpec | None, student: ModelSpec, example: Batch) -> None:
        super().build(teacher, student, example)
        self.regressors = nn.ModuleList(
            VIDRegressor(ours[0], theirs[0], self.config.variance, self.config.eps)
            for ours, theirs in zip(self.student_maps.shapes, self.teacher_maps.shapes, strict=True)
        )

    def objective(self, student: Outputs, teacher: Outputs | None, batch: Batch, ctx: Step) -> Terms:
        assert teacher is not None
        stages = []
        for regressor, ours, theirs in zip(
            self.regressors,
            self.student_maps(student.features),
            self.teacher_maps(teacher.features),
            strict=True,
        ):
            assert isinstance(regressor, VIDRegressor)
            ours, theirs = pooled_alike(ours, theirs)
            # All rows go through the network, and rows that do not count are left out after it: under DDP it then runs
            # on every rank.
            mean, theirs = keep_rows(batch.mask, regressor(ours), theirs)
            stages.append(vid_loss(mean, theirs, regressor.log_scale, self.config.eps))
        loss = torch.stack(stages).sum()
        terms = label_term(self.config.label_weight, student, batch, ctx)
        return terms | {"vid": Term(self.config.loss_weight * loss)}
