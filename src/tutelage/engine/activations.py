"""Activation checkpointing: a block's inner tensors are computed again in the backward pass instead of kept."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

from tutelage.engine.structure import find_blocks
from tutelage.engine.tracing import trace
from tutelage.engine.types import Inputs


def checkpoint_activations(model: nn.Module, inputs: Inputs) -> int:
    """Let every block of a model keep its inputs alone for the backward pass (Chen et al., arXiv 1604.06174).

    Blocks are those that `find_blocks` finds: a transformer's layers, a convolutional net's blocks. Their ``forward``
    alone is replaced, so paths and state dicts stay as they are, and hooks on a block run once. Hooks inside it would
    run again in the backward pass; those of `Tapped` are gone by then, and what they took is kept. In eval mode and
    without gradients blocks run as before.

    Args:
        inputs: a few rows, as the model gets them; used once, to find the blocks.

    Returns:
        How many blocks there are.

    Raises:
        ValueError: the model has no blocks.
    """
    keep_activations(model)  # an earlier trainer may have had it
    found = find_blocks(trace(model, inputs))
    if not found:
        raise ValueError(
            f"{type(model).__name__} has no blocks whose activations could be computed again; set "
            "train.activation_checkpointing=false"
        )
    for call in found:
        call.module.forward = _Recomputed(call.module, call.module.forward)
    return len(found)


def keep_activations(model: nn.Module) -> None:
    """Give every block its own ``forward`` back."""
    for module in model.modules():
        if isinstance(module.__dict__.get("forward"), _Recomputed):
            del module.__dict__["forward"]


class _Recomputed:
    """The checkpointed forward of one block. A deep copy of the block gets one of its own."""

    def __init__(self, module: nn.Module, forward: Callable[..., Any]) -> None:
        self.module, self.forward = module, forward

    def __call__(self, *args: Any, **keywords: Any) -> Any:
        if not (self.module.training and torch.is_grad_enabled()):
            return self.forward(*args, **keywords)
        return checkpoint(self.forward, *args, use_reentrant=False, context_fn=self._contexts, **keywords)

    def _contexts(self) -> tuple[Any, Any]:
        return contextlib.nullcontext(), _statistics_kept(self.module)

    def __deepcopy__(self, memo: dict[int, Any]) -> _Recomputed:
        module = memo[id(self.module)]
        return _Recomputed(module, type(module).forward.__get__(module))


@contextlib.contextmanager
def _statistics_kept(module: nn.Module) -> Iterator[None]:
    """Run the block without moving BatchNorm's running statistics: the first forward has moved them already."""
    norms = [each for each in module.modules() if isinstance(each, _BatchNorm) and each.track_running_stats]
    before = [(norm.momentum, norm.num_batches_tracked) for norm in norms]
    for norm in norms:
        # Not without statistics: the same tensors must be kept again, and those are among them.
        norm.momentum, norm.num_batches_tracked = 0.0, None
    try:
        yield
    finally:
        for norm, (momentum, counted) in zip(norms, before, strict=True):
            norm.momentum, norm.num_batches_tracked = momentum, counted
