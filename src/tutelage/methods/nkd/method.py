"""NKD and USKD as methods."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Literal

from pydantic import Field
from torch import Tensor, nn

from tutelage.engine.method import Method, Paper
from tutelage.engine.needs import Needs
from tutelage.engine.types import Batch, Outputs, Taps, Term, Terms
from tutelage.functional.reductions import keep_rows
from tutelage.methods.nkd.functional import nkd_terms, uskd_loss
from tutelage.recipe.config import MethodConfig, Range

if TYPE_CHECKING:
    from tutelage.engine.spec import ModelSpec
    from tutelage.engine.step import Step

_TITLE = (
    "From Knowledge Distillation to Self-Knowledge Distillation: A Unified Approach with Normalized Loss and "
    "Customized Soft Labels (NKD + USKD)"
)
_FAMILY = "vision logits"

Layout = Literal["vector", "channels_first", "channels_last", "class_token", "token_mean"]

_AXES: dict[Layout, int] = {
    "vector": 1,
    "channels_first": 3,
    "channels_last": 3,
    "class_token": 2,
    "token_mean": 2,
}


class NKDConfig(MethodConfig):
    """Options of nkd; defaults are those of its ImageNet runs (CIFAR-100 ResNet34 to 18: gamma 3.5, temperature 3)."""

    label_weight: float = Field(1.0, ge=0, description="Weight of the label loss.")
    gamma: float = Field(1.5, ge=0, description="Weight of the non-target part.")
    temperature: float = Field(
        1.0,
        gt=0,
        le=1000,
        description="Softens the non-target part alone; its square is a factor of that part.",
    )

    @classmethod
    def search(cls) -> dict[str, Range]:
        return {"gamma": Range.around(1.5), "temperature": Range(1.0, 8.0)}


class NKD(Method):
    """Labels, the teacher's target probability, and its renormalised non-target probabilities."""

    Config = NKDConfig
    paper = Paper(
        title=_TITLE,
        venue="ICCV",
        year=2023,
        arxiv="2303.13005",
        claim="With one teacher and equal tuning, a student trained with CE + NKD reaches a higher mean test accuracy "
        "than one trained with CE + KD.",
        card="nkd",
        family=_FAMILY,
    )
    needs = Needs(scale="log_probs", fields=("target",))
    config: NKDConfig

    def objective(self, student: Outputs, teacher: Outputs | None, batch: Batch, ctx: Step) -> Terms:
        assert teacher is not None
        assert batch.target is not None
        label = ctx.label_loss(student, batch)
        student_logits, teacher_logits, target = keep_rows(
            batch.mask, student.logits, teacher.logits, batch.target
        )
        terms = nkd_terms(student_logits, teacher_logits, target, self.config.temperature)
        factor = self.config.gamma * self.config.temperature**2
        return {
            "label": Term(self.config.label_weight * label.mean, label.items),
            "target": Term(terms.target),
            "nontarget": Term(factor * terms.nontarget),
        }


class USKDConfig(MethodConfig):
    """Options of uskd; defaults are those of its ImageNet runs (CIFAR-100: alpha, beta and mu 0.1)."""

    label_weight: float = Field(1.0, ge=0, description="Weight of the label loss.")
    alpha: float = Field(1.0, ge=0, description="Weight of the student's own soft target label.")
    beta: float = Field(0.1, ge=0, description="Weight of the soft non-target labels.")
    mu: float = Field(0.005, ge=0, description="Weight of the weak head's smoothed label loss.")
    smoothing: float = Field(0.1, ge=0, lt=1, description="Smoothing of the weak head's label.")
    rank_form: Literal["code", "paper"] = Field(
        "code",
        description="Rank classes by the student's log-probabilities (the authors' code) or probabilities.",
    )
    tap: str | None = Field(
        None,
        description="Module path of the weak head's feature; left out: the last-but-one stage, in transformers the "
        "block halfway, in a net with one stage that one.",
    )
    layout: Layout | None = Field(
        None,
        description="What the tap gives and how it is pooled; left out: by its shape. Tokens that fill a square are "
        "averaged, others give their first, the class token.",
    )

    @classmethod
    def search(cls) -> dict[str, Range]:
        return {
            "alpha": Range(0.025, 4.0),
            "beta": Range.around(0.1),
            "mu": Range(0.001, 0.4),
        }


