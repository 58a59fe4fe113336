"""Mutual learning as methods."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from pydantic import Field

from tutelage.engine.method import Method, OptimSpec, Paper
from tutelage.engine.needs import Needs
from tutelage.engine.types import Term, Terms
from tutelage.functional.divergences import kd_loss
from tutelage.functional.reductions import keep_rows
from tutelage.methods.bdkd.functional import bdkd_teacher_loss
from tutelage.recipe.config import MethodConfig, Range
from tutelage.recipe.schema import OptimizerConfig, ScheduleConfig

if TYPE_CHECKING:
    from tutelage.engine.step import Step


class DMLConfig(MethodConfig):
    """Options of dml."""

    student_weight: float = Field(
        1.0, ge=0, description="Weight of what the student learns from the teacher."
    )
    teacher_weight: float = Field(
        1.0, ge=0, description="Weight of what the teacher learns from the student."
    )
    temperature: float = Field(
        1.0, gt=0, le=1000, description="Softens both sides; its square is a factor of both divergences."
    )
    teacher_optimizer: OptimizerConfig | None = Field(
        None, description="The teacher's optimiser; left out: one like the student's."
    )
    teacher_schedule: ScheduleConfig | None = Field(
        None, description="The teacher's learning rate over the run; left out: the student's."
    )

    @classmethod
    def search(cls) -> dict[str, Range]:
        return {"student_weight": Range.around(1.0), "temperature": Range(1.0, 8.0)}


class DML(Method):
    """Teacher and student learn from the labels and from each other's probabilities, in the same steps.

    Each takes the other's probabilities as they are: neither loss sends a gradient into the other network. Of several
    teachers each learns from the student, and the student from the mean over them.
    """

    Config = DMLConfig
    paper = Paper(
        title="Deep Mutual Learning",
        venue="CVPR",
        year=2018,
        arxiv="1706.00384",
        claim="A student that is trained together with an untrained teacher, each from the other's probabilities, "
        "reaches a higher mean test accuracy than one trained with labels alone.",
        card="bdkd",
        family="vision logits",
    )
    needs = Needs(teacher="trained", live=True, fields=("target",))
    config: DMLConfig

    def step(self, ctx: Step) -> Terms:
        student = ctx.student()
        teachers = [ctx.teacher(name=name, grad="all") for name in ctx.setup.teachers]
        label = ctx.label_loss(student)
        labels = [ctx.label_loss(teacher).mean for teacher in teachers]
        pairs = [keep_rows(ctx.batch.mask, student.logits, teacher.logits) for teacher in teachers]
        temperature = self.config.temperature
        forward = [kd_loss(mine, other, temperature) for mine, other in pairs]
        back = [bdkd_teacher_loss(other, mine, temperature) for mine, other in pairs]
        return {
            "student_ce": label,
            "student_forward": Term(self.config.student_weight * torch.stack(forward).mean()),
            "teacher_ce": Term(torch.stack(labels).sum(), label.items),
            "teacher_kl": Term(self.config.teacher_weight * torch.stack(back).sum()),
        }

    def optimizers(self) -> dict[str, OptimSpec]:
        teacher = OptimSpec(("teachers.*",), self.config.teacher_optimizer, self.config.teacher_schedule)
        return {"student": OptimSpec(("student.*",)), "teacher": teacher}
