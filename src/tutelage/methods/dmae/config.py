"""Options of mae and dmae; defaults are the official code's."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field

from tutelage.recipe.config import Config, MethodConfig
from tutelage.recipe.parts import Rows
from tutelage.recipe.schema import OptimizerConfig, ScheduleConfig, ViewConfig

Block = Annotated[int, Field(ge=0)]

EPOCHS = 100
"""Of fine-tuning, where the recipe says nothing."""


class FinetuneConfig(Config):
    """The second stage: all of the student is trained on labels."""

    epochs: int | None = Field(
        None, ge=1, description="Passes over the labelled rows; left out, and `steps` too: 100."
    )
    steps: int | None = Field(None, ge=1, description="Optimiser steps, in place of `epochs`.")
    batch_size: int | None = Field(None, ge=1, description="Rows a step; left out: as in pre-training.")
    optimizer: OptimizerConfig = Field(
        OptimizerConfig(name="adamw", lr=5e-4, weight_decay=0.05, layer_decay=0.75),
        description="The rate is for 256 rows a step: multiply it by batch_size / 256.",
    )
    schedule: ScheduleConfig = Field(
        ScheduleConfig(name="cosine", warmup=0.05), description="The learning rate over the stage."
    )
    views: tuple[ViewConfig, ...] | None = Field(
        None, description="Random changes of the labelled rows; left out: data.views."
    )

    @classmethod
    def conflicts(cls, values: Mapping[str, Any]) -> list[str]:
        both = values["epochs"] is not None and values["steps"] is not None
        return ["give epochs or steps, not both (set the other to null)"] if both else []

    @property
    def length(self) -> dict[str, int | None]:
        """``epochs`` and ``steps`` as `TrainConfig` takes them."""
        epochs = self.epochs or (None if self.steps else EPOCHS)
        return {"epochs": epochs, "steps": self.steps}


class MAEConfig(MethodConfig):
    """Options of mae. `train` is the budget of pre-training."""

    mask_ratio: float = Field(0.75, ge=0, lt=1, description="Share of the patches that is masked.")
    norm_pix: bool = Field(
        False, description="Predict pixels after each patch is shifted and scaled to mean 0 and variance 1."
    )
    decoder_width: int = Field(512, ge=4, multiple_of=4, description="Width of the decoder.")
    decoder_depth: int = Field(8, ge=1, description="Blocks of the decoder.")
    decoder_heads: int = Field(16, ge=1, description="Attention heads of the decoder; they divide its width.")
    finetune: FinetuneConfig | None = Field(
        FinetuneConfig(), description="Training on labels afterwards; null: pre-training alone."
    )
    labels: Rows | None = Field(
        None,
        description="Training rows whose labels fine-tuning and probe may use, those that as large a data.limit would "
        "keep; left out: all.",
    )
    probe: bool = Field(
        False,
        description="Fit a linear classifier on the frozen features too, and report its test accuracy.",
    )

    @classmethod
    def conflicts(cls, values: Mapping[str, Any]) -> list[str]:
        width, heads = values["decoder_width"], values["decoder_heads"]
        if isinstance(width, int) and isinstance(heads, int) and heads > 0 and width % heads:
            return [f"decoder_width {width} does not divide into decoder_heads {heads}"]
        return []


class DMAEConfig(MAEConfig):
    """Options of dmae."""

    student_blocks: tuple[Block, ...] | None = Field(
        None, description="Aligned blocks, from 0; left out: one, at three quarters of the depth."
    )
    teacher_blocks: tuple[Block, ...] | None = Field(
        None,
        description="The teacher's blocks that they are drawn to, one each; left out: as `student_blocks`.",
    )
    kind: Literal["l1", "l2"] = Field("l1", description="Absolute or squared differences.")
    projection: Literal["linear", "mlp"] | None = Field(
        "linear",
        description="Head from the student's width to the teacher's; null: none, and features are not normalised.",
    )
    beta: float = Field(1.0, ge=0, description="Weight of the alignment.")
    reconstruct: bool = Field(True, description="Predict the masked pixels too; false: alignment alone.")

    @classmethod
    def conflicts(cls, values: Mapping[str, Any]) -> list[str]:
        reasons = super().conflicts(values)
        ours, theirs = values["student_blocks"], values["teacher_blocks"]
        if (ours is None) != (theirs is None):
            reasons.append("give student_blocks and teacher_blocks together, or neither")
        elif isinstance(ours, tuple) and isinstance(theirs, tuple) and (len(ours) != len(theirs) or not ours):
            reasons.append(
                f"student_blocks and teacher_blocks are pairs; got {len(ours)} and {len(theirs)} blocks"
            )
        return reasons
