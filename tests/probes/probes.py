"""Small methods that stand for the hard seams. Each is the least that needs its seam."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tutelage.engine.distributed import whole
from tutelage.engine.method import Method, OptimSpec, Paper
from tutelage.engine.needs import Needs
from tutelage.engine.spec import ModelSpec
from tutelage.engine.step import Step
from tutelage.engine.types import Batch, Outputs, Taps, Term, Terms
from tutelage.recipe.config import MethodConfig
from tutelage.recipe.schema import OptimizerConfig

PAPER = Paper("a probe", "none", 2026, None, "Nothing is claimed.", "probe", "probe")


def config() -> MethodConfig:
    return MethodConfig(name="probe", weight=1.0)


class Probe(Method):
    Config = MethodConfig
    paper = PAPER

    def __init__(self) -> None:
        super().__init__(config())


class InsideBlock(Probe):
    """A projector with its own BatchNorm on taps strictly inside a block; the teacher stops there."""

    needs = Needs(logits=(), teacher_taps=True)

    def taps(self, teacher: ModelSpec | None, student: ModelSpec) -> Taps:
        return Taps(student=("blocks.1.up",), teacher=("blocks.0.act",), teacher_logits=False)

    def build(self, teacher: ModelSpec | None, student: ModelSpec, example: Batch) -> None:
        assert teacher is not None
        width, wanted = student.shape("blocks.1.up")[0], teacher.shape("blocks.0.act")[0]
        self.project = nn.Sequential(nn.Linear(width, wanted), nn.BatchNorm1d(wanted))

    def objective(self, student: Outputs, teacher: Outputs | None, batch: Batch, ctx: Step) -> Terms:
        assert teacher is not None
        gap = self.project(student.features["blocks.1.up"]) - teacher.features["blocks.0.act"]
        return {"label": ctx.label_loss(student), "hint": Term(gap.square().mean())}


class ThroughTeacher(Probe):
    """An augmentor with its own optimiser: in odd steps it moves the inputs to where teacher and frozen student
    disagree, through both models; in even steps the student learns from what it makes."""

    needs = Needs(live=True, input_gradient=True, dynamic=True)

    def build(self, teacher: ModelSpec | None, student: ModelSpec, example: Batch) -> None:
        assert isinstance(example.inputs, Tensor)
        self.augmentor = nn.Linear(example.inputs.shape[1], example.inputs.shape[1])

    def optimizers(self) -> dict[str, OptimSpec]:
        return {
            "augmentor": OptimSpec(("method.augmentor.*",), OptimizerConfig(name="adam", lr=0.01)),
            "student": OptimSpec(("student.*",)),
        }

    def active(self, ctx: Step) -> set[str]:
        return {"augmentor"} if ctx.step % 2 else {"student"}

    def step(self, ctx: Step) -> Terms:
        odd = ctx.step % 2 == 1
        assert isinstance(ctx.batch.inputs, Tensor)
        changed = ctx.batch.inputs + 0.1 * torch.tanh(self.augmentor(ctx.batch.inputs))
        batch = ctx.batch.replace(inputs=changed if odd else changed.detach())
        student = ctx.student(batch, frozen=odd)
        teacher = ctx.teacher(batch, grad="inputs" if odd else "none")
        gap = F.kl_div(student.logits.log_softmax(-1), teacher.logits.softmax(-1), reduction="batchmean")
        return {"gap": Term(-gap)} if odd else {"gap": Term(gap), "label": ctx.label_loss(student, batch)}


class TrainedTeacher(Probe):
    """Teacher and student learn from one another, each with its own optimiser."""

    needs = Needs(teacher="trained", live=True)

    def optimizers(self) -> dict[str, OptimSpec]:
        slow = OptimizerConfig(name="sgd", lr=0.05)
        return {"student": OptimSpec(("student.*", "method.*")), "teacher": OptimSpec(("teachers.*",), slow)}

    def step(self, ctx: Step) -> Terms:
        student, teacher = ctx.student(), ctx.teacher(grad="all")
        s, t = student.logits.log_softmax(-1), teacher.logits.log_softmax(-1)
        return {
            "student": ctx.label_loss(student),
            "teacher": ctx.label_loss(teacher),
            "forward": Term(F.kl_div(s, t.detach(), log_target=True, reduction="batchmean")),
            "back": Term(F.kl_div(t, s.detach(), log_target=True, reduction="batchmean")),
        }


class Bilevel(Probe):
    """The weight of the soft term is learned on held-out rows, through one virtual step of the student."""

    needs = Needs(loaders=("validation",), sharding="ddp", dynamic=True)

    def build(self, teacher: ModelSpec | None, student: ModelSpec, example: Batch) -> None:
        self.ratio = nn.Parameter(torch.zeros(()))

    def optimizers(self) -> dict[str, OptimSpec]:
        return {
            "ratio": OptimSpec(("method.ratio",), OptimizerConfig(name="sgd", lr=1.0)),
            "student": OptimSpec(("student.*",)),
        }

    def _loss(self, student: Outputs, teacher: Outputs, ctx: Step, share: Tensor) -> Tensor:
        soft = F.kl_div(student.logits.log_softmax(-1), teacher.logits.softmax(-1), reduction="batchmean")
        return share * soft + (1 - share) * ctx.label_loss(student).mean

    def step(self, ctx: Step) -> Terms:
        share, teacher = torch.sigmoid(self.ratio), ctx.teacher()
        parameters = ctx.parameters()
        inner = self._loss(ctx.student(params=parameters), teacher, ctx, share)
        gradients = torch.autograd.grad(inner, list(parameters.values()), create_graph=True)
        moved = {
            name: value.detach() - 0.1 * ctx.mean(gradient)
            for (name, value), gradient in zip(parameters.items(), gradients, strict=True)
        }
        held_out = next(ctx.loader("validation"))
        outer = ctx.label_loss(ctx.student(held_out, params=moved), held_out)
        real = self._loss(ctx.student(), teacher, ctx, share.detach())
        return {"outer": outer, "student": Term(real)}


class FromNoise(Probe):
    """Makes its own batch from noise, twice the rows; only rows with a positive first entry count."""

    needs = Needs(live=True)

    def transform(self, batch: Batch, ctx: Step) -> Batch:
        assert isinstance(batch.inputs, Tensor)
        assert batch.index is not None
        index = torch.cat([batch.index, batch.index + 1000])
        made = [torch.randn(6, generator=torch.Generator().manual_seed(int(i) + 7 * ctx.step)) for i in index]
        inputs = torch.stack(made)
        return Batch(inputs, index=index, mask=inputs[:, 0] > 0)

    def objective(self, student: Outputs, teacher: Outputs | None, batch: Batch, ctx: Step) -> Terms:
        assert teacher is not None
        assert batch.mask is not None
        gap = (student.logits - teacher.logits).square().sum(-1)
        return {"noise": Term((gap * batch.mask).sum() / batch.mask.sum().clamp(min=1))}


class PerTerm(Probe):
    """Removes from the soft term's gradient what points against the label term's."""

    seen: ClassVar[list[float]] = []

    def objective(self, student: Outputs, teacher: Outputs | None, batch: Batch, ctx: Step) -> Terms:
        assert teacher is not None
        soft = F.kl_div(student.logits.log_softmax(-1), teacher.logits.softmax(-1), reduction="batchmean")
        return {"label": ctx.label_loss(student), "soft": Term(3 * soft)}

    def combine_gradients(self, grads: dict[str, list[Tensor | None]]) -> list[Tensor | None]:  # type: ignore[override]
        pairs = [
            (a, b)
            for a, b in zip(grads["label"], grads["soft"], strict=True)
            if a is not None and b is not None
        ]
        assert len(pairs) == len(grads["label"])
        along = torch.stack([whole((a * b).sum()) for a, b in pairs]).sum()
        length = torch.stack([whole(a.square().sum()) for a, _ in pairs]).sum()
        against = torch.clamp(along / length, max=0.0)
        return [a + b - against * a for a, b in pairs]


class Memory(Probe):
    """A bank of one embedding a row, as a buffer; a row is pulled towards what was stored of it."""

    needs = Needs(fields=("index",))

    def prepare(self, data: Any, student: nn.Module, teacher: Any) -> None:
        self.prepared.add_(1)

    def build(self, teacher: ModelSpec | None, student: ModelSpec, example: Batch) -> None:
        self.register_buffer("bank", torch.zeros(64, student.outputs or 0))
        self.register_buffer("prepared", torch.zeros(()))

    def objective(self, student: Outputs, teacher: Outputs | None, batch: Batch, ctx: Step) -> Terms:
        assert batch.index is not None
        self.now = student.logits.detach()
        pull = (student.logits - self.bank[batch.index]).square().sum(-1).mean()
        return {"label": ctx.label_loss(student), "pull": Term(0.1 * pull)}

    def after_step(self, ctx: Step) -> None:
        assert ctx.batch.index is not None
        index, now = ctx.gather(ctx.batch.index), ctx.gather(self.now)
        self.bank[index] = 0.5 * self.bank[index] + 0.5 * now


class Mixes(Probe):
    """Mixes each row with a partner of its micro-batch, and adds noise, in both hooks and from both generators."""

    needs = Needs(teacher="none", logits=())

    def transform(self, batch: Batch, ctx: Step) -> Batch:
        assert isinstance(batch.inputs, Tensor)
        partner = torch.randperm(len(batch), generator=ctx.generator)
        return batch.replace(
            inputs=batch.inputs + 0.3 * batch.inputs[partner] + 0.1 * torch.rand(len(batch), 1)
        )

    def objective(self, student: Outputs, teacher: Outputs | None, batch: Batch, ctx: Step) -> Terms:
        partner = torch.randperm(len(batch), generator=ctx.generator)
        noise = torch.rand(len(batch), 1)
        gap = (student.logits - student.logits[partner] - noise).square()
        return {"label": ctx.label_loss(student), "gap": Term(0.1 * gap.mean())}


class Couples(Probe):
    """Compares random pairs of rows, of all ranks, in all that a coupled loss may read, weighed by a layer with its own
    BatchNorm. It knows nothing of ranks."""

    needs = Needs(teacher_taps=True, fields=("index",), couples_rows="loss")

    def taps(self, teacher: ModelSpec | None, student: ModelSpec) -> Taps:
        return Taps(student=("blocks.0",), teacher=("blocks.1",))

    def build(self, teacher: ModelSpec | None, student: ModelSpec, example: Batch) -> None:
        self.weigh = nn.Sequential(nn.Linear(student.shape("blocks.0")[0], 3), nn.BatchNorm1d(3))

    def objective(self, student: Outputs, teacher: Outputs | None, batch: Batch, ctx: Step) -> Terms:
        assert teacher is not None
        assert batch.index is not None
        rows = len(batch)
        assert [len(t) for t in (batch.index, student.feature(), teacher.feature(), ctx.rand(1))] == [
            rows
        ] * 4
        assert ctx.gather(batch.index) is batch.index
        other = torch.randperm(rows, generator=ctx.generator)
        weight = self.weigh(student.feature() - student.feature()[other]).square().mean(1)
        ours = (student.logits - student.logits[other]).square().mean(1)
        theirs = (teacher.logits - teacher.logits[other]).square().mean(1)
        scale = teacher.feature().std() * (1 + ctx.rand().mean()) * (1 + batch.index.float().std())
        return {
            "label": ctx.label_loss(student),
            "pairs": Term((weight * (ours - theirs).square()).mean() / scale),
        }


class Order(Probe):
    """Writes down in which order it is called."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[str] = []

    def transform(self, batch: Batch, ctx: Step) -> Batch:
        self.calls.append("method.transform")
        assert not torch.is_grad_enabled()
        return batch

    def count(self, batch: Batch) -> dict[str, int | Tensor]:
        self.calls.append("method.count")
        return super().count(batch)

    def step(self, ctx: Step) -> Terms:
        self.calls.append("method.step")
        return {"label": ctx.label_loss(ctx.student())}

    def combine_gradients(self, grads: dict[str, list[Tensor | None]]) -> list[Tensor | None]:  # type: ignore[override]
        self.calls.append("method.combine_gradients")
        return grads["label"]

    def active(self, ctx: Step) -> set[str]:
        self.calls.append("method.active")
        return super().active(ctx)

    def after_step(self, ctx: Step) -> None:
        self.calls.append("method.after_step")

    def after_evaluation(self, metrics: dict[str, float], ctx: Step) -> None:
        self.calls.append("method.after_evaluation")


ALL = {
    probe.__name__: probe
    for probe in (InsideBlock, ThroughTeacher, TrainedTeacher, Bilevel, FromNoise, PerTerm, Memory, Couples)
}
