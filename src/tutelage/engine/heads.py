"""Where a language model makes its logits: hidden states and head apart, so that a loss need never build them whole."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from accelerate.utils import align_module_device
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from tutelage.engine.needs import PairingError
from tutelage.engine.spread import SpreadHead, gathered, rows_of_rank
from tutelage.engine.types import Head, Inputs

_TOKENS = 16
"""Tokens of a row that probes look at: logits of whole rows over a large vocabulary would not fit."""


@dataclass(frozen=True)
class HeadPlan:
    """How a model gets from its last hidden states to logits.

    Attributes:
        path: the linear module whose input the hidden states are.
        outputs: how many of its rows are tokens; further ones only pad the vocabulary, and are cut off.
        softcap, scale: as in `Head`.
    """

    path: str
    outputs: int
    softcap: float | None = None
    scale: float = 1.0

    def head(
        self, model: nn.Module, params: Mapping[str, Tensor] | None = None, *, spread: bool = False
    ) -> Head:
        """The head with its present weights.

        Args:
            params: tensors that stand for the model's own parameters, by name.
            spread: leave sharded weights where they are (`SpreadHead`); else they are gathered, a collective call.
        """
        with align_module_device(model.get_submodule(self.path)):
            found = self.parameters(model) | self._among(params or {})
        # Constant for this forward, whatever becomes of the parameter after it.
        fixed = {name: value if value.requires_grad else value.detach() for name, value in found.items()}
        if spread and isinstance(weight := fixed["weight"], DTensor):
            return SpreadHead(weight, cast(Any, fixed.get("bias")), self.outputs, self.softcap, self.scale)
        whole = {name: self._tokens(value) for name, value in fixed.items()}
        return Head(whole["weight"], whole.get("bias"), self.softcap, self.scale)

    def parameters(self, model: nn.Module) -> dict[str, Tensor]:
        """``weight`` and, where it has one, ``bias``."""
        module = model.get_submodule(self.path)
        return {
            name: value for name in ("weight", "bias") if (value := getattr(module, name, None)) is not None
        }

    def tied(self, model: nn.Module) -> bool:
        """Whether the weight is another module's too."""
        own = self.parameters(model)["weight"]
        return sum(value is own for each in model.modules() for value in each._parameters.values()) > 1

    def _among(self, params: Mapping[str, Tensor]) -> dict[str, Tensor]:
        names = {f"{self.path}.{name}": name for name in ("weight", "bias")}
        return {names[name]: value for name, value in params.items() if name in names}

    def _tokens(self, value: Tensor) -> Tensor:
        if isinstance(value, DTensor):
            value = gathered(value)
        return value if len(value) == self.outputs else value[: self.outputs]


def check_spread(
    models: Mapping[str, tuple[HeadPlan | None, nn.Module]], ranks: int, *, whole_teachers: bool
) -> None:
    """That ranks can keep their rows of the heads of a student, named so, and its teachers.

    Raises:
        PairingError: why not.
    """
    start = "train.shard_head"
    without = [name for name, (plan, _) in models.items() if plan is None]
    if without:
        raise PairingError(f"{start} is for language models; {', '.join(without)} is none: set it to false")
    heads = {name: (plan, model) for name, (plan, model) in models.items() if plan is not None}
    tied = [name for name, (plan, model) in heads.items() if plan.tied(model)]
    if tied:
        raise PairingError(
            f"{start}: the head of {', '.join(tied)} is tied to the embedding, which every forward gathers; set it to "
            "false, or untie them (options: {tie_word_embeddings: false})"
        )
    rows = {name: len(plan.parameters(model)["weight"]) for name, (plan, model) in heads.items()}
    if len(set(rows.values())) > 1:
        told = ", ".join(f"{name} {count}" for name, count in rows.items())
        raise PairingError(
            f"{start}: heads must have equally many rows, so that a rank keeps the same of each; got {told}: set it to "
            "false, or resize one (options: {vocab_size: …})"
        )
    if whole_teachers and len(heads) > 1:
        raise PairingError(f"{start} needs sharded teachers too; leave train.shard_teacher out")
    outputs = heads["student"][0].outputs
    if not rows_of_rank(rows["student"], outputs, ranks, ranks - 1):
        raise PairingError(
            f"{start}: {outputs} tokens of {rows['student']} rows leave nothing for the last of {ranks} processes: set "
            "it to false, or start fewer"
        )


def few_tokens(inputs: Inputs) -> Inputs:
    """The first tokens of every row of named inputs ``[rows, tokens]``."""
    if isinstance(inputs, Tensor):
        return inputs
    return {name: value[:, :_TOKENS] for name, value in inputs.items()}


@torch.no_grad()
def head_error(model: nn.Module, plan: HeadPlan, inputs: Inputs) -> float:
    """The largest difference of the logits that ``plan`` gives from the model's own, in units of their largest."""
    from tutelage.engine.taps import Tapped
    from tutelage.engine.tracing import quiet

    inputs = few_tokens(inputs)
    with quiet(model):
        whole = Tapped(model)(inputs)["logits"][..., : plan.outputs].float()
        held = Tapped(model, head=plan)
        made = held.outputs(held(inputs)).logits.float()
    return float((whole - made).abs().max() / whole.abs().max().clamp(min=1e-12))
