"""From what a user writes to module paths: wildcards, negative positions, ``:in``; near names where nothing fits."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from fnmatch import fnmatchcase

from torch import nn

from tutelage.engine.calling import TapError

INPUT = ":in"
"""Suffix of a tap that wants a module's input instead of its output."""

_NEGATIVE = re.compile(r"-[1-9]\d*")


def resolve_taps(
    model: nn.Module, patterns: Sequence[str], *, stages: Sequence[str] | None = None, head: str | None = None
) -> tuple[str, ...]:
    """Module paths (with ``:in`` where the input is wanted) that the patterns name, in module order, none twice.

    A pattern is a path such as ``layer3.1.conv2``. A segment may hold wildcards (``layer*.1``), be ``**`` (any number
    of segments) or a negative position among its parent's children (``layer3.-1``). A bare ``-1`` is the last of
    ``stages``. ``head:in`` is the input of the classifier, whatever its name.

    Args:
        stages: the model's stages, for bare negative positions; `ModelSpec.resolve` gives them.
        head: path of the classifier, for ``head:in``; `ModelSpec.resolve` gives it.

    Raises:
        TapError: a pattern names no module, or one that never runs; the near paths are listed.
    """
    order: dict[str, int] = {}
    for number, (path, _) in enumerate(model.named_modules(remove_duplicate=False)):
        order.setdefault(path, number)
    found: set[tuple[int, bool, str]] = set()
    for pattern in patterns:
        wanted, is_input = pattern.removesuffix(INPUT), pattern.endswith(INPUT)
        if _NEGATIVE.fullmatch(wanted):
            paths = [_stage(wanted, stages)]
        elif pattern == f"head{INPUT}" and head is not None:
            paths = [head]
        else:
            paths = _match(model, wanted, pattern, order)
        found |= {(order[path], not is_input, path + INPUT * is_input) for path in paths}
    return tuple(tap for _, _, tap in sorted(found))


def near_paths(model: nn.Module, wanted: str, count: int = 8) -> list[str]:
    """Module paths that are spelt alike, or end alike."""
    paths = [path for path, _ in model.named_modules(remove_duplicate=False) if path]
    near = difflib.get_close_matches(wanted, paths, n=count, cutoff=0.6)
    last = wanted.rpartition(".")[2]
    near += [path for path in paths if path.rpartition(".")[2] == last]
    parent = wanted.rpartition(".")[0]
    near += [path for path in paths if path.rpartition(".")[0] == parent]
    return list(dict.fromkeys(near))[:count]


def runs(module: nn.Module) -> bool:
    """Whether a module has a forward of its own; a ModuleList is only a shelf."""
    return type(module).forward is not nn.Module.forward


def _stage(wanted: str, stages: Sequence[str] | None) -> str:
    if stages is None:
        raise TapError(
            f"tap {wanted!r} counts a model's stages, which a forward has to show; use ModelSpec.resolve"
        )
    if -int(wanted) > len(stages):
        raise TapError(f"tap {wanted!r}: the model has {len(stages)} stages ({', '.join(stages) or 'none'})")
    return stages[int(wanted)]


def _match(model: nn.Module, wanted: str, pattern: str, order: dict[str, int]) -> list[str]:
    if not wanted:
        raise TapError(
            f"tap {pattern!r} is empty; write a module path such as {', '.join(near_paths(model, '', 3))}"
        )
    if wanted in order:
        module = model.get_submodule(wanted)
        if runs(module):
            return [wanted]
        inner = ", ".join(f"{wanted}.{name}" for name, _ in module.named_children())
        raise TapError(
            f"tap {pattern!r} is a {type(module).__name__}, which never runs; tap what it holds: {inner}"
        )
    segments = tuple(wanted.split("."))
    found = [path for path, module in _descend("", model, segments) if path and runs(module)]
    if not found:
        near = ", ".join(near_paths(model, wanted)) or "none"
        raise TapError(f"tap {pattern!r} names no module of this {type(model).__name__}; near: {near}")
    return found


def _descend(path: str, module: nn.Module, segments: tuple[str, ...]) -> list[tuple[str, nn.Module]]:
    if not segments:
        return [(path, module)]
    segment, rest = segments[0], segments[1:]
    children = [
        (f"{path}.{name}" if path else name, name, child)
        for name, child in module._modules.items()
        if child is not None
    ]
    if segment == "**":
        here = _descend(path, module, rest)
        return here + [hit for inner, _, child in children for hit in _descend(inner, child, segments)]
    if _NEGATIVE.fullmatch(segment):
        children = [children[int(segment)]] if -int(segment) <= len(children) else []
    else:
        children = [entry for entry in children if fnmatchcase(entry[1], segment)]
    return [hit for inner, _, child in children for hit in _descend(inner, child, rest)]
