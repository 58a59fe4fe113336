"""The rows of all ranks, for losses that couple rows: every rank then computes what one process would.

The gradient is exact too. Each rank evaluates the loss L of all rows and weighs it by its own share s_r of the step's
items, with Σ s_r = ranks. The gradient of a gathered tensor is summed over ranks on its way back, so that a rank's own
rows get Σ s_r ∂L/∂x = ranks · ∂L/∂x; a parameter of the method's own gets s_r ∂L/∂φ on each. The mean over ranks that
DDP and FSDP2 then take makes ∂L/∂θ of both.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from tutelage.engine.distributed import gather_rows
from tutelage.engine.spread import SpreadHead
from tutelage.engine.types import Batch, Outputs, first_tensor


class AllRows:
    """A micro-batch as all ranks hold it together, in rank order. Every rank must bring equally many rows.

    Attributes:
        batch: target, index, view, mask and columns of all rows. Inputs stay on their ranks: in their place is a
            tensor that has the rows and no values, and there are no further ``views``.
    """

    def __init__(self, batch: Batch) -> None:
        self.batch = gather_batch(batch)
        self._known: dict[int, tuple[Tensor, Tensor]] = {}

    def outputs(self, own: Outputs) -> Outputs:
        """A model's outputs for all rows; each tensor is exchanged when it is first read, and once."""
        return _Gathered(own, self._gather)

    def _gather(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            # The own tensor is kept beside the gathered one: so its id stays taken.
            if id(value) not in self._known:
                self._known[id(value)] = value, gather_rows(value)
            return self._known[id(value)][1]
        if dataclasses.is_dataclass(value) and not isinstance(value, type):  # TopK, Sampled
            parts = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
            return dataclasses.replace(value, **{name: self._gather(part) for name, part in parts.items()})
        return value


class _Gathered(Outputs):
    def __init__(self, own: Outputs, gather: Callable[[Any], Any]) -> None:
        # Losses that get the rows of all ranks would gather them once more for a spread head.
        super().__init__(head=own.head.whole() if isinstance(own.head, SpreadHead) else own.head)
        del self.hidden  # it is read lazily, as below
        self._own, self._gather = own, gather
        self.features = _Lazy(own.features, gather)
        self.attentions = _Lazy(own.attentions, gather)
        self.extra = _Lazy(own.extra, gather)

    @cached_property
    def hidden(self) -> Tensor | None:  # type: ignore[override]
        hidden: Tensor | None = self._gather(self._own.hidden)
        return hidden

    @property
    def stored_logits(self) -> Any:
        return self._gather(self._own.stored_logits)


class _Lazy(Mapping[str, Any]):
    """Tensors by name, each gathered when it is read."""

    def __init__(self, own: Mapping[str, Any], gather: Callable[[Any], Any]) -> None:
        self._own, self._gather = own, gather

    def __getitem__(self, name: str) -> Any:
        return self._gather(self._own[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self._own)

    def __len__(self) -> int:
        return len(self._own)


def gather_batch(batch: Batch) -> Batch:
    """See `AllRows`. What is small goes in one exchange, byte by byte."""
    named = {"target": batch.target, "index": batch.index, "view": batch.view, "mask": batch.mask}
    fields = {name: value for name, value in named.items() if value is not None}
    columns = {f"column {name}": value for name, value in batch.columns.items()}
    found = _exchange({**fields, **columns})
    inputs = first_tensor(batch.inputs)
    rows = (
        len(gather_rows(inputs.new_empty(len(inputs), 1))) if not found else len(next(iter(found.values())))
    )
    return Batch(
        inputs.new_empty(rows, 0),
        **{name: found[name] for name in fields},  # type: ignore[arg-type]
        columns={name: found[f"column {name}"] for name in batch.columns},
    )


def _exchange(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rows of all ranks of several tensors, without gradients."""
    if not tensors:
        return {}
    parts = [
        tensor.detach().reshape(len(tensor), -1).contiguous().view(torch.uint8) for tensor in tensors.values()
    ]
    whole = gather_rows(torch.cat(parts, dim=1))
    pieces = whole.split([part.shape[1] for part in parts], dim=1)
    return {
        name: piece.contiguous().view(tensor.dtype).view(len(whole), *tensor.shape[1:])
        for (name, tensor), piece in zip(tensors.items(), pieces, strict=True)
    }
