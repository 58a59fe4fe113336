"""Where a value that is not finite came from. Looked at only once a run has failed."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

if TYPE_CHECKING:
    from tutelage.engine.step import Step


def describe(ctx: Step, terms: dict[str, Tensor]) -> str:
    """Which of inputs, targets and model outputs of the last micro-batch are not finite, and in which rows. All ranks
    ask together and get one answer."""
    places = {
        "inputs": ctx.batch.inputs,
        "target": ctx.batch.target,
        "teacher inputs": ctx.batch.teacher_inputs,
    }
    for name, outputs in ctx.seen.items():
        places[f"{name} logits"] = outputs.stored_logits  # type: ignore[assignment]
        places |= {f"{name} tap {path}": value for path, value in outputs.features.items()}
    mine = [f"{place} (rows {rows})" for place, value in places.items() if (rows := _bad_rows(value, ctx))]
    found = list(dict.fromkeys(place for each in ctx.setup.runtime.gather_objects(mine) for place in each))
    values = ", ".join(f"{name}={float(term):g}" for name, term in terms.items())
    if not found:
        return (
            f"terms: {values}; inputs and outputs are finite, so lower train.optimizer.lr or set train.clip"
        )
    return f"terms: {values}; not finite: {'; '.join(found)}"


def _bad_rows(value: object, ctx: Step) -> str:
    rows: set[int] = set()
    for leaf in pytree.tree_leaves(value):
        if isinstance(leaf, Tensor) and leaf.is_floating_point() and leaf.dim() > 0:
            bad = (
                ~torch.isfinite(leaf.detach()).flatten(1).all(1) if leaf.dim() > 1 else ~torch.isfinite(leaf)
            )
            rows |= set(bad.nonzero().flatten().tolist())
    index = ctx.batch.index
    named = sorted(int(index[row]) if index is not None and row < len(index) else row for row in rows)
    return ", ".join(map(str, named[:5])) + (" …" if len(named) > 5 else "")
