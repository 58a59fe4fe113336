"""Teacher and student that learn together: plain mutual learning, and BD-KD's balance of both divergences."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from tutelage.engine.distributed import world_size
from tutelage.engine.method import Method, OptimSpec, Paper
from tutelage.engine.needs import Needs
from tutelage.engine.types import Plot, Table, Term, Terms
from tutelage.functional.divergences import kd_loss
from tutelage.functional.reductions import keep_rows
from tutelage.methods.bdkd.functional import BDKDTerms, bdkd_student_loss, bdkd_teacher_loss
from tutelage.recipe.config import MethodConfig, Range
from tutelage.recipe.schema import OptimizerConfig, ScheduleConfig

if TYPE_CHECKING:
    from collections.abc import Mapping

    from tutelage.engine.step import Step

Pairs = list[tuple[Tensor, Tensor]]
"""Logits of the student and of each teacher."""


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
        trained = self.needs.teacher == "trained"
        teachers = [ctx.teacher(name=name, grad="all" if trained else "none") for name in ctx.setup.teachers]
        pairs: Pairs = [keep_rows(ctx.batch.mask, student.logits, each.logits) for each in teachers]  # type: ignore[misc]
        label = ctx.label_loss(student)
        terms = {"student_ce": label} | self.student_terms(pairs, ctx)
        if not trained:
            return terms
        labels = [ctx.label_loss(teacher).mean for teacher in teachers]
        back = [bdkd_teacher_loss(other, mine, self.config.temperature) for mine, other in pairs]
        return terms | {
            "teacher_ce": Term(torch.stack(labels).sum(), label.items),
            "teacher_kl": Term(self.config.teacher_weight * torch.stack(back).sum()),
        }

    def student_terms(self, pairs: Pairs, ctx: Step) -> Terms:
        """What the student learns from its teachers, the mean over them."""
        forward = [kd_loss(mine, other, self.config.temperature) for mine, other in pairs]
        return {"student_forward": Term(self.config.student_weight * torch.stack(forward).mean())}

    def optimizers(self) -> dict[str, OptimSpec]:
        if self.needs.teacher != "trained":
            return super().optimizers()
        teacher = OptimSpec(("teachers.*",), self.config.teacher_optimizer, self.config.teacher_schedule)
        return {"student": OptimSpec(("student.*",)), "teacher": teacher}


class BDKDConfig(DMLConfig):
    """Options of bdkd; its paper's values could not be checked, these are our choice."""

    delta: float = Field(
        2.0,
        ge=1,
        le=1000,
        description="Weight of the divergence that a row's certainty calls for; the other's is 1.",
    )
    weighting: Literal["switch", "sigmoid"] = Field(
        "switch", description="How the weights change where student and teacher are equally certain."
    )
    scale: float = Field(
        0.1,
        gt=0,
        le=1000,
        description="sigmoid: gap of the entropies over which the weights change, in nats.",
    )
    divergences: Literal["both", "forward", "reverse"] = Field(
        "both", description="Which of them the student learns from."
    )
    online: bool = Field(
        True, description="Train the teacher too; false: it is trained already, and stays as it is."
    )

    @classmethod
    def conflicts(cls, values: Mapping[str, Any]) -> list[str]:
        given = [name for name in ("teacher_optimizer", "teacher_schedule") if values[name] is not None]
        if given and values["online"] is False:
            return [f"{' and '.join(given)}: with online=false no teacher is trained; leave it out"]
        return []

    @classmethod
    def search(cls) -> dict[str, Range]:
        return super().search() | {"delta": Range(1.0, 4.0)}


class BDKD(DML):
    """Mutual learning in which each row of the student's loss weighs the forward against the reverse divergence by
    whether the student is more certain than the teacher.

    Where it is, the forward one, which spreads it, weighs more; where it is not, the reverse one, which sharpens it.
    """

    Config = BDKDConfig
    paper = Paper(
        title="BD-KD: Balancing the Divergences for Online Knowledge Distillation",
        venue="preprint",
        year=2022,
        arxiv="2212.12965",
        claim="In online training the student of BD-KD has a lower calibration error, and a higher mean test accuracy, "
        "than with the forward or the reverse divergence alone.",
        card="bdkd",
        family="vision logits",
    )
    config: BDKDConfig
    shares: Tensor

    def __init__(self, config: BDKDConfig) -> None:
        super().__init__(config)
        if not config.online:
            self.needs = Needs(scale="log_probs", fields=("target",))  # type: ignore[misc]
        self.register_buffer("shares", torch.zeros(2))
        """Rows of this epoch in which the student is more certain, and all of them."""
        self.by_epoch: list[float] = []

    def student_terms(self, pairs: Pairs, ctx: Step) -> Terms:
        config = self.config
        found = [
            bdkd_student_loss(mine, other, config.delta, config.temperature, config.weighting, config.scale)
            for mine, other in pairs
        ]
        mean = BDKDTerms(*(torch.stack(parts).mean() for parts in zip(*found, strict=True)))
        with torch.no_grad():
            rows = self.shares.new_tensor(len(pairs[0][0]))
            self.shares += ctx.mean(torch.stack([rows * mean.forward_share, rows])) * world_size()
        terms = {"forward": mean.forward, "reverse": mean.reverse}
        return {
            f"student_{name}": Term(config.student_weight * value)
            for name, value in terms.items()
            if config.divergences in ("both", name)
        }

    def after_step(self, ctx: Step) -> None:
        """At an epoch's end, keep how often the student was the more certain one."""
        if (ctx.step + 1) % ctx.steps_per_epoch == 0:
            self.by_epoch.append(float(self.shares[0] / self.shares[1].clamp(min=1)))
            self.shares.zero_()

    def tables(self) -> dict[str, Table]:
        rows: list[list[Any]] = [[epoch, share] for epoch, share in enumerate(self.by_epoch, start=1)]
        table = Table(["epoch", "forward_share"], rows, plots=(Plot("epoch", ("forward_share",)),))
        return {"rows_in_which_the_student_is_more_certain": table}

    def get_extra_state(self) -> list[float]:
        return self.by_epoch

    def set_extra_state(self, state: list[float]) -> None:
        self.by_epoch = list(state)
