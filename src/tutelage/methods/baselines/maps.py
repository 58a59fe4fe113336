"""at as a method: where a map is active, whatever its channels are."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from pydantic import Field

from tutelage.engine.method import Paper
from tutelage.engine.types import Batch, Outputs, Term, Terms
from tutelage.functional.features import at_loss
from tutelage.functional.reductions import keep_rows
from tutelage.methods.baselines.choices import StageTapsConfig, label_term
from tutelage.methods.baselines.stages import StageMethod
from tutelage.recipe.config import Range

if TYPE_CHECKING:
    from tutelage.engine.spec import ModelSpec
    from tutelage.engine.step import Step


class ATConfig(StageTapsConfig):
    """Options of at."""

    loss_weight: float = Field(1000.0, ge=0, description="Weight of the difference, summed over stages.")
    p: int = Field(
        2, ge=1, le=16, description="Power of the activations; with an odd one their signs survive."
    )

    @classmethod
    def search(cls) -> dict[str, Range]:
        # The difference of unit vectors is larger on small maps, where the default drowns the labels.
        return {"loss_weight": Range(1.0, 1000.0)}


class AT(StageMethod):
    """Labels, and the spatial attention of every stage's map: its activations' powers averaged over channels."""

    Config = ATConfig
    paper = Paper(
        title="Paying More Attention to Attention: Improving the Performance of Convolutional Neural Networks via "
        "Attention Transfer",
        venue="ICLR",
        year=2017,
        arxiv="1612.03928",
        claim="A student that attends to the same places as its teacher beats one trained on labels alone.",
        card="baselines",
        family="vision logits and features",
    )
    config: ATConfig

    def build(self, teacher: ModelSpec | None, student: ModelSpec, example: Batch) -> None:
        super().build(teacher, student, example)
        sides = (self.student_maps, self.teacher_maps)
        if any(all(math.prod(shape[1:]) == 1 for shape in side.shapes) for side in sides):
            raise ValueError(
                f"at compares positions, and these maps have one each: {self.student_maps.shapes} of the student, "
                f"{self.teacher_maps.shapes} of the teacher; set method.student_taps and method.teacher_taps"
            )

    def objective(self, student: Outputs, teacher: Outputs | None, batch: Batch, ctx: Step) -> Terms:
        assert teacher is not None
        ours = keep_rows(batch.mask, *self.student_maps(student.features))
        theirs = keep_rows(batch.mask, *self.teacher_maps(teacher.features))
        terms = label_term(self.config.label_weight, student, batch, ctx)
        return terms | {"at": Term(self.config.loss_weight * at_loss(ours, theirs, self.config.p))}
