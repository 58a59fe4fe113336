"""Where a causal model of transformers makes its logits."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from tutelage.engine.calling import call_model
from tutelage.engine.heads import HeadPlan, head_error
from tutelage.engine.tracing import quiet
from tutelage.engine.types import Inputs
from tutelage.models.names import ModelError

_TOLERANCE = 1e-4
"""How far logits may be apart, as a share of the largest: products in half precision differ so much."""
_HALF = 2e-2
_PROBE = 8
"""Tokens of a document of the packing check."""


def language_head(name: str, module: nn.Module, tokens: int, inputs: Inputs) -> HeadPlan:
    """The head of a causal model, cut to the tokeniser's ``tokens``: rows beyond only pad the vocabulary.

    What its configuration says of soft caps and scales is held against the model's own logits for ``inputs``.

    Args:
        name: what messages call the model.
        inputs: a few rows as the model gets them.

    Raises:
        ModelError: the model has no linear head, fewer rows in it than there are tokens, or makes its logits in a way
            that is not known here.
    """
    model: Any = module
    found = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    path = next((path for path, each in module.named_modules() if each is found), None)
    if found is None or path is None:
        raise ModelError(f"{name} is a {type(module).__name__}, which has no linear head over a vocabulary")
    if len(found.weight) < tokens:
        raise ModelError(
            f"{name} has a vocabulary of {len(found.weight)}, the tokeniser has {tokens} tokens; give the tokeniser "
            "that belongs to it (data.tokenizer)"
        )
    config = getattr(model, "config", None)
    division = getattr(config, "logits_scaling", None)
    scale = getattr(config, "logit_scale", None) or (1 / division if division else 1.0)
    plan = HeadPlan(path, tokens, getattr(config, "final_logit_softcapping", None), float(scale))
    error = head_error(module, plan, inputs)
    allowed = _TOLERANCE if found.weight.itemsize > 2 else _HALF
    if not error <= allowed:
        raise ModelError(
            f"{name}: the logits of {type(module).__name__} are not its head's output (they differ by {error:.2g} of "
            "the largest): it changes them in a way that is not known here; take another model, or tell us of this one"
        )
    return plan


@torch.no_grad()
def check_packing(name: str, module: nn.Module, inputs: Inputs) -> None:
    """Let the model show that a document of a packed row is as it would be alone, told by its positions.

    Args:
        inputs: a few rows as the model gets them: token ids and positions.

    Raises:
        ModelError: documents of one row reach one another.
    """
    assert isinstance(inputs, dict)
    ids = inputs["input_ids"][:1, :_PROBE]
    alone = {"input_ids": ids, "position_ids": torch.arange(ids.shape[1], device=ids.device)[None]}
    # Two rows: an attention may tell documents apart in a batch of one alone.
    twice = {key: value.repeat(2, 2) for key, value in alone.items()}
    with quiet(module):
        apart, packed = (call_model(module, given).logits.float() for given in (alone, twice))
    error = float((packed[:, ids.shape[1] :] - apart).abs().max() / apart.abs().max().clamp(min=1e-12))
    allowed = _TOLERANCE if next(module.parameters()).itemsize > 2 else _HALF
    if not error <= allowed:
        raise ModelError(
            f"{name}: documents that share a row reach one another in {type(module).__name__} (logits differ by "
            f"{error:.2g} of the largest): it does not tell them by their positions; set data.packing=none"
        )