class USKD(Method):
    """Labels, and soft labels that the student makes of its own logits and of a weak head on an inner feature."""

    Config = USKDConfig
    paper = Paper(
        title=_TITLE,
        venue="ICCV",
        year=2023,
        arxiv="2303.13005",
        claim="A student trained with CE + USKD, without any teacher, reaches a higher mean test accuracy than one "
        "trained with CE alone.",
        card="nkd",
        family=_FAMILY,
    )
    needs = Needs(teacher="none", logits=(), fields=("target",), couples_rows="loss")
    config: USKDConfig

    def taps(self, teacher: ModelSpec | None, student: ModelSpec) -> Taps:
        return Taps(student=(self._tap(student),))

    def build(self, teacher: ModelSpec | None, student: ModelSpec, example: Batch) -> None:
        self.tap = self._tap(student)
        shape = student.shape(self.tap)
        self.layout = self.config.layout or layout_of(shape)
        if len(shape) != _AXES[self.layout]:
            raise ValueError(
                f"method.layout={self.layout!r} does not fit `{self.tap}`, which gives shape {shape}"
            )
        if student.outputs is None:
            raise ValueError(f"uskd: the number of classes of {student.name} is not known")
        self.weak_head = nn.Linear(shape[0 if self.layout == "channels_first" else -1], student.outputs)

    def objective(self, student: Outputs, teacher: Outputs | None, batch: Batch, ctx: Step) -> Terms:
        assert batch.target is not None
        label = ctx.label_loss(student, batch)
        weak_logits = self.weak_head(pooled(student.features[self.tap], self.layout))
        logits, weak_logits, target = keep_rows(batch.mask, student.logits, weak_logits, batch.target)
        config = self.config
        parts = uskd_loss(logits, weak_logits, target, smoothing=config.smoothing, rank_form=config.rank_form)
        return {
            "label": Term(config.label_weight * label.mean, label.items),
            "target": Term(config.alpha * parts.target),
            "nontarget": Term(config.beta * parts.nontarget),
            "weak": Term(config.mu * parts.weak),
        }

    def _tap(self, student: ModelSpec) -> str:
        if self.config.tap is not None:
            found = student.resolve((self.config.tap,))
            if len(found) != 1:
                raise ValueError(
                    f"method.tap={self.config.tap!r} must name one module of {student.name}; "
                    f"it matches {', '.join(found)}"
                )
            return found[0]
        stages = student.stages()
        if not stages:
            raise ValueError(f"no stages found in {student.name}; set method.tap (see `tutelage taps`)")
        if len(stages) == 1:
            return stages[0]
        tokens = len(student.shape(stages[-2])) == 2
        return stages[len(stages) // 2 - 1] if tokens else stages[-2]


def layout_of(shape: tuple[int, ...]) -> Layout:
    """What a tapped feature of this shape (without the row axis) is.

    Raises:
        ValueError: neither a vector, tokens nor a map.
    """
    if len(shape) == 1:
        return "vector"
    if len(shape) == 2:
        return "token_mean" if math.isqrt(shape[0]) ** 2 == shape[0] else "class_token"
    if len(shape) == 3:
        # Swin and its kin keep channels last; only a square map with more channels than pixels a side tells.
        return "channels_last" if shape[0] == shape[1] < shape[2] else "channels_first"
    raise ValueError(
        f"a tapped feature must be a vector, tokens or a map; got shape {shape} (see method.tap)"
    )


def pooled(features: Tensor, layout: Layout) -> Tensor:
    """``[batch, features]`` of a tapped feature: maps and tokens averaged, or the first token."""
    if layout == "channels_first":
        return features.mean((2, 3))
    if layout == "channels_last":
        return features.mean((1, 2))
    if layout == "token_mean":
        return features.mean(1)
    return features[:, 0] if layout == "class_token" else features
