"""A model cut in two at a module of its trunk, both parts with the model's own weights."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from tutelage.engine.taps import TapError, Tapped, list_taps
from tutelage.engine.tracing import quiet
from tutelage.models.names import ModelError


class Lower(nn.Module):
    """From the inputs to the output of the module at ``path``."""

    def __init__(self, model: nn.Module, path: str) -> None:
        super().__init__()
        self.tapped, self.path = Tapped(model), path

    def forward(self, inputs: Tensor) -> Tensor:
        found: dict[str, Tensor] = self.tapped(inputs, (self.path,), logits=False)
        return found[f"tap:{self.path}"]


class Upper(nn.Module):
    """From the output of the module at ``path`` to the logits.

    Attributes:
        tapped: the model with every module up to ``path`` passed over; weights are shared with it, not copied.
        stem: shape of a row of its inputs where the model's start still runs, on zeros, since what it adds
            (positions, a class token) is replaced at ``path``; none where the hidden state itself passes through.
    """

    def __init__(self, model: nn.Module, path: str, stem: tuple[int, ...] | None) -> None:
        super().__init__()
        self.tapped, self.path, self.stem = Tapped(model), path, stem

    def forward(self, hidden: Tensor) -> Tensor:
        if self.stem is None:
            result: dict[str, Tensor] = self.tapped(hidden)
        else:
            result = self.tapped(hidden.new_zeros(len(hidden), *self.stem), feed=(self.path, hidden))
        return result["logits"]


def split(module: nn.Module, path: str, inputs: Tensor) -> tuple[Lower, Upper]:
    """Cut a model with a sequential trunk after the module at ``path``.

    Both parts share the model's parameters. ``upper(lower(x))`` is compared with ``model(x)`` on ``inputs``, bit for
    bit, before they are handed out: a model whose hidden state goes around the cut is never split silently wrong.

    Args:
        inputs: a few rows, as the model gets them; the model is left as it was.

    Raises:
        ModelError: the model cannot be split there (a skip around the cut, several inputs).
        TapError: there is no such module.
    """
    lower = Lower(module, path)
    order = [info.path for info in list_taps(module, inputs)]
    if path not in order:
        lower(inputs)  # raises, and names the near ones
    before = set(order[: order.index(path) + 1])
    reasons: list[str] = []
    for stem in (None, tuple(inputs.shape[1:])):
        moving = _statistics_below(module, path, before) if stem is not None else None
        if moving is not None:
            reasons.append(f"{moving} below the cut would take its statistics from zeros")
            continue
        upper = Upper(_passed_over(module, path, before, keep_start=stem is not None), path, stem)
        try:
            with quiet(module), quiet(upper):
                same = torch.equal(upper(lower(inputs)), Tapped(module)(inputs)["logits"])
        except (RuntimeError, TypeError, ValueError, IndexError, AttributeError) as error:
            reasons.append(str(error).splitlines()[0])
            continue
        if same:
            return lower, upper
        reasons.append("what is above the cut also reads what is below it")
    raise ModelError(
        f"{type(module).__name__} cannot be split at {path!r}: {'; '.join(dict.fromkeys(reasons))}"
    )


def _statistics_below(module: nn.Module, path: str, before: set[str]) -> str | None:
    """A module below the cut whose statistics move in training; the blocks beside ``path`` are passed over."""
    beside = path.rpartition(".")[0]
    for name, child in module.named_modules():
        kept = name in before and not (beside and name.startswith(f"{beside}."))
        if kept and isinstance(child, _BatchNorm):
            return str(name)
    return None


class _Pass(nn.Module):
    def forward(self, hidden: Any, *args: Any, **keywords: Any) -> Any:
        return hidden


def _passed_over(
    module: nn.Module, path: str, before: set[str], *, keep_start: bool, prefix: str = ""
) -> nn.Module:
    """A shallow copy in which what fires before ``path`` is passed over; with ``keep_start`` only the modules of the
    same class beside those on the path, so that the model's start still runs."""
    clone = copy.copy(module)
    clone._modules = dict(module._modules)
    name, _, rest = path.partition(".")
    for other, child in module._modules.items():
        alike = not keep_start or type(child) is type(module._modules[name])
        if child is not None and other != name and prefix + other in before and alike:
            clone._modules[other] = _Pass()
    if rest:
        inner = module._modules[name]
        assert inner is not None
        clone._modules[name] = _passed_over(
            inner, rest, before, keep_start=keep_start, prefix=f"{prefix}{name}."
        )
    elif not keep_start:
        clone._modules[name] = _Pass()
    return clone


__all__ = ["Lower", "TapError", "Upper", "split"]
