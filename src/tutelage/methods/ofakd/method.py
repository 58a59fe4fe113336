"""OFA-KD as a method."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal

import torch
from pydantic import Field
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from tutelage.engine.layout import Layout, layout_of
from tutelage.engine.method import Method, Paper
from tutelage.engine.needs import Needs
from tutelage.engine.tracing import quiet
from tutelage.engine.types import Batch, Outputs, Table, Taps, Term, Terms
from tutelage.functional.reductions import keep_rows
from tutelage.methods.ofakd.branches import ConvBranch, TokenBranch
from tutelage.methods.ofakd.functional import exit_losses, spread_gamma
from tutelage.methods.ofakd.stages import MOST, Exit, choose_exits, pooled_width
from tutelage.recipe.config import MethodConfig, Range

if TYPE_CHECKING:
    from collections.abc import Mapping

    from tutelage.engine.spec import ModelSpec
    from tutelage.engine.step import Step

Gamma = Annotated[float, Field(gt=0, le=100)]
StageNumber = Annotated[int, Field(ge=1, le=MOST)]


class OFAKDConfig(MethodConfig):
    """Options of ofakd; defaults are those of the authors' code."""

    label_weight: float = Field(1.0, ge=0, description="Weight of the label loss.")
    logit_weight: float = Field(1.0, ge=0, description="Weight of the enhanced loss of the final logits.")
    branch_weight: float = Field(1.0, ge=0, description="Weight of its sum over the exits.")
    gamma: Gamma | tuple[Gamma, ...] = Field(
        1.0,
        description="Power of the target's enhancement: one for all, or one an exit and then the final logits'.",
    )
    temperature: float = Field(
        1.0, gt=0, le=1000, description="Softens both sides; no factor makes up for it."
    )
    form: Literal["code", "paper"] = Field(
        "code",
        description="Weights of the authors' code, or of the paper, which hold the label (set label_weight to 0).",
    )
    stages: tuple[StageNumber, ...] | None = Field(
        None,
        min_length=1,
        description="Which of the student's (at most four) stages get an exit, from 1; left out: all.",
    )
    taps: tuple[str, ...] | None = Field(
        None, min_length=1, description="Module paths (or patterns) in place of stages; see `tutelage taps`."
    )
    heads: int = Field(4, ge=1, le=64, description="Attention heads in the exits of tokens.")

    @classmethod
    def conflicts(cls, values: Mapping[str, Any]) -> list[str]:
        reasons = []
        if values["form"] == "paper" and values["label_weight"] != 0:
            reasons.append(
                "form=paper holds the label's loss: set label_weight to 0, or it would count twice"
            )
        if values["stages"] is not None and values["taps"] is not None:
            reasons.append("give `stages` or `taps`, not both")
        return reasons

    @classmethod
    def search(cls) -> dict[str, Range]:
        return {
            "logit_weight": Range.around(1.0),
            "branch_weight": Range.around(1.0),
            "gamma": Range(1.0, 1.5),
        }


class OFAKD(Method):
    """Labels, and the teacher's logits for the student's own and for those of an exit at each of its stages."""

    Config = OFAKDConfig
    paper = Paper(
        title="One-for-All: Bridge the Gap Between Heterogeneous Architectures in Knowledge Distillation (OFA-KD)",
        venue="NeurIPS",
        year=2023,
        arxiv="2310.19444",
        claim="With a teacher of another family, a student trained with OFA-KD reaches a higher mean test accuracy "
        "than one trained with CE + KD, and than one trained with a FitNet hint.",
        card="ofakd",
        family="vision features",
    )
    needs = Needs(scale="log_probs", fields=("target",), couples_rows="norm")
    config: OFAKDConfig

    def taps(self, teacher: ModelSpec | None, student: ModelSpec) -> Taps:
        return Taps(student=tuple(place.tap for place in self._exits(student)))

    def build(self, teacher: ModelSpec | None, student: ModelSpec, example: Batch) -> None:
        assert teacher is not None
        if student.outputs is None:
            raise ValueError(f"ofakd: the number of classes of {student.name} is not known")
        exits = self._exits(student)
        self.exit_taps = [place.tap for place in exits]
        self.layouts = [layout_of(student, tap) for tap in self.exit_taps]
        self.gammas = spread_gamma(self.config.gamma, len(exits))
        deepest = (*self.exit_taps, *student.stages())[-1]
        own = pooled_width(student) or layout_of(student, deepest).channels
        widest = max(own, pooled_width(teacher) or 0)
        self.branches = nn.ModuleList(
            self._branch(place, layout, own, widest, student.outputs)
            for place, layout in zip(exits, self.layouts, strict=True)
        )
        # Counted now: later the branches may lie on several devices.
        shapes = [student.shape(tap) for tap in self.exit_taps]
        self.costs = [
            _cost(branch, self._read(torch.zeros(1, *shape), layout))
            for branch, shape, layout in zip(self.branches, shapes, self.layouts, strict=True)
        ]

    def objective(self, student: Outputs, teacher: Outputs | None, batch: Batch, ctx: Step) -> Terms:
        assert teacher is not None
        assert batch.target is not None
        label = ctx.label_loss(student, batch)
        # All rows go through the branches, so that their BatchNorm does not depend on the mask.
        exits = [
            branch(self._read(student.features[tap], layout))
            for tap, layout, branch in zip(self.exit_taps, self.layouts, self.branches, strict=True)
        ]
        target, teacher_logits, *logits = keep_rows(
            batch.mask, batch.target, teacher.logits, *exits, student.logits
        )
        config = self.config
        *branches, last = exit_losses(
            logits, teacher_logits, target, self.gammas, config.temperature, config.form
        )
        return {
            "label": Term(config.label_weight * label.mean, label.items),
            "logits": Term(config.logit_weight * last),
            "branches": Term(config.branch_weight * torch.stack(branches).sum()),
        }

    def tables(self) -> dict[str, Table]:
        """What the exits cost in training; nothing of them ships."""
        rows: list[list[Any]] = [
            [tap, layout.kind, *cost]
            for tap, layout, cost in zip(self.exit_taps, self.layouts, self.costs, strict=True)
        ]
        return {"exits": Table(["tap", "layout", "parameters", "flops"], rows)}

    def _exits(self, student: ModelSpec) -> tuple[Exit, ...]:
        return choose_exits(student, self.config.stages, self.config.taps)

    def _branch(self, place: Exit, layout: Layout, own: int, widest: int, classes: int) -> nn.Module:
        if layout.kind == "channels_first":
            return ConvBranch(layout.channels, place.later, widest, classes)
        if layout.kind == "vector":
            raise ValueError(
                f"ofakd's exits read maps or tokens; {place.tap!r} gives a vector of {layout.channels} values: "
                "set method.stages or method.taps"
            )
        depth = max(place.later, 1)
        return TokenBranch(
            layout.grid, layout.prefix, layout.channels, own, depth, classes, self.config.heads
        )

    @staticmethod
    def _read(features: torch.Tensor, layout: Layout) -> torch.Tensor:
        return features if layout.kind == "channels_first" else layout.to_tokens(features)


def _cost(branch: nn.Module, features: torch.Tensor) -> tuple[int, int]:
    """Parameters, and operations of a forward of one row."""
    with quiet(branch), FlopCounterMode(display=False) as counter:
        branch(features)
    return sum(parameter.numel() for parameter in branch.parameters()), counter.get_total_flops()
