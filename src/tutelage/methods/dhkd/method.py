"""DHKD as a method: one head for the labels, another for the teacher's logits."""

from __future__ import annotations

import dataclasses
import warnings
from typing import TYPE_CHECKING, Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from tutelage.engine.distributed import check_batch_norm, gather_uneven, whole
from tutelage.engine.method import Method, Paper
from tutelage.engine.needs import Needs
from tutelage.engine.types import Batch, Outputs, Table, Taps, Term, Terms
from tutelage.functional.reductions import keep_rows, upcast
from tutelage.methods.dhkd.conflict import GradientConflict
from tutelage.methods.dhkd.functional import align_gradients, binary_kl_norm_loss, neural_collapse
from tutelage.methods.dhkd.model import NonlinearHead
from tutelage.recipe.config import MethodConfig, Range

if TYPE_CHECKING:
    from collections.abc import Mapping

    from tutelage.engine.passes import TrainingRows
    from tutelage.engine.spec import ModelSpec
    from tutelage.engine.step import Step

MEASURED_ROWS = 10_000
"""Most training rows that neural collapse is measured on."""
NORMALISED = 1e-4
"""Largest log-sum-exp of a row of logits that are taken for log-probabilities."""


class DHKDConfig(MethodConfig):
    """Options of dhkd; defaults are those of its code, the loss weight that of its CIFAR-100 run (ImageNet: 0.1)."""

    label_weight: float = Field(1.0, ge=0, description="Weight of the label loss, which the own head gets.")
    loss_weight: float = Field(
        1.0, ge=0, description="Weight of the divergence from the teacher's logits, a sum over classes."
    )
    head: Literal["linear", "nonlinear", "own"] = Field(
        "linear",
        description="What gets the teacher's logits: a second linear head, one with a hidden layer, or no second head "
        "but the student's own (which the paper finds to collapse).",
    )
    hidden: int = Field(200, ge=1, le=65536, description="nonlinear: width of the hidden layer.")
    dropout: float = Field(0.1, ge=0, lt=1, description="nonlinear: dropout of the hidden layer.")
    temperature: float = Field(2.0, gt=0, le=1000, description="Softens the difference of the logits.")
    eps: float = Field(1e-8, gt=0, lt=0.5, description="How near probabilities come to 0 and 1.")
    align_gradients: bool = Field(
        False,
        description="Take from the divergence's gradient what opposes that of the labels. A backward pass for each.",
    )
    dense_gradients: bool = Field(
        False,
        description="align_gradients: zeros for parameters that no loss reaches, so that weight decay moves them too, "
        "as in the authors' code.",
    )
    watch_gradients: bool = Field(
        False, description="Report by epoch how far both gradients agree. A backward pass for each."
    )

    @classmethod
    def conflicts(cls, values: Mapping[str, Any]) -> list[str]:
        if values["dense_gradients"] and not values["align_gradients"]:
            return ["dense_gradients is for align_gradients: set that to true, or leave it out"]
        return []

    @classmethod
    def search(cls) -> dict[str, Range]:
        return super().search() | {"temperature": Range(1.0, 8.0)}


