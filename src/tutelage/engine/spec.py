"""`ModelSpec`: what methods know of a model before the first step. Paths, shapes, classes; probed once."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

import torch
from torch import nn

from tutelage.engine.calling import TapError
from tutelage.engine.heads import HeadPlan, few_tokens
from tutelage.engine.patterns import INPUT, near_paths, resolve_taps
from tutelage.engine.structure import class_count, find_head, find_stages, match_depth
from tutelage.engine.taps import tap_shapes
from tutelage.engine.tracing import Shape, TapInfo, Trace, trace
from tutelage.engine.types import Inputs


@dataclass
class ModelSpec:
    """A model as a method sees it when it chooses taps and makes its projectors.

    Attributes:
        name: what messages call it.
        module: the model itself; of a store, an empty tree with the same paths; none where paths are not known.
        outputs: classes (or values, or tokens) of its logits; none where it gives no logits.
        head: path of the classifier; none where the logits are no single layer's.
        mean, std: input normalisation by channel; none: inputs are taken as they are.
        shapes: of every tap, the row axis left out (``path`` and ``path:in``).
        infos: what can be tapped, in firing order.
        stage_paths: see `stages`.
        kept: taps that a store holds; none: all can be had.
        weights: of a store, `fingerprint` of the model whose outputs it holds.
    """

    name: str
    module: nn.Module | None
    outputs: int | None
    head: str | None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    shapes: dict[str, Shape] = field(default_factory=dict, repr=False)
    infos: tuple[TapInfo, ...] = field(default=(), repr=False)
    stage_paths: tuple[str, ...] = ()
    kept: tuple[str, ...] | None = None
    weights: str | None = None

    @classmethod
    def of(
        cls,
        name: str,
        module: nn.Module,
        example_inputs: Inputs,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        head: HeadPlan | None = None,
    ) -> ModelSpec:
        """Probe a model with one forward, in eval mode, that leaves it as it was.

        Args:
            example_inputs: a few rows as the model gets them, normalised.
            head: where a language model makes its logits.
        """
        seen = trace(module, few_tokens(example_inputs) if head is not None else example_inputs)
        whole = tap_shapes(module, seen.calls)
        shapes = {tap: shape for tap, each in whole.items() if (shape := seen.shape(each)) is not None}
        return cls(
            name,
            module,
            _width(seen, head),
            head.path if head else find_head(seen),
            None if mean is None else tuple(mean),
            None if std is None else tuple(std),
            shapes,
            tuple(seen.taps()),
            find_stages(seen),
        )

    @property
    def pooled(self) -> str:
        """The tap of the classifier's input, the pooled feature.

        Raises:
            TapError: no single layer gives this model's logits.
        """
        if self.head is None:
            raise TapError(
                f"{self.name}: no single layer gives its logits; name the tap of the pooled feature instead"
            )
        return self.head + INPUT

    def fingerprint(self) -> str | None:
        """sha256 of the model's state, with its names; of a store, that of the model behind it. None where there is
        neither. Sharded weights must be whole: ask in `Method.build`."""
        if self.weights is not None or self.module is None:
            return self.weights
        found = hashlib.sha256()
        for name, value in self.module.state_dict().items():
            if not isinstance(value, torch.Tensor):
                continue
            found.update(f"{name} {value.dtype} {list(value.shape)}".encode())
            found.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        return found.hexdigest()

    def stages(self) -> tuple[str, ...]:
        """Paths of its stages, shallow to deep; see `tutelage.engine.structure.find_stages`."""
        return self.stage_paths

    def resolve(self, patterns: Sequence[str]) -> tuple[str, ...]:
        """The taps that patterns name, in module order; see `tutelage.engine.patterns.resolve_taps`.

        Raises:
            TapError: a pattern fits nothing, or (in a store) nothing that is kept.
        """
        if self.module is not None:
            try:
                taps = resolve_taps(self.module, patterns, stages=self.stage_paths, head=self.head)
            except TapError as error:
                raise TapError(f"{self.name}: {error}") from None
            missing = [tap for tap in taps if self.kept is not None and tap not in self.kept]
            if missing:
                raise TapError(
                    f"{self.name}: the store keeps no tap {missing[0]!r}, only {', '.join(self.kept or ()) or 'none'}; "
                    f"make one with cache.taps=[{', '.join(missing)}]"
                )
            return taps
        found: list[str] = []
        for pattern in patterns:
            wanted = self.pooled if pattern == f"head{INPUT}" and self.head is not None else pattern
            kept = [tap for tap in self.shapes if tap == wanted or fnmatchcase(tap, wanted)]
            if not kept:
                raise TapError(
                    f"{self.name}: tap {pattern!r} is not stored; stored are {', '.join(self.shapes) or 'none'}"
                )
            found += kept
        return tuple(tap for tap in self.shapes if tap in found)

    def shape(self, path: str) -> Shape:
        """Shape of a tap's tensor, the row axis left out.

        Raises:
            TapError: the tap does not exist, never fires, or gives a tensor whose first axis is not the row.
        """
        if path in self.shapes:
            return self.shapes[path]
        near = (
            near_paths(self.module, path.removesuffix(INPUT))
            if self.module is not None
            else list(self.shapes)
        )
        raise TapError(
            f"{self.name}: tap {path!r} gives no tensor with a row axis (no such module, one that never runs, or "
            f"rows mixed with windows); near: {', '.join(near) or 'none'}"
        )


def _width(seen: Trace, head: HeadPlan | None) -> int | None:
    if head is not None:
        return head.outputs
    return None if seen.logits is None else class_count(seen.logits)


def match_stages(student: ModelSpec, teacher: ModelSpec) -> list[tuple[str, str]]:
    """The default map from the student's stages to the teacher's, by depth ratio: (student, teacher) pairs."""
    ours = [info for info in student.infos if info.path in student.stage_paths]
    theirs = [info for info in teacher.infos if info.path in teacher.stage_paths]
    return match_depth(ours, theirs)
