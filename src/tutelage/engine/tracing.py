"""One watched forward: which modules run, in which order, and what they take and give. The model is left as it was."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from tutelage.engine.calling import call_model, first_tensor_in, named_outputs
from tutelage.engine.rng import preserved
from tutelage.engine.types import Inputs, first_tensor

Shape = tuple[int, ...]


class TapInfo(NamedTuple):
    """A module that can be tapped.

    Attributes:
        path: where it is in the model.
        kind: its class.
        shape: of the tensor it gives, the row axis left out; none where the first axis is not the row.
        depth: share of the forward's module calls that are done when it fires, in (0, 1].
    """

    path: str
    kind: str
    shape: Shape | None
    depth: float


@dataclass
class Call:
    """A module's first run in a forward. Shapes are whole, with the row axis."""

    path: str
    module: nn.Module
    taken: Shape | None = None
    given: Shape | None = None
    storage: int = 0
    position: int = 0
    """The how-manieth module call it was to end, from 1; 0: it has not ended."""


@dataclass
class Trace:
    """What a watched forward showed. ``calls`` are in firing order."""

    rows: int
    calls: list[Call] = field(default_factory=list)
    total: int = 0
    logits: Shape | None = None
    logits_storage: int = 0

    def shape(self, whole: Shape | None) -> Shape | None:
        """A tensor's shape without its row axis; none where its first axis is not the row."""
        return whole[1:] if whole and whole[0] == self.rows else None

    def taps(self) -> list[TapInfo]:
        """Every module that gave a tensor, in firing order; the model itself left out."""
        return [
            TapInfo(call.path, type(call.module).__name__, self.shape(call.given), call.position / self.total)
            for call in self.calls
            if call.path and call.given is not None
        ]


@contextlib.contextmanager
def quiet(model: nn.Module) -> Iterator[None]:
    """Run the block in eval mode and without gradients; modes, buffers and global generators are put back."""
    training = {module: module.training for module in model.modules()}
    buffers = [
        (module, name, buffer, buffer.clone())
        for module in model.modules()
        for name, buffer in module._buffers.items()
        if buffer is not None
    ]
    model.eval()
    try:
        with preserved(), torch.no_grad():
            yield
    finally:
        for module, name, buffer, before in buffers:
            module._buffers[name] = buffer
            if not torch.equal(buffer, before):
                with torch.no_grad():
                    buffer.copy_(before)
        for module, mode in training.items():
            module.training = mode


def trace(model: nn.Module, inputs: Inputs) -> Trace:
    """Run the model once on ``inputs``, in eval mode, and say what ran. A module that runs several times is seen at its
    first run; one that has several paths is seen under the first."""
    seen = Trace(rows=len(first_tensor(inputs)))
    calls: dict[nn.Module, Call] = {}

    def before(path: str, module: nn.Module, args: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        if module not in calls:
            taken = first_tensor_in((*args, *keywords.values()))
            calls[module] = Call(path, module, taken=None if taken is None else tuple(taken.shape))

    def after(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        seen.total += 1
        call = calls[module]
        if call.position == 0:
            given = first_tensor_in(output)
            call.position = seen.total
            if given is not None:
                call.given, call.storage = tuple(given.shape), _storage(given)

    handles = []
    try:
        for path, module in model.named_modules():
            handles.append(module.register_forward_pre_hook(partial(before, path), with_kwargs=True))
            handles.append(module.register_forward_hook(after))
        with quiet(model):
            output = call_model(model, inputs)
    finally:
        for handle in handles:
            handle.remove()
    logits = named_outputs(output).get("logits")
    if logits is not None:
        seen.logits, seen.logits_storage = tuple(logits.shape), _storage(logits)
    seen.calls = sorted((call for call in calls.values() if call.position), key=lambda call: call.position)
    return seen


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