class DHKD(Method):
    """Labels for the student's own head, and the teacher's logits for a second one on the same features.

    The trunk learns from both. The second head is dropped at the end.
    """

    Config = DHKDConfig
    paper = Paper(
        title="Dual-Head Knowledge Distillation: Enhancing Logits Utilization with an Auxiliary Head",
        venue="KDD",
        year=2025,
        arxiv="2411.08937",
        claim="Labels and a loss of the teacher's logits on two heads give a higher mean test accuracy than both on "
        "one linear head, whose classifier they pull apart.",
        card="dhkd",
        family="vision logits",
    )
    needs = Needs(fields=("target",))
    config: DHKDConfig

    def __init__(self, config: DHKDConfig) -> None:
        super().__init__(config)
        if config.head == "nonlinear":  # its BatchNorm
            self.needs = dataclasses.replace(self.needs, couples_rows="norm")  # type: ignore[misc]
        self.conflict = GradientConflict() if config.watch_gradients else None
        if config.align_gradients or config.watch_gradients:
            self.combine_gradients = self._combine  # type: ignore[misc]
        self._trained: list[tuple[str, nn.Parameter]] = []

    def taps(self, teacher: ModelSpec | None, student: ModelSpec) -> Taps:
        return Taps(student=(student.pooled,))

    def build(self, teacher: ModelSpec | None, student: ModelSpec, example: Batch) -> None:
        self.tap, self.head_path = student.pooled, student.head
        shape, classes = student.shape(self.tap), student.outputs
        if len(shape) != 1 or classes is None:
            raise ValueError(
                f"dhkd puts a second head on one feature vector a row; the classifier of {student.name} takes "
                f"{list(shape)} and gives {classes} classes"
            )
        config = self.config
        self.head: nn.Module | None = None
        if config.head == "linear":
            self.head = nn.Linear(shape[0], classes)
        elif config.head == "nonlinear":
            self.head = NonlinearHead(shape[0], classes, config.hidden, config.dropout)

    def prepare(self, data: TrainingRows, student: nn.Module, teacher: Any) -> None:
        """Look whether the teacher's logits are what they should be; a store says so itself."""
        if teacher.module is None:
            return
        logits = teacher.outputs(next(data.batches())).logits
        if bool((upcast(logits).logsumexp(-1).abs() < NORMALISED).all()):
            warnings.warn(
                "dhkd reads raw logits, and this teacher's look like log-probabilities (their exponentials sum to 1 in "
                "every row): take a teacher without a softmax at its end",
                stacklevel=2,
            )

    def objective(self, student: Outputs, teacher: Outputs | None, batch: Batch, ctx: Step) -> Terms:
        assert teacher is not None
        config = self.config
        label = ctx.label_loss(student, batch)
        # All rows go through the head, so that its BatchNorm does not depend on the mask.
        logits, theirs = keep_rows(batch.mask, self._auxiliary(student), teacher.logits)
        loss = binary_kl_norm_loss(logits, theirs, config.temperature, config.eps)
        if self.combine_gradients is not None and not self._trained:
            self._trained = self._parameters_by_name(ctx)
        return {
            "label": Term(config.label_weight * label.mean, label.items),
            "binary_kl": Term(config.loss_weight * loss),
        }

    def after_step(self, ctx: Step) -> None:
        if self.conflict is not None and (ctx.step + 1) % ctx.steps_per_epoch == 0:
            self.conflict.end_epoch()

    def tables(self) -> dict[str, Table]:
        """Of `watch_gradients`: cosines of both losses' gradients by epoch."""
        return {} if self.conflict is None else {"gradient_cosines": self.conflict.table()}

    def measure(self, ctx: Step) -> dict[str, Table]:
        """Neural collapse of the classifier's inputs, and of every linear head on them; of classes that have rows."""
        parts = []
        for batch in ctx.data.batches(most=MEASURED_ROWS):
            features = ctx.student(batch, (self.tap,), frozen=True).features[self.tap]
            assert batch.target is not None
            hard = batch.target if batch.target.dim() == 1 else batch.target.argmax(1)
            parts.append(keep_rows(batch.mask, features.float(), hard))
        features, target = (gather_uneven(torch.cat(each)) for each in zip(*parts, strict=True))
        present, target = target.unique(return_inverse=True)  # type: ignore[no-untyped-call]
        if len(present) < 2:
            return {}
        rows: list[list[Any]] = []
        for name, head in self._heads(ctx).items():
            weight = whole(head.weight.detach())[present]
            found = neural_collapse(features, target, len(present), weight)
            rows.append([name, *(None if value is None else value.item() for value in found)])
        columns = ["head", "NC1", "NC2_mean_norms", "NC2_mean_angles"]
        return {"neural_collapse": Table([*columns, "NC2_weight_norms", "NC2_weight_angles", "NC3"], rows)}

    def _auxiliary(self, student: Outputs) -> Tensor:
        """The logits that are held against the teacher's."""
        if self.head is None:
            return student.logits
        features: Tensor = student.features[self.tap]
        if self.config.head == "nonlinear" and self.training:
            check_batch_norm(len(features), "dhkd's head")
        logits: Tensor = self.head(features)
        return logits

    def _heads(self, ctx: Step) -> dict[str, nn.Linear]:
        heads = {"own": ctx.setup.student.model.get_submodule(self.head_path or ""), "second": self.head}
        return {name: head for name, head in heads.items() if isinstance(head, nn.Linear)}

    def _parameters_by_name(self, ctx: Step) -> list[tuple[str, nn.Parameter]]:
        """What is trained, in the order of its gradients, with the part of the student that it belongs to."""
        parts = {
            name: "classifier" if name.startswith(f"{self.head_path}.") else "trunk"
            for name in ctx.parameters()
        }
        ours = [(parts[name], parameter) for name, parameter in ctx.parameters().items()]
        every = ours + [("", parameter) for parameter in self.parameters()]
        return [(part, parameter) for part, parameter in every if parameter.requires_grad]

    def _combine(self, grads: dict[str, list[Tensor | None]]) -> list[Tensor | None]:
        nothing: list[Tensor | None] = [None] * len(self._trained)
        label, divergence = grads.get("label", nothing), grads.get("binary_kl", nothing)
        if self.conflict is not None:
            self.conflict.add(label, divergence, [part for part, _ in self._trained])
        if self.config.align_gradients:
            merged = align_gradients(label, divergence)
        else:
            merged = [
                b if a is None else a if b is None else a + b for a, b in zip(label, divergence, strict=True)
            ]
        if not self.config.dense_gradients:
            return merged
        return [
            torch.zeros_like(parameter) if gradient is None else gradient
            for gradient, (_, parameter) in zip(merged, self._trained, strict=True)
        ]
