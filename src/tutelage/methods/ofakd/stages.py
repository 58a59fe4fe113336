"""Which stages of a student get an exit. Found by probing: there is no table of architectures."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from tutelage.engine.layout import layout_of
from tutelage.engine.patterns import INPUT
from tutelage.engine.spec import ModelSpec

MOST = 4
DEPTHS = (1 / 6, 1 / 3, 5 / 6, 1)
"""Shares of the depth at which blocks of one resolution are cut: blocks 2, 4, 10 and 12 of 12."""


class Exit(NamedTuple):
    """A tap of the student, and how many stages come after it."""

    tap: str
    later: int


def find_stages(student: ModelSpec) -> tuple[str, ...]:
    """At most four stages: the last ones where the resolution falls, those at `DEPTHS` where all have one grid."""
    stages = student.stages()
    if len(stages) <= MOST:
        return stages
    if len({layout_of(student, path).grid for path in stages}) > 1:
        return stages[-MOST:]
    return tuple(stages[max(round(share * len(stages)), 1) - 1] for share in DEPTHS)


def choose_exits(
    student: ModelSpec, numbers: Sequence[int] | None, taps: Sequence[str] | None
) -> tuple[Exit, ...]:
    """Exits at numbered stages (from 1), at taps of one's own, or at all stages.

    A tap of one's own counts to the first stage that ends with or after it.

    Raises:
        ValueError: the model shows no stages, or has none of that number.
        TapError: a tap matches nothing.
    """
    stages = find_stages(student)
    chosen: Sequence[str] = stages
    if taps is not None:
        chosen = student.resolve(taps)
    elif numbers is not None:
        if max(numbers) > len(stages):
            raise ValueError(
                f"method.stages={list(numbers)}: the student has {len(stages)} stage(s): "
                f"{', '.join(stages) or 'none'}; method.taps names modules instead"
            )
        chosen = [stages[number - 1] for number in sorted(set(numbers))]
    if not chosen:
        raise ValueError("the student shows no stages; set method.taps (see `tutelage taps`)")
    depths = {info.path: info.depth for info in student.infos}
    ends = [depths[path] for path in stages]
    return tuple(
        Exit(tap, max(sum(end >= depths[tap.removesuffix(INPUT)] for end in ends) - 1, 0)) for tap in chosen
    )


def pooled_width(spec: ModelSpec) -> int | None:
    """Width of the feature that the classifier reads; None where no single layer classifies (or a store answers)."""
    shape = spec.shapes.get(spec.pooled) if spec.head is not None else None
    if shape is None:
        return None
    return shape[0] if len(shape) == 3 else shape[-1]
