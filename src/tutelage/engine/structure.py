"""What a watched forward says about a model's build: its stages, its classifier, and which depths match."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import nn

from tutelage.engine.patterns import runs
from tutelage.engine.tracing import Call, Shape, TapInfo, Trace

MANY = 5
"""Above so many members, stages are told apart by their resolution."""

_PASSIVE = ("Identity", "Drop", "Pool")


def find_stages(seen: Trace) -> tuple[str, ...]:
    """Paths of the model's stages, in firing order.

    The trunk is the level of the module tree where the model first falls into several blocks (modules with at least
    two weight layers): resnet's ``layer1..layer4``, a transformer's ``blocks.N``. Where there are more than five and
    their resolution changes, the last block of each resolution stands for it. A model without blocks (a plain
    convolutional or fully connected net) is cut after each weight layer and the norm and activation that follow it.
    """
    tree = _Tree(seen)
    level = tree.trunk()
    members = find_blocks(seen) or _segments(tree, level, find_head(seen))
    grids = [_grid(call.given) for call in members]
    if len(members) > MANY and len(set(grids)) > 1:
        ends = [i for i, grid in enumerate(grids) if i + 1 == len(grids) or grids[i + 1] != grid]
        members = [members[i] for i in ends]
    return tuple(call.path for call in members)


def find_blocks(seen: Trace) -> list[Call]:
    """The blocks of the model's trunk, in firing order, all of them; none where it has none."""
    tree = _Tree(seen)
    return [call for call in tree.trunk() if tree.is_block(call)]


def find_head(seen: Trace) -> str | None:
    """Path of the classifier: the last weight layer whose output is the logits, or that alone has their width.

    None where the logits are no single layer's (two heads averaged) or there are none.
    """
    if seen.logits is None:
        return None
    layers = [call for call in seen.calls if call.path and call.given and _own_weights(call.module) == 1]
    for call in reversed(layers):
        if call.storage == seen.logits_storage and math.prod(call.given or ()) == math.prod(seen.logits):
            return call.path
    width = class_count(seen.logits)
    fitting = [call for call in layers if width in (call.given or ())[1:]]
    return fitting[0].path if len(fitting) == 1 and fitting[0] is layers[-1] else None


def class_count(logits: Shape) -> int:
    """How many classes (or values, or tokens of a vocabulary) logits of this shape have."""
    if len(logits) == 1:
        return 1
    return logits[-1] if len(logits) <= 3 else logits[1]


def match_depth(student: Sequence[TapInfo], teacher: Sequence[TapInfo]) -> list[tuple[str, str]]:
    """Pair taps of two models by the share of the forward at which they fire.

    Each tap of the shorter list gets one of the other's; no tap is used twice and the order is kept. Of all such maps
    the one with the smallest sum of depth differences is taken, the earliest among equals.

    Returns:
        (student path, teacher path) pairs, shallow to deep.
    """
    if len(student) > len(teacher):
        return [(ours, theirs) for theirs, ours in match_depth(teacher, student)]
    best: list[tuple[float, tuple[int, ...]]] = [(0.0, ())] * (len(teacher) + 1)
    for tap in student:
        row: list[tuple[float, tuple[int, ...]]] = [(math.inf, ())]
        for j, other in enumerate(teacher):
            cost, chosen = best[j]
            paired = (cost + abs(tap.depth - other.depth), (*chosen, j))
            row.append(min(row[-1], paired, key=lambda option: option[0]))
        best = row
    return [(tap.path, teacher[j].path) for tap, j in zip(student, best[-1][1], strict=True)]


class _Tree:
    """The calls of a trace by path, and the weight layers below each."""

    def __init__(self, seen: Trace) -> None:
        self.calls = {call.path: call for call in seen.calls}
        self.weights = {call.path: sum(map(_own_weights, call.module.modules())) for call in seen.calls}

    def children(self, call: Call) -> list[Call]:
        """What ran directly below, in firing order; shelves (ModuleList) are looked through."""
        found: list[Call] = []
        waiting = [(call.path, call.module)]
        while waiting:
            path, module = waiting.pop()
            for name, child in module.named_children():
                inner = f"{path}.{name}" if path else name
                if inner in self.calls:
                    found.append(self.calls[inner])
                elif not runs(child):
                    waiting.append((inner, child))
        return sorted(found, key=lambda item: item.position)

    def is_block(self, call: Call) -> bool:
        return self.weights[call.path] >= 2 and call.given is not None and len(call.given) >= 3

    def trunk(self) -> list[Call]:
        """Descend while one block is the model's body: the only one, or the only one of its class with most layers; and
        into a model that another one only holds."""
        level = self.children(self.calls[""])
        while True:
            blocks = [call for call in level if self.is_block(call)]
            body = self._body(blocks) if blocks else self._held(level)
            inner = self.children(body) if body is not None else []
            if not inner:
                return level
            level = inner

    def _held(self, level: list[Call]) -> Call | None:
        """The one member with weights, where blocks are directly below it: what it gives are logits, so it is none."""
        weighted = [call for call in level if self.weights[call.path]]
        if len(weighted) == 1 and any(map(self.is_block, self.children(weighted[0]))):
            return weighted[0]
        return None

    def _body(self, blocks: list[Call]) -> Call | None:
        if len(blocks) == 1:
            return blocks[0]
        total = sum(self.weights[call.path] for call in blocks)
        kinds = [type(call.module) for call in blocks]
        for call in blocks:
            if kinds.count(type(call.module)) == 1 and self.weights[call.path] > total / 2:
                return call
        return None


def _segments(tree: _Tree, level: list[Call], head: str | None) -> list[Call]:
    ends: list[Call] = []
    open_segment = False
    for call in level:
        if tree.weights[call.path]:
            open_segment = call.path != head
            if open_segment:
                ends.append(call)
        elif open_segment and call.given == ends[-1].given and not _passive(call.module):
            ends[-1] = call
        else:
            open_segment = False
    return ends


def _passive(module: nn.Module) -> bool:
    return any(word in type(module).__name__ for word in _PASSIVE)


def _own_weights(module: nn.Module) -> int:
    """Whether the module is a weight layer: convolution, linear or the like, not an embedding."""
    if isinstance(module, (nn.Embedding, nn.EmbeddingBag)):
        return 0
    return int(
        any(
            name.endswith("weight") and p.dim() >= 2
            for name, p in module._parameters.items()
            if p is not None
        )
    )


def _grid(shape: Shape | None) -> int:
    """The resolution of an output as a power of two; channels may come first or last."""
    if shape is None or len(shape) < 3:
        return 0
    inner = shape[1:]
    if len(inner) == 2:
        return round(math.log2(inner[0]))
    last = inner[0] == inner[1] != inner[2]
    positions = math.prod(inner[:-1] if last else inner[1:])
    return round(math.log2(positions) / (len(inner) - 1))
