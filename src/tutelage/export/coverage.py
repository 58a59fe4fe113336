"""How much of a model a quantisation reaches."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode


def shares(model: nn.Module, rows: Tensor, quantised: Collection[str]) -> dict[str, Any]:
    """Shares of parameters and FLOPs that lie in quantised layers.

    Args:
        quantised: paths of the layers in ``model``; others are passed over.

    Returns:
        ``parameters`` and ``flops`` between 0 and 1, and ``left``: paths of layers with weights that stay floats.
    """
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(rows[:1])
    root = type(model).__name__
    counts = {
        name.removeprefix(f"{root}."): sum(by_operation.values())
        for name, by_operation in counter.get_flop_counts().items()
        if name not in ("Global", root)
    }
    weights = {
        name: module
        for name, module in model.named_modules()
        if any(parameter is not None and parameter.dim() > 1 for parameter in module._parameters.values())
    }
    total = sum(parameter.numel() for parameter in model.parameters())
    reached = [name for name in weights if name in quantised]
    covered = {id(weights[name]): weights[name]._parameters["weight"].numel() for name in reached}
    flops = sum(counts.get(name, 0) for name in reached)
    return {
        "parameters": sum(covered.values()) / max(1, total),
        "flops": flops / max(1, counter.get_total_flops()),
        "left": [_short(name) for name in weights if name not in quantised],
    }


def _short(name: str) -> str:
    return name.removeprefix("model.") if name != "model" else "the model's own tables"
