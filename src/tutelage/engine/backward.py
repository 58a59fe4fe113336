"""From terms to gradients: each term weighed by its share of the step's items, over micro-batches and ranks."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from tutelage.engine.distributed import average_gradients
from tutelage.engine.method import Method
from tutelage.engine.runtime import Runtime
from tutelage.engine.types import Batch, Term, Terms

Shares = dict[str, Tensor | float]


def item_shares(method: Method, batches: Sequence[Batch], runtime: Runtime) -> list[Shares]:
    """For each micro-batch, the share of the step's items of each kind that it holds, times the number of ranks (DDP
    averages over ranks). Known before the first forward, and without waiting for the device.

    Raises:
        ValueError: micro-batches that name different kinds of items.
    """
    counts = [method.count(batch) for batch in batches]
    kinds = list(counts[0])
    if any(list(count) != kinds for count in counts):
        raise ValueError(f"{type(method).__name__}.count names different kinds of items: {counts}")
    if len(batches) == 1 and runtime.world == 1:
        return [dict.fromkeys(kinds, 1.0)]
    device = batches[0].device
    table = torch.stack([torch.stack([_count(each[kind], device) for kind in kinds]) for each in counts])
    whole = runtime.sum(table.sum(0)).clamp(min=1)
    shares = (table * (runtime.world / whole)).float()
    return [dict(zip(kinds, row.unbind(), strict=True)) for row in shares]


def _count(value: Tensor | int, device: torch.device) -> Tensor:
    # A number is filled in on the device: a copy would wait for it.
    return (
        value.to(device).double()
        if isinstance(value, Tensor)
        else torch.full((), value, device=device).double()
    )


def weighed(terms: Terms, shares: Shares, method: Method) -> dict[str, Tensor]:
    """Each term's mean times its share.

    Raises:
        ValueError: a term over items that ``count`` does not name.
        TypeError: something else than a dict of `Term`.
    """
    who = type(method).__name__
    if not isinstance(terms, dict) or not all(isinstance(term, Term) for term in terms.values()):
        raise TypeError(f"{who} returned {type(terms).__name__}; a step returns a dict of Term by name")
    for name, term in terms.items():
        if term.items not in shares:
            raise ValueError(
                f"{who}: term {name!r} is a mean over {term.items!r}; count names {list(shares)}"
            )
    return {name: _times(term.mean, shares[term.items]) for name, term in terms.items()}


def _times(mean: Tensor, share: Tensor | float) -> Tensor:
    whole = isinstance(share, float) and share == 1.0  # spares a forward and a backward of nothing
    return mean if whole else mean * share


class Gradients:
    """Runs backwards over the micro-batches of one step and leaves gradients in ``.grad``.

    Where the method has ``combine_gradients``, every term has a backward of its own; its gradient is averaged over
    ranks before the method sees it.
    """

    def __init__(
        self,
        wrapped: nn.Module,
        method: Method,
        parameters: Sequence[nn.Parameter],
        scaler: torch.amp.GradScaler | None = None,
    ) -> None:
        self.wrapped, self.method, self.parameters, self.scaler = wrapped, method, list(parameters), scaler
        self._terms: dict[str, list[Tensor | None]] = {}

    def backward(self, terms: dict[str, Tensor]) -> None:
        """Backward of one micro-batch."""
        with_graph = {name: term for name, term in terms.items() if term.requires_grad}
        if not with_graph:
            raise ValueError(f"no term reaches a trainable parameter (terms: {', '.join(terms) or 'none'})")
        if self.method.combine_gradients is None:
            self._scaled(functools.reduce(torch.add, with_graph.values())).backward()
            return
        last = list(with_graph)[-1]
        for name, term in with_graph.items():
            self._scaled(term).backward(retain_graph=name != last)
            self._collect(name)

    def _scaled(self, loss: Tensor) -> Tensor:
        scaled: Tensor = self.scaler.scale(loss) if self.scaler else loss
        return scaled

    def sync(self, last: bool) -> contextlib.AbstractContextManager[None]:
        """Ranks exchange gradients once a step, in the last backward; never where terms are kept apart."""
        if isinstance(self.wrapped, DistributedDataParallel) and (not last or self.method.combine_gradients):
            context: contextlib.AbstractContextManager[None] = self.wrapped.no_sync()
            return context
        return contextlib.nullcontext()

    def finish(self) -> None:
        """After the last micro-batch: combine the terms' gradients, where the method wants that."""
        if self.method.combine_gradients is None:
            return
        for gradients in self._terms.values():
            self._fill_missing(gradients)
            average_gradients(gradients)
        combined = self.method.combine_gradients(self._terms)
        if len(combined) != len(self.parameters):
            raise ValueError(
                f"{type(self.method).__name__}.combine_gradients returned {len(combined)} gradients for "
                f"{len(self.parameters)} trained parameters"
            )
        for parameter, gradient in zip(self.parameters, combined, strict=True):
            parameter.grad = gradient
        self._terms = {}

    def _collect(self, name: str) -> None:
        fresh = [parameter.grad for parameter in self.parameters]
        for parameter in self.parameters:
            parameter.grad = None
        before = self._terms.get(name, [None] * len(fresh))
        self._terms[name] = [_plus(old, new) for old, new in zip(before, fresh, strict=True)]

    def _fill_missing(self, gradients: list[Tensor | None]) -> None:
        """A gradient that only some ranks have would upset the exchange."""
        if isinstance(self.wrapped, DistributedDataParallel):
            for i, parameter in enumerate(self.parameters):
                if gradients[i] is None:
                    gradients[i] = torch.zeros_like(parameter)


def _plus(old: Tensor | None, new: Tensor | None) -> Tensor | None:
    if old is None or new is None:
        return new if old is None else old
    return old + new
