"""Parameter groups: who decays, and how much of the learning rate a layer gets."""

from __future__ import annotations

import re
from collections.abc import Mapping
from itertools import groupby
from typing import Any

from torch import nn

from tutelage.recipe.schema import OptimizerConfig

_BLOCK = re.compile(r"(.*?\.)?\d+(?=\.)")


def parameter_groups(
    parameters: Mapping[str, nn.Parameter],
    config: OptimizerConfig,
    *,
    decays: bool,
    student: nn.Module | None = None,
) -> list[tuple[list[str], dict[str, Any]]]:
    """Names and options of each group, in the order of the parameters.

    Without ``decay_norms``, biases and parameters of one dimension have no weight decay. With ``layer_decay`` d, a
    parameter of layer i of L has the rate lr · d^(L−1−i) (BEiT, arXiv 2106.08254, section A); what is not the
    student's has the full rate.

    Args:
        decays: the optimiser knows ``weight_decay``.
        student: where it (or a module in it) has timm's ``group_matcher``, that says what a layer is.
    """
    depths = layer_depths(parameters, student) if config.layer_decay is not None else {}
    top = max(depths.values(), default=0)
    groups: dict[tuple[bool, int], list[str]] = {}
    for name, parameter in parameters.items():
        decayed = config.decay_norms or not (parameter.dim() <= 1 or name.endswith(".bias"))
        groups.setdefault((decayed, depths.get(name, top)), []).append(name)
    return [
        (
            names,
            {"lr": config.lr * (config.layer_decay or 1.0) ** (top - depth)}
            | _decay(config, decayed, decays),
        )
        for (decayed, depth), names in groups.items()
    ]


def layer_depths(parameters: Mapping[str, nn.Parameter], student: nn.Module | None = None) -> dict[str, int]:
    """Layer of each of the student's parameters (names ``student.…``), 0 next to the input.

    Without a ``group_matcher`` a layer is a numbered block (``layer1.0``, ``blocks.3``) in the order of the parameters;
    what lies before, between and after the blocks is one layer each.
    """
    names = [name for name in parameters if name.startswith("student.")]
    matched = _timm_layers(student) if student is not None else {}
    if matched:
        top = max(matched.values())
        return {name: matched.get(id(parameters[name]), top) for name in names}
    layers = groupby(names, key=_block)
    return {name: depth for depth, (_, layer) in enumerate(layers) for name in layer}


def _decay(config: OptimizerConfig, decayed: bool, known: bool) -> dict[str, float]:
    return {"weight_decay": config.weight_decay if decayed else 0.0} if known else {}


def _block(name: str) -> str:
    found = _BLOCK.match(name)
    return found[0] if found else ""


def _timm_layers(student: nn.Module) -> dict[int, int]:
    """id of a parameter → layer, by timm's own grouping; empty for other models."""
    model: Any = next((module for module in student.modules() if hasattr(module, "group_matcher")), None)
    if model is None:
        return {}
    from timm.models import group_parameters

    layers: dict[str, int] = group_parameters(model, model.group_matcher(coarse=False), reverse=True)
    return {id(parameter): layers[name] for name, parameter in model.named_parameters() if name in layers}
