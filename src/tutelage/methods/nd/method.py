"""ND as a method: labels, softened logits, and features along the teacher's class means."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from tutelage.engine.checkpoint import CheckpointError
from tutelage.engine.distributed import check_batch_norm, whole
from tutelage.engine.method import Method, Paper
from tutelage.engine.needs import Needs
from tutelage.engine.types import Batch, Outputs, Table, Taps, Term, Terms
from tutelage.functional.checks import SoftTargetError
from tutelage.functional.classes import ClassSums
from tutelage.functional.divergences import kd_loss
from tutelage.functional.reductions import keep_rows, upcast
from tutelage.methods.nd.functional import ClassMeanAccumulator, check_directions, nd_loss
from tutelage.recipe.config import MethodConfig, Range

if TYPE_CHECKING:
    from tutelage.engine.passes import TrainingRows
    from tutelage.engine.spec import ModelSpec
    from tutelage.engine.step import Step

MEASURED_ROWS = 10_000
"""Most training rows that lengths and directions are measured on."""


class NDConfig(MethodConfig):
    """Options of nd; defaults are those of its code."""

    label_weight: float = Field(1.0, ge=0, description="Weight of the label loss.")
    loss_weight: float = Field(1.0, ge=0, description="Weight of the features' norm and direction term.")
    form: Literal["norm_direction", "direction"] = Field(
        "norm_direction", description="Length and direction, or direction alone."
    )
    kd_weight: float = Field(
        1.0,
        ge=0,
        description="Weight of the softened logits' divergence; 0 where another method of a list brings its own.",
    )
    temperature: float = Field(4.0, gt=0, le=1000, description="Softens the logits of both sides.")
    warmup_epochs: int = Field(
        20, ge=0, le=1_000_000, description="Epochs over which that divergence grows from nothing; 0: none."
    )
    means_transform: Literal["eval", "train"] = Field(
        "eval",
        description="Rows of the class means: as evaluation sees them, or with their first view drawn as in training.",
    )
    projection_dropout: float = Field(
        0.5, ge=0, lt=1, description="Dropout of the projection, which there is where widths differ."
    )

    @classmethod
    def search(cls) -> dict[str, Range]:
        return super().search() | {"kd_weight": Range.around(1.0), "temperature": Range(1.0, 8.0)}


class ND(Method):
    """Labels, the teacher's softened logits, and the student's features pulled along the teacher's class means until
    they are as long as the teacher's.

    The class means are found once, before the first step, and kept with the fingerprint of the teacher's weights.
    """

    Config = NDConfig
    paper = Paper(
        title="Improving Knowledge Distillation via Regularizing Feature Norm and Direction",
        venue="ECCV",
        year=2024,
        arxiv="2305.17007",
        claim="Adding ND, which makes the student's features longer and turns them to the teacher's class means, to "
        "CE + KD raises the mean test accuracy at an equal tuning budget.",
        card="nd",
        family="vision features",
    )
    # Where widths differ, the projection's BatchNorm couples rows.
    needs = Needs(scale="log_probs", teacher_taps=True, fields=("target",), couples_rows="norm")
    config: NDConfig
    class_means: Tensor

    def __init__(self, config: NDConfig) -> None:
        super().__init__(config)
        if not config.kd_weight:
            self.needs = dataclasses.replace(self.needs, logits=())  # type: ignore[misc]

    def taps(self, teacher: ModelSpec | None, student: ModelSpec) -> Taps:
        assert teacher is not None
        return Taps(
            student=(student.pooled,), teacher=(teacher.pooled,), teacher_logits=self.config.kd_weight > 0
        )

    def build(self, teacher: ModelSpec | None, student: ModelSpec, example: Batch) -> None:
        assert teacher is not None
        if example.target is not None and example.target.dim() > 1:
            raise SoftTargetError(_soft(example.target))
        self.student_tap, self.teacher_tap = student.pooled, teacher.pooled
        width, wanted = _width(student), _width(teacher)
        self.projection: nn.Module = nn.Identity()
        if width != wanted:
            self.projection = nn.Sequential(
                nn.BatchNorm1d(width), nn.Dropout(self.config.projection_dropout), nn.Linear(width, wanted)
            )
        if student.outputs is None:
            raise ValueError(f"nd: the number of classes of {student.name} is not known")
        self.teacher_weights = teacher.fingerprint()
        # A dry step comes before `prepare`: until then every class points the same way.
        self.register_buffer("class_means", torch.full((student.outputs, wanted), wanted**-0.5))

    def prepare(self, data: TrainingRows, student: nn.Module, teacher: Any) -> None:
        """Find the teacher's class means over the training rows.

        Raises:
            ValueError: a class without rows or whose mean has no direction, or a store that lacks the rows.
        """
        self._check_stored(data, teacher)
        classes = len(self.class_means)
        found = ClassMeanAccumulator(classes)
        rows = self.class_means.new_zeros(classes)
        for batch in data.batches(augmented=self._views(teacher)):
            features, target = self._teacher_features(teacher, batch)
            rows += target[(target >= 0) & (target < classes)].bincount(minlength=classes)
            found.update(*keep_rows(batch.mask, features, target))
        assert found.total is not None
        total, rows = ClassSums(*map(data.runtime.sum, found.total)), data.runtime.sum(rows)
        # No loss reads the mean of a class all of whose rows are masked out: any direction does.
        unread = ((total.counts == 0) & (rows > 0)).to(total.counts)
        found.total = total.plus(ClassSums(unread[:, None] * self.class_means, unread))
        means = found.result()
        check_directions(torch.linalg.vector_norm(means, dim=1).cpu(), torch.arange(len(means)))
        self.class_means.copy_(means)

    def objective(self, student: Outputs, teacher: Outputs | None, batch: Batch, ctx: Step) -> Terms:
        assert teacher is not None
        assert batch.target is not None
        config = self.config
        label = ctx.label_loss(student, batch)
        # All rows are projected, so that its BatchNorm does not depend on the mask.
        ours, theirs, target = keep_rows(
            batch.mask, self._project(student), teacher.features[self.teacher_tap], batch.target
        )
        loss = nd_loss(ours, theirs, self.class_means, target, form=config.form)
        terms = {
            "label": Term(config.label_weight * label.mean, label.items),
            "nd": Term(config.loss_weight * loss),
        }
        if config.kd_weight:
            grown = min(1.0, ctx.epoch / config.warmup_epochs) if config.warmup_epochs else 1.0
            divergence = kd_loss(student.logits, teacher.logits, config.temperature, batch.mask)
            terms["kd"] = Term(config.kd_weight * grown * divergence)
        return terms

    def measure(self, ctx: Step) -> dict[str, Table]:
        """How long the features of both are, and how well they point along the class means."""
        teacher = next(iter(ctx.setup.teachers.values()))
        sums = torch.zeros(2, 2, dtype=torch.float64, device=self.class_means.device)
        rows = 0
        # Outside of `forward` a sharded module's weights are not whole by themselves.
        weights = {name: whole(value.detach()) for name, value in self.projection.named_parameters()}
        for batch in ctx.data.batches(augmented=self._views(teacher), most=MEASURED_ROWS):
            own = ctx.student(batch, (self.student_tap,), frozen=True).features[self.student_tap]
            student = torch.func.functional_call(self.projection, weights, (own,))
            features, target = self._teacher_features(teacher, batch)
            *pair, target = keep_rows(batch.mask, upcast(student), upcast(features), target)
            means = self.class_means[target]
            sums += torch.stack(
                [torch.stack([f.norm(dim=1), F.cosine_similarity(f, means)]).sum(1) for f in pair]
            )
            rows += len(target)
        over_ranks = ctx.data.runtime.sum
        both = (over_ranks(sums) / over_ranks(sums.new_tensor(rows))).tolist()
        table = Table(["features", "norm", "cosine"], [["student", *both[0]], ["teacher", *both[1]]])
        return {"feature_norm_and_direction": table}

    def get_extra_state(self) -> dict[str, Any]:
        return {"teacher_weights": self.teacher_weights}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Refuse class means of another teacher.

        Raises:
            CheckpointError: the weights differ.
        """
        if state["teacher_weights"] != self.teacher_weights:
            raise CheckpointError(
                "the checkpoint's class means are those of another teacher: its weights' sha256 is "
                f"{state['teacher_weights']}, this teacher's {self.teacher_weights}; resume with the same teacher, or "
                "start a new run"
            )

    def _project(self, student: Outputs) -> Tensor:
        features: Tensor = student.features[self.student_tap]
        if isinstance(self.projection, nn.Identity):
            return features
        if self.training:
            check_batch_norm(len(features), "nd's projection")
        projected: Tensor = self.projection(features)
        return projected

    def _teacher_features(self, teacher: Any, batch: Batch) -> tuple[Tensor, Tensor]:
        if batch.target is None or batch.target.dim() > 1:
            raise SoftTargetError(_soft(batch.target))
        try:
            outputs = teacher.outputs(batch, (self.teacher_tap,), logits=False)
        except KeyError as missing:
            raise ValueError(
                f"nd takes class means over all training rows, and the stored teacher lacks some: {missing.args[0]}; "
                "store the first view of every row, with the classifier's input"
            ) from None
        return outputs.features[self.teacher_tap], batch.target

    def _views(self, teacher: Any) -> bool:
        """Whether passes draw the rows' first view; a store holds nothing else."""
        return teacher.module is None or self.config.means_transform == "train"

    def _check_stored(self, data: TrainingRows, teacher: Any) -> None:
        if teacher.module is None and self.config.means_transform == "eval" and not data.unchanged:
            raise ValueError(
                "nd takes class means over rows as evaluation sees them, and a stored teacher holds views of them "
                "only (data.views); set method.means_transform=train, or use a live teacher"
            )


def _width(spec: ModelSpec) -> int:
    shape = spec.shape(spec.pooled)
    if len(shape) != 1:
        raise ValueError(
            f"nd reads one feature vector a row; the classifier of {spec.name} takes {list(shape)}"
        )
    return shape[0]


def _soft(target: Tensor | None) -> str:
    shape = None if target is None else list(target.shape)
    return (
        f"nd needs one class a row; these targets have shape {shape}: switch mixup off, and whatever else mixes labels "
        "(the methods mixup and mixkd)"
    )
