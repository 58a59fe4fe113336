"""torch.compile by region: the largest modules that have no tap strictly inside.

A hook inside a compiled region is silently skipped, so no region may have one; hooks on the region itself stay outside.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from types import FunctionType
from typing import Any

import torch
from torch import nn

from tutelage.engine.patterns import INPUT, runs

Backend = str | Callable[..., Any]


def compile_regions(model: nn.Module, taps: Sequence[str], backend: Backend = "inductor") -> int:
    """Replace ``forward`` of each region by its compiled form; what was compiled before is undone first.

    Regions are modules with parameters and children of their own, no two nested, none with a tap strictly inside.
    Single layers between them stay eager. Parameters, names and state dicts do not change. Regions that print alike
    (the blocks of a transformer) share their graphs.

    Args:
        taps: resolved paths, ``:in`` or not.
        backend: as torch.compile takes it.

    Returns:
        How many regions there are.
    """
    uncompile(model)
    tapped = [tap.removesuffix(INPUT) for tap in taps]
    forwards: dict[tuple[type, str], FunctionType] = {}
    count = 0
    for module in _regions(model, "", tapped):
        if not _is_compiled(module):  # a shared module comes up twice
            forward = forwards.setdefault((type(module), repr(module)), _own_code(type(module).forward))
            module.forward = _CompiledForward(module, forward, backend)
            count += 1
    return count


def uncompile(model: nn.Module) -> None:
    """Give every module its own ``forward`` back."""
    for module in model.modules():
        if _is_compiled(module):
            del module.__dict__["forward"]


@contextlib.contextmanager
def eager(model: nn.Module) -> Iterator[None]:
    """Run the block without the compiled regions; they are put back."""
    compiled = [(module, module.__dict__["forward"]) for module in model.modules() if _is_compiled(module)]
    uncompile(model)
    try:
        yield
    finally:
        for module, forward in compiled:
            module.forward = forward


def _regions(module: nn.Module, path: str, tapped: list[str]) -> Iterator[nn.Module]:
    prefix = f"{path}." if path else ""
    inside = any(tap.startswith(prefix) and tap != path for tap in tapped)
    composed = any(True for _ in module.children()) and any(True for _ in module.parameters())
    plain = isinstance(type(module).forward, FunctionType) and "forward" not in module.__dict__
    if composed and plain and runs(module) and not inside:
        yield module
        return
    for name, child in module.named_children():
        yield from _regions(child, prefix + name, tapped)


def _own_code(forward: Callable[..., Any]) -> FunctionType:
    """The same function behind a code object of its own. torch keeps graphs by code object and gives up after eight;
    all ``Sequential`` of all models would count together."""

    def run(self: nn.Module, *args: Any, **keywords: Any) -> Any:
        return forward(self, *args, **keywords)

    assert isinstance(run, FunctionType)
    return FunctionType(run.__code__.replace(), run.__globals__, run.__name__, None, run.__closure__)


def _is_compiled(module: nn.Module) -> bool:
    return isinstance(module.__dict__.get("forward"), _CompiledForward)


class _CompiledForward:
    """The compiled forward of one module. A deep copy of the module gets one of its own: torch's would run the weights
    of the module it was copied from."""

    def __init__(self, module: nn.Module, forward: FunctionType, backend: Backend) -> None:
        self.module, self.forward, self.backend = module, forward, backend
        self.run = torch.compile(forward.__get__(module), backend=backend)

    def __call__(self, *args: Any, **keywords: Any) -> Any:
        return self.run(*args, **keywords)

    def __deepcopy__(self, memo: dict[int, Any]) -> _CompiledForward:
        return _CompiledForward(memo[id(self.module)], self.forward, self.backend)
