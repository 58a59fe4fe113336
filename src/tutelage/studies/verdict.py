"""The verdict on a claim, computed from the interval of its paired difference and never typed in."""

from __future__ import annotations

import math
from typing import Literal

Verdict = Literal["holds", "contradicted", "not shown at this scale"]


def verdict(low: float, high: float, margin: float = 0.0) -> Verdict:
    """What the interval ``[low, high]`` of a paired difference says of a claim.

    ``holds`` where its low end is above ``margin``, ``contradicted`` where its high end is below 0, else
    ``not shown at this scale``.
    """
    if not (math.isfinite(low) and math.isfinite(high) and low <= high):
        raise ValueError(f"an interval has finite ends, the lower first; got [{low}, {high}]")
    if not (math.isfinite(margin) and margin >= 0):
        raise ValueError(f"margin is {margin}; allowed: 0 and above")
    if low > margin:
        return "holds"
    if high < 0:
        return "contradicted"
    return "not shown at this scale"
