"""How long, how fast and on what a student is trained."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from typing import Any, Literal

from pydantic import Field

from tutelage.recipe.config import Config, Scalar
from tutelage.recipe.parts import Share, Text, is_number


class OptimizerConfig(Config):
    """An optimiser by the name that torch or timm gives it."""

    name: Text = Field("sgd", description="For example sgd (Nesterov only where asked), adamw, lamb.")
    lr: float = Field(0.05, gt=0, le=100, description="Largest learning rate.")
    weight_decay: float = Field(
        0.0, ge=0, le=10, description="Applied to biases and norms too, unless `decay_norms` is false."
    )
    decay_norms: bool = Field(
        True, description="Decay biases and normalisation weights too, as most CIFAR recipes do."
    )
    momentum: float | None = Field(
        None, ge=0, lt=1, description="Left out: 0.9 for sgd, else the optimiser's own."
    )
    layer_decay: float | None = Field(
        None, gt=0, le=1, description="Factor on the learning rate a layer, from the head down."
    )
    options: dict[str, Scalar | tuple[float, ...]] = Field(
        {}, description="Further arguments of the optimiser."
    )


class ScheduleConfig(Config):
    """Learning rate over the run. Steps of warm-up are steps of the optimiser."""

    name: Text = Field(
        "cosine",
        description="constant, cosine, linear, multistep, or a class name of torch.optim.lr_scheduler.",
    )
    warmup: float = Field(0.0, ge=0, lt=1, description="Share of the run that the rate rises linearly.")
    milestones: tuple[Share, ...] = Field(
        (), description="multistep: shares of the run after which the rate drops, rising."
    )
    gamma: float = Field(0.1, gt=0, le=1, description="multistep: factor at each drop.")
    final: float = Field(
        0.0, ge=0, le=1, description="cosine, linear: the last rate as a share of the first."
    )
    options: dict[str, Scalar | tuple[float, ...]] = Field(
        {}, description="Arguments of a class of torch.optim.lr_scheduler."
    )

    @classmethod
    def conflicts(cls, values: Mapping[str, Any]) -> list[str]:
        milestones = values["milestones"]
        if values["name"] == "multistep" and milestones == ():
            return ["`multistep` needs milestones, shares of the run such as [0.5, 0.75]"]
        if isinstance(milestones, tuple) and all(map(is_number, milestones)):
            rising = all(a < b for a, b in pairwise(milestones))
            return [] if rising else [f"milestones must rise; got {', '.join(map(str, milestones))}"]
        return []


class CheckpointConfig(Config):
    """When the whole state of a run is written, so that it can go on from there."""

    every: int | None = Field(None, ge=1, description="Steps between checkpoints; left out: once an epoch.")
    keep: int = Field(2, ge=1, le=1000, description="Newest checkpoints kept; the best one is kept besides.")


class EarlyStopConfig(Config):
    """When a run ends before its time."""

    metric: Text = Field("loss", description="A validation metric.")
    patience: int = Field(5, ge=1, description="Evaluations without a better value before the run stops.")


class TrainConfig(Config):
    """How long, how fast, and on what the student is trained."""

    epochs: int | None = Field(None, ge=1, description="Passes over the data; give this or `steps`.")
    steps: int | None = Field(None, ge=1, description="Optimiser steps; give this or `epochs`.")
    batch_size: int = Field(
        64, ge=1, description="Rows an optimiser step sees, over all processes and micro-batches."
    )
    accumulate: int = Field(
        1, ge=1, description="Micro-batches that one process splits its share of a step into."
    )
    optimizer: OptimizerConfig = Field(OptimizerConfig(), description="The optimiser and its learning rate.")
    schedule: ScheduleConfig = Field(ScheduleConfig(), description="The learning rate over the run.")
    clip: float | None = Field(None, gt=0, description="Largest gradient norm.")
    sharding: Literal["ddp", "fsdp"] = Field(
        "ddp",
        description="How several processes share student and method: each has a whole copy (ddp), or a part (fsdp).",
    )
    shard_teacher: bool | None = Field(
        None,
        description="Whether processes share a frozen teacher's weights; left out: with fsdp yes, with ddp no.",
    )
    shard_head: bool = Field(
        False,
        description="With fsdp, of language models: processes keep their rows of both heads, and each computes its part "
        "of every token's logits (tensor parallel); else each gathers both heads whole.",
    )
    offload_teacher: bool = Field(
        False,
        description="Keep a frozen teacher's weights in CPU memory; each layer's come to the device for its forward.",
    )
    timeout: float = Field(
        30.0,
        ge=0.05,
        le=10_080,
        description="Minutes that a process waits for another before the run ends with an error.",
    )
    precision: Literal["fp32", "bf16", "fp16"] = Field(
        "fp32", description="Number format of the forward passes."
    )
    quantize: Literal["int8", "int4"] | None = Field(
        None,
        description="Round the student's weights in every forward (int8: inputs of layers too), so that it learns to "
        "be exported so. Metrics are those of the rounded student; the floats are saved.",
    )
    compile: bool = Field(
        False, description="Compile student and teacher with torch.compile, in regions without taps inside."
    )
    activation_checkpointing: bool = Field(
        False,
        description="Keep only the inputs of the student's blocks for the backward pass, and compute the rest again: less "
        "memory, about a third more time.",
    )
    device: Literal["auto", "cpu", "cuda", "mps", "xpu"] = Field(
        "auto", description="`auto`: the first accelerator, else the CPU. mps and xpu are untested."
    )
    threads: int | None = Field(None, ge=1, le=1024, description="CPU threads; left out: torch's own choice.")
    ema: float | None = Field(
        None,
        gt=0,
        lt=1,
        description="Decay of an exponential moving average of the student; it is what is evaluated and shipped.",
    )
    label_weight: float | None = Field(
        None,
        ge=0,
        description="Weight of the label loss where methods are combined; left out: the first method's.",
    )
    label_smoothing: float = Field(
        0.0, ge=0, lt=1, description="Share of a label's mass spread over all classes."
    )
    seed: int = Field(
        0,
        ge=0,
        le=2**31 - 1,
        description="Seed of weights, order of rows, views and all that a method draws.",
    )
    checkpoint: CheckpointConfig = Field(CheckpointConfig(), description="When the run's state is written.")
    early_stop: EarlyStopConfig | None = Field(None, description="Left out: the run takes its full length.")

    @classmethod
    def conflicts(cls, values: Mapping[str, Any]) -> list[str]:
        reasons = []
        given = {name: values[name] for name in ("epochs", "steps") if values[name] is not None}
        if len(given) != 1:
            got = ", ".join(f"{name}={value}" for name, value in given.items())
            reasons.append(
                "give exactly one of epochs and steps; got "
                + (f"{got} (set the other to null)" if given else "neither")
            )
        rows, parts = values["batch_size"], values["accumulate"]
        if all(isinstance(value, int) and value > 0 for value in (rows, parts)) and rows % parts:
            reasons.append(f"batch_size={rows} does not divide into accumulate={parts} micro-batches")
        if values["activation_checkpointing"] is True and values["compile"] is True:
            reasons.append(
                "activation_checkpointing does not go with compile, which chooses itself what to compute again: set one "
                "of them to false"
            )
        if values["shard_head"] is True and values["sharding"] != "fsdp":
            reasons.append("shard_head spreads what processes share: set sharding=fsdp too")
        if values["sharding"] == "fsdp" and values["precision"] == "fp16":
            reasons.append("precision=fp16 does not go with sharding=fsdp: use bf16")
        return reasons
