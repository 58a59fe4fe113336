"""TRG as a method."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from tutelage.engine.layout import Layout, layout_of
from tutelage.engine.method import Method, Paper
from tutelage.engine.needs import Needs
from tutelage.engine.types import Batch, Outputs, Taps, Term, Terms
from tutelage.functional.divergences import kd_loss
from tutelage.functional.reductions import keep_rows
from tutelage.methods.trg.functional import (
    gather_patch_tokens,
    patch_tokens,
    sample_token_index,
    trg_contextual_loss,
    trg_global_loss,
    trg_local_loss,
    trg_temperature,
)
from tutelage.recipe.config import MethodConfig, Range

if TYPE_CHECKING:
    from tutelage.engine.spec import ModelSpec
    from tutelage.engine.step import Step


class TRGConfig(MethodConfig):
    """Options of trg; all defaults but the form of the terms are ours, since the paper's figures could not be read."""

    label_weight: float = Field(1.0, ge=0, description="Weight of the label loss.")
    kd_weight: float = Field(1.0, ge=0, description="Weight of the softened logits' divergence.")
    temperature: float = Field(4.0, gt=0, le=1000, description="Temperature of the softened logits.")
    loss_weight: float = Field(1.0, ge=0, description="Factor of the three terms on tokens.")
    contextual_weight: float = Field(1.0, ge=0, description="Weight of the similarities within an image.")
    local_weight: float = Field(1.0, ge=0, description="Weight of the graph's neighbourhoods.")
    global_weight: float = Field(0.1, ge=0, description="Weight of the contrast over all tokens.")
    patch: int | None = Field(
        None,
        ge=1,
        le=64,
        description="Side of a token on a map of a CNN; left out: 2 where that divides the map, else 1.",
    )
    tokens_per_image: int = Field(4, ge=1, le=4096, description="Tokens that each image gives to the graph.")
    max_tokens: int = Field(
        2048, ge=1, description="Most tokens of a graph: its memory grows with their square."
    )
    k: int = Field(8, ge=1, description="Neighbours of a token.")
    sigma: float = Field(1.0, gt=0, description="Width of the graph's kernel.")
    normalize: bool = Field(True, description="Bring tokens to length 1 before their distances are taken.")
    normalize_contextual: bool = Field(
        False, description="Bring tokens to length 1 before their similarities within an image are taken."
    )
    direction: Literal["forward", "reverse"] = Field(
        "forward", description="KL(teacher || student) of neighbourhoods, or the reverse, as printed."
    )
    graph_temperature: float = Field(1.0, gt=0, description="What edge weights are divided by.")
    start_temperature: float = Field(
        0.5, gt=0, le=1000, description="Temperature of the contrast at the first step."
    )
    end_temperature: float = Field(0.1, gt=0, le=1000, description="Temperature of the contrast at the end.")
    student_tap: str | None = Field(
        None, description="The student's module path; left out: its last-but-one stage. See `tutelage taps`."
    )
    teacher_tap: str | None = Field(None, description="Likewise of the teacher.")

    @classmethod
    def search(cls) -> dict[str, Range]:
        return {"loss_weight": Range(0.25, 16.0), "temperature": Range(1.0, 8.0)}


