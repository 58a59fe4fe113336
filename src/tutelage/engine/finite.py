"""Stops a run whose loss or gradient is not finite, before the weights take it up."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

GRADIENT = "gradient"


class NonFiniteError(RuntimeError):
    """A term of the loss, or the gradient, is NaN or infinite.

    Attributes:
        step: optimiser steps done when it happened; the weights are those after them.
        term: name of the first such term, or ``"gradient"``.
    """

    def __init__(self, step: int, term: str, value: float | None = None, context: str = "") -> None:
        what = "the gradient" if term == GRADIENT else f"the term {term!r}"
        shown = "not finite" if value is None else f"{value:g}"
        where = context or (
            "look for such values in inputs, targets and teacher outputs, lower train.optimizer.lr or set train.clip"
        )
        super().__init__(f"step {step}: {what} is {shown}; the weights are those before this step ({where})")
        self.step = step
        self.term = term


def check_terms(terms: Mapping[str, Tensor], step: int, context: Callable[[], str] = str) -> None:
    """Raise at the first value that is not finite. Waits for the device.

    Args:
        terms: values by name, of any shape.
        context: asked only once something is wrong; where it came from, in words.

    Raises:
        NonFiniteError: names step, term and value.
    """
    bad = _not_finite(list(terms.values())).tolist()
    if any(bad):
        name = list(terms)[bad.index(True)]
        value = terms[name].detach()
        raise NonFiniteError(step, name, float(value[~torch.isfinite(value)][0]), context())


class _Reading(NamedTuple):
    step: int
    names: tuple[str, ...]
    bad: Tensor
    ready: Callable[[], bool]
    wait: Callable[[], object]


class FiniteGuard:
    """Looks at each step's terms and gradient norm before the optimisers move.

    On the CPU it raises at once. On an accelerator nothing waits for the device: a flag there, once set, masks every
    later update of the optimisers whose fused implementation reads ``found_inf`` (fused SGD, Adam, AdamW),
    and its copy is read when it has arrived, so the error comes a few steps later with weights and optimiser state as
    they were before the bad step. Where an optimiser cannot be masked, every step waits for its flag.
    Before a checkpoint is written, and at the end, call ``poll(wait=True)``.

    Where several processes train together, each must see the same flag: hand in values that are averaged over them.

    Args:
        optimizers: those that move.
        immediate: raise within ``inspect``; left out, so it is on the CPU.
    """

    def __init__(
        self,
        device: torch.device,
        optimizers: Iterable[torch.optim.Optimizer],
        *,
        immediate: bool | None = None,
    ) -> None:
        self.immediate = device.type == "cpu" if immediate is None else immediate
        self._stop = torch.zeros((), device=device)
        self._pending: deque[_Reading] = deque()
        self._blind = False
        if self.immediate:
            return
        for optimizer in optimizers:
            if getattr(optimizer, "_step_supports_amp_scaling", False):
                optimizer.register_step_pre_hook(self._mask)
            else:
                self._blind = True

    def inspect(
        self,
        step: int,
        named_values: Mapping[str, Tensor],
        grad_norm: Tensor,
        context: Callable[[], str] = str,
    ) -> Tensor:
        """Look at a step between backward and update.

        Args:
            context: as in `check_terms`; asked on the CPU only, where the step is still at hand.

        Returns:
            A float scalar on the device: 1 once anything was not finite, and from then on.

        Raises:
            NonFiniteError: at once on the CPU or where an optimiser cannot be masked, else for an earlier step.
        """
        values = {**named_values, GRADIENT: grad_norm}
        if self.immediate:
            check_terms(values, step, context)
            return self._stop
        bad = _not_finite(list(values.values()))
        self._stop.copy_(torch.maximum(self._stop, bad.any()))
        self._pending.append(_read_later(step, tuple(values), bad))
        self.poll(wait=self._blind)
        return self._stop

    def poll(self, *, wait: bool = False) -> None:
        """Read the flags that have arrived; with ``wait``, all of them.

        Raises:
            NonFiniteError: names the first bad step and its first bad term.
        """
        while self._pending and (wait or self._pending[0].ready()):
            reading = self._pending.popleft()
            reading.wait()
            bad = reading.bad.tolist()
            if any(bad):
                raise NonFiniteError(reading.step, reading.names[bad.index(True)])

    def _mask(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        # A loss scaler has set a flag of its own just before; either of them stops the update.
        other = getattr(optimizer, "found_inf", None)
        flag = self._stop if other is None or other is self._stop else torch.maximum(other, self._stop)
        optimizer.found_inf = flag  # type: ignore[attr-defined]


def _not_finite(values: list[Tensor]) -> Tensor:
    values = [value.detach() for value in values]
    if all(value.dim() == 0 and value.dtype == values[0].dtype for value in values):
        return ~torch.isfinite(torch.stack(values))  # one look at all of them
    return torch.stack([~torch.isfinite(value).all() for value in values])


def _read_later(step: int, names: tuple[str, ...], bad: Tensor) -> _Reading:
    if bad.device.type not in ("cuda", "xpu"):
        return _Reading(step, names, bad.cpu(), lambda: True, lambda: None)
    host = torch.empty(bad.shape, dtype=bad.dtype, pin_memory=True)
    host.copy_(bad, non_blocking=True)
    event = torch.Event(bad.device)
    event.record()
    return _Reading(step, names, host, event.query, event.synchronize)
