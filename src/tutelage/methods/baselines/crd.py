"""crd as a method."""

from __future__ import annotations

import math
import warnings
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from tutelage.data import row_ids, targets
from tutelage.engine.method import Method, Paper
from tutelage.engine.needs import Needs
from tutelage.engine.types import Batch, Outputs, Taps, Term, Terms
from tutelage.functional.contrastive import contrast_scores, nce_loss, normaliser
from tutelage.functional.reductions import keep_rows, upcast
from tutelage.methods.baselines.choices import OneTapConfig, label_term, one_tap, pooled_feature
from tutelage.methods.baselines.memory import RowMemory

if TYPE_CHECKING:
    from tutelage.engine.spec import ModelSpec
    from tutelage.engine.step import Step


class CRDConfig(OneTapConfig):
    """Options of crd. Taps that are left out are the classifiers' inputs."""

    loss_weight: float = Field(0.8, ge=0, description="Weight of the contrastive loss.")
    width: int = Field(128, ge=1, le=65536, description="Width of the space in which embeddings meet.")
    negatives: int = Field(
        16384, ge=1, description="Rows of other classes that each row is told from; at most all there are."
    )
    temperature: float = Field(0.07, ge=0.03, le=1000, description="Divides inner products of embeddings.")
    momentum: float = Field(0.5, ge=0, le=1, description="Share of the old memory in the new.")
    mode: Literal["exact", "relax"] = Field(
        "exact", description="A row's positive: its own memory, or that of any row of its class."
    )


class CRD(Method):
    """Labels, and embeddings of both models that find each other's memory of their row among those of other classes.

    Memories of all training rows are buffers. They are read as they were before the step, and move after it.
    """

    Config = CRDConfig
    paper = Paper(
        title="Contrastive Representation Distillation",
        venue="ICLR",
        year=2020,
        arxiv="1910.10699",
        claim="A student that tells the teacher's embedding of a row from those of other classes beats one taught by "
        "softened logits.",
        card="baselines",
        family="vision logits and features",
    )
    needs = Needs(logits=(), teacher_taps=True, fields=("target", "index"))
    config: CRDConfig

    def taps(self, teacher: ModelSpec | None, student: ModelSpec) -> Taps:
        assert teacher is not None
        student_tap = one_tap(student, "student", self.config.student_tap, pooled_feature)
        teacher_tap = one_tap(teacher, "teacher", self.config.teacher_tap, pooled_feature)
        return Taps(student=(student_tap,), teacher=(teacher_tap,), teacher_logits=False)

    def build(self, teacher: ModelSpec | None, student: ModelSpec, example: Batch) -> None:
        assert teacher is not None
        if example.target is not None:
            _check_classes(example.target)
        taps = self.taps(teacher, student)
        self.student_tap, self.teacher_tap = taps.student[0], taps.teacher[0]
        self.student_embed = nn.Linear(math.prod(student.shape(self.student_tap)), self.config.width)
        self.teacher_embed = nn.Linear(math.prod(teacher.shape(self.teacher_tap)), self.config.width)
        self.memory = RowMemory(self.config.width)
        # By step: places (-1: does not count) and embeddings of its micro-batches, until `after_step`.
        self._seen: dict[int, list[tuple[Tensor, Tensor, Tensor]]] = {}

    def prepare(self, data: Any, student: nn.Module, teacher: Any) -> None:
        """Learn which rows there are and their classes.

        Raises:
            ValueError: targets that are no class ids, or rows of one class alone.
        """
        classes = targets(data)
        _check_classes(classes)
        self.memory.fill(row_ids(data), classes)
        self._seen = {}
        found = self.memory.negatives()
        if not found:
            raise ValueError("crd tells rows of different classes apart; all training rows are of one class")
        if found < self.config.negatives:
            warnings.warn(
                f"crd: method.negatives={self.config.negatives}, but of the {len(self.memory)} training rows only "
                f"{found} are sure to be of another class; {found} are used",
                stacklevel=2,
            )

    def objective(self, student: Outputs, teacher: Outputs | None, batch: Batch, ctx: Step) -> Terms:
        assert teacher is not None
        terms = label_term(self.config.label_weight, student, batch, ctx)
        ours = _embedding(self.student_embed, student.features[self.student_tap])
        theirs = _embedding(self.teacher_embed, teacher.features[self.teacher_tap].detach())
        if not len(self.memory):  # a dry step, which comes before `prepare`: nothing is remembered yet
            return terms
        assert batch.index is not None
        places = self.memory.places(batch.index)
        loss = self._contrast(ours, theirs, places, batch.mask, ctx)
        counted = places if batch.mask is None else places.where(batch.mask != 0, -1)
        self._seen.setdefault(ctx.step, []).append((counted, ours.detach(), theirs.detach()))
        return terms | {"crd": Term(self.config.loss_weight * loss)}

    def after_step(self, ctx: Step) -> None:
        """Move the memories of the step's rows: of all its micro-batches and ranks, so that replicas stay equal."""
        seen = self._seen.pop(ctx.step, [])
        self._seen = {}
        if seen:
            places, ours, theirs = (ctx.gather(torch.cat(part)) for part in zip(*seen, strict=True))
            if ctx.batch.mask is not None:
                places, ours, theirs = keep_rows(places >= 0, places, ours, theirs)
            self.memory.update(places, ours, theirs, self.config.momentum)

    def _contrast(
        self, ours: Tensor, theirs: Tensor, places: Tensor, mask: Tensor | None, ctx: Step
    ) -> Tensor:
        memory, config = self.memory, self.config
        negatives = min(config.negatives, memory.negatives())
        drawn = memory.draw(places, ctx.rand(len(memory)), negatives, relax=config.mode == "relax")
        losses = []
        for embedding, other, z in (
            (ours, memory.teacher, memory.z_student),
            (theirs, memory.student, memory.z_teacher),
        ):
            scores = contrast_scores(embedding, other, drawn, config.temperature)
            if ctx.step == 0:  # of the first micro-batch that is seen; a constant ever after
                z.copy_(z.where(z > 0, ctx.mean(normaliser(scores, len(memory)))))
            losses.append(nce_loss(scores, z, len(memory), mask=mask))
        return losses[0] + losses[1]


def _embedding(layer: nn.Linear, features: Tensor) -> Tensor:
    return F.normalize(upcast(layer(features.flatten(1))), dim=1)


def _check_classes(target: Tensor) -> None:
    if target.dim() != 1 or target.is_floating_point():
        raise ValueError(
            f"crd needs one class id a row; these targets have type {target.dtype} and shape {list(target.shape)}"
        )