class TRG(Method):
    """Labels, the teacher's softened logits, and its relations between patches: within an image, between near patches
    of the batch, and between all of them."""

    Config = TRGConfig
    paper = Paper(
        title="Knowledge Distillation via Token-level Relationship Graph",
        venue="preprint",
        year=2023,
        arxiv="2306.12442",
        claim="The gain of CE + KD + TRG over CE + KD grows with the imbalance of the training classes.",
        card="trg",
        family="vision features",
    )
    needs = Needs(scale="log_probs", teacher_taps=True, fields=("target",), couples_rows="loss")
    config: TRGConfig

    def taps(self, teacher: ModelSpec | None, student: ModelSpec) -> Taps:
        assert teacher is not None
        student_tap = _tap(student, "student", self.config.student_tap)
        return Taps(student=(student_tap,), teacher=(_tap(teacher, "teacher", self.config.teacher_tap),))

    def build(self, teacher: ModelSpec | None, student: ModelSpec, example: Batch) -> None:
        assert teacher is not None
        self.tokens = Tokens(student, teacher, self.taps(teacher, student), self.config.patch)
        if self.config.tokens_per_image > self.tokens.count:
            raise ValueError(
                f"method.tokens_per_image={self.config.tokens_per_image}, but an image has {self.tokens.count} tokens "
                f"({self.tokens.described}); set it to at most that, or a smaller method.patch"
            )
        self.projection = nn.Linear(*self.tokens.widths)

    def objective(self, student: Outputs, teacher: Outputs | None, batch: Batch, ctx: Step) -> Terms:
        assert teacher is not None
        config = self.config
        label = ctx.label_loss(student, batch)
        divergence = kd_loss(student.logits, teacher.logits, config.temperature, batch.mask)
        ours, theirs = keep_rows(batch.mask, *self.tokens(student.feature(), teacher.feature()))
        return {
            "label": Term(config.label_weight * label.mean, label.items),
            "kd": Term(config.kd_weight * divergence),
            "contextual": Term(
                config.loss_weight * config.contextual_weight * self._contextual(ours, theirs)
            ),
        } | self._graph_terms(ours, theirs, ctx)

    def _contextual(self, student: Tensor, teacher: Tensor) -> Tensor:
        if self.config.normalize_contextual:
            student, teacher = F.normalize(student, dim=2), F.normalize(teacher, dim=2)
        return trg_contextual_loss(student, teacher)

    def _graph_terms(self, student: Tensor, teacher: Tensor, ctx: Step) -> Terms:
        config = self.config
        rows, picked = len(student), config.tokens_per_image
        if rows * picked > config.max_tokens:
            raise ValueError(
                f"{rows} images of {picked} tokens give a graph of {rows * picked}; method.max_tokens is "
                f"{config.max_tokens}: raise it, or lower method.tokens_per_image or train.batch_size"
            )
        index = sample_token_index(rows, self.tokens.count, picked, ctx.generator, student.device)
        ours, theirs = (gather_patch_tokens(side, index) for side in (student, teacher))
        local = trg_local_loss(
            ours,
            theirs,
            config.k,
            config.sigma,
            config.normalize,
            config.direction,
            config.graph_temperature,
        )
        temperature = trg_temperature(
            ctx.step, ctx.total_steps, config.start_temperature, config.end_temperature
        )
        contrast = trg_global_loss(self.projection(ours), theirs, temperature)
        return {
            "local": Term(config.loss_weight * config.local_weight * local),
            "global": Term(config.loss_weight * config.global_weight * contrast),
        }


class Tokens:
    """Brings the tapped features of both models to equally many tokens at the same positions.

    A map is cut into patches; tokens of a transformer are taken as they are, without class tokens. Where the grids
    differ, the larger side is average-pooled first.

    Attributes:
        count: tokens of an image.
        widths: of a student's and a teacher's token.
    """

    def __init__(self, student: ModelSpec, teacher: ModelSpec, taps: Taps, patch: int | None) -> None:
        self.layouts = layout_of(student, taps.student[0]), layout_of(teacher, taps.teacher[0])
        sides = [_patch(layout, patch) for layout in self.layouts]
        grids = [
            (layout.grid[0] // side, layout.grid[1] // side)
            for layout, side in zip(self.layouts, sides, strict=True)
        ]
        self.grid = min(grids[0][0], grids[1][0]), min(grids[0][1], grids[1][1])
        self.patches = sides[0], sides[1]
        self.count = self.grid[0] * self.grid[1]
        self.widths = self._width(0), self._width(1)
        self.described = f"a grid of {self.grid[0]}×{self.grid[1]}"

    def __call__(self, student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
        return self._cut(student, 0), self._cut(teacher, 1)

    def _width(self, side: int) -> int:
        return self.layouts[side].channels * self.patches[side] ** 2

    def _cut(self, features: Tensor, side: int) -> Tensor:
        maps, patch = self.layouts[side].to_map(features), self.patches[side]
        size = self.grid[0] * patch, self.grid[1] * patch
        if tuple(maps.shape[2:]) != size:
            maps = F.adaptive_avg_pool2d(maps, size)
        return patch_tokens(maps, patch)


def _patch(layout: Layout, wanted: int | None) -> int:
    if layout.kind == "vector":
        raise ValueError(
            "trg needs a map or tokens; the tap gives a vector: set method.student_tap, method.teacher_tap"
        )
    if layout.kind == "tokens":
        return 1
    height, width = layout.grid
    patch = wanted or (2 if height % 2 == width % 2 == 0 else 1)
    if height % patch or width % patch:
        raise ValueError(f"method.patch={patch} does not divide the tapped map's {height}×{width}")
    return patch


def _tap(spec: ModelSpec, side: str, path: str | None) -> str:
    if path is not None:
        found = spec.resolve((path,))
        if len(found) != 1:
            raise ValueError(
                f"method.{side}_tap={path!r} must name one module of {spec.name}; it matches {', '.join(found)}"
            )
        return found[0]
    stages = spec.stages()
    if not stages:
        raise ValueError(f"no stages found in {spec.name}; set method.{side}_tap (see `tutelage taps`)")
    return stages[max(len(stages) - 2, 0)]
