"""Small methods that share a step with others: taps, counts, rows and tables of their own."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from probes import Probe
from tutelage.engine.loading import ShuffleSampler
from tutelage.engine.needs import Needs
from tutelage.engine.spec import ModelSpec
from tutelage.engine.step import Step
from tutelage.engine.types import Batch, Outputs, Table, Taps, Term, Terms


class Hint(Probe):
    """Asks for one feature of each model, and takes it for granted that it gets no other."""

    needs = Needs(logits=(), teacher_taps=True)
    block = "blocks.0"

    def taps(self, teacher: ModelSpec | None, student: ModelSpec) -> Taps:
        return Taps(student=(self.block,), teacher=(self.block,), teacher_logits=False)

    def objective(self, student: Outputs, teacher: Outputs | None, batch: Batch, ctx: Step) -> Terms:
        assert teacher is not None
        gap = student.feature().mean(-1) - teacher.feature().mean(-1)
        return {"label": ctx.label_loss(student), "hint": Term(gap.square().mean())}


class DeepHint(Hint):
    block = "-1"


class NamedHint(Hint):
    """Names the teacher whose feature it wants."""

    def taps(self, teacher: ModelSpec | None, student: ModelSpec) -> Taps:
        assert teacher is not None
        return Taps(student=("blocks.0",), teachers={"teacher": ("blocks.0", "blocks.2")})

    def objective(self, student: Outputs, teacher: Outputs | None, batch: Batch, ctx: Step) -> Terms:
        assert teacher is not None
        assert set(teacher.features) == {"blocks.0", "blocks.2"}
        return {"hint": Term(student.feature().mean())}


class Halves(Probe):
    """Counts half rows, and has tables."""

    needs = Needs(teacher="none", logits=())

    def count(self, batch: Batch) -> dict[str, int | Tensor]:
        return {"halves": 2 * len(batch)}

    def objective(self, student: Outputs, teacher: Outputs | None, batch: Batch, ctx: Step) -> Terms:
        assert teacher is None
        assert set(student.features) == set()
        return {"half": Term(student.logits.square().mean(), "halves")}

    def tables(self) -> dict[str, Table]:
        return {"halves": Table(["count"], [[2]])}


class Backwards(ShuffleSampler):
    def order(self, epoch: int) -> Tensor:
        return torch.arange(len(self)).flip(0)


class Chooses(Halves):
    def sampler(self, source: Any, train: Any) -> Any:
        return Backwards(len(source), 0)
