"""A teacher that is a model in this process."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Sequence

import torch
from torch import nn

from tutelage.engine.generation import Generation, Prompt, generate
from tutelage.engine.heads import HeadPlan
from tutelage.engine.needs import Offers
from tutelage.engine.spec import ModelSpec
from tutelage.engine.step import constant
from tutelage.engine.taps import Tapped
from tutelage.engine.teacher import Grad
from tutelage.engine.types import Batch, Inputs, Outputs
from tutelage.recipe.generation import GenerationConfig


class LocalTeacher:
    """A model as a teacher: in eval mode and without gradients, unless it is trained (``grad="all"``).

    Args:
        name: what messages call it.
        model: the bare module.
        example: a few rows as the model gets them, before normalisation; used once, to measure shapes.
        mean, std: its own input normalisation by channel.
        head: where a language model makes its logits.
    """

    def __init__(
        self,
        name: str,
        model: nn.Module,
        example: Inputs,
        *,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        head: HeadPlan | None = None,
    ) -> None:
        self.held = Tapped(model, mean=mean, std=std, head=head)
        self.spec = ModelSpec.of(name, model, self.held.normalise(example), head=head)
        self.offers = Offers(text=hasattr(model, "generate"))

    @property
    def module(self) -> Tapped:
        return self.held

    def freeze(self) -> LocalTeacher:
        """Constant parameters and eval mode, for good."""
        self.held.requires_grad_(False).eval()
        self.offers = dataclasses.replace(self.offers, trainable=False)
        return self

    def outputs(
        self, batch: Batch, taps: tuple[str, ...] = (), grad: Grad = "none", *, logits: bool = True
    ) -> Outputs:
        """See `tutelage.engine.teacher.Teacher`."""
        inputs = batch.inputs if batch.teacher_inputs is None else batch.teacher_inputs
        with contextlib.ExitStack() as stack:
            if grad == "none":
                stack.enter_context(torch.no_grad())
            if grad != "all":
                stack.enter_context(constant(self.held))
            return self.held.outputs(self.held(inputs, taps, logits))

    def generate(self, prompts: Sequence[Prompt], options: GenerationConfig, seed: int) -> list[Generation]:
        """See `tutelage.engine.generation.generate`."""
        return generate(self.held, prompts, options, seed)
