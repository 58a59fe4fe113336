"""Means with intervals and paired differences over seeds, by Student's t."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

LEVEL = 0.95
ROUNDING = 1e-12
"""Values that agree to this, relative to the largest of them, differ by rounding alone."""


@dataclass(frozen=True)
class Interval:
    """A mean and its two-sided Student-t interval. One value has no interval: ``low`` and ``high`` are None."""

    mean: float
    low: float | None
    high: float | None


@dataclass(frozen=True)
class Difference:
    """Paired differences ``arm - baseline``, their mean, its interval and the p value of the paired t-test.

    ``p`` is two-sided, of the null hypothesis that the mean difference is 0; None for a single pair.
    """

    values: tuple[float, ...]
    mean: float
    low: float | None
    high: float | None
    p: float | None


def mean_interval(values: Sequence[float], level: float = LEVEL) -> Interval:
    """The mean of ``values`` with its Student-t interval at ``level``.

    Where all values agree the interval is that point. Raises ValueError where there is no value or one is not finite.
    """
    mean, error = _mean_and_error(values)
    if error is None:
        return Interval(mean, None, None)
    if error == 0.0:
        return Interval(mean, mean, mean)
    reach = error * float(stats.t.ppf((1 + level) / 2, len(values) - 1))
    return Interval(mean, mean - reach, mean + reach)


def paired_difference(
    arm: Sequence[float], baseline: Sequence[float], *, higher_is_better: bool = True, level: float = LEVEL
) -> Difference:
    """Differences ``arm[i] - baseline[i]``, pair by pair, with the paired t-test.

    Args:
        arm: values of one arm, one a seed.
        baseline: values of the other arm, of the same seeds in the same order.
        higher_is_better: where False the sign is turned, so that above 0 always means that the arm is better.
        level: of the interval.

    Raises ValueError where the lengths differ, there is no pair, or a value is not finite.
    """
    if len(arm) != len(baseline):
        raise ValueError(f"pairs need as many values on both sides; got {len(arm)} and {len(baseline)}")
    sign = 1.0 if higher_is_better else -1.0
    scale = max((abs(value) for value in (*arm, *baseline)), default=0.0)
    raw = (sign * (left - right) for left, right in zip(arm, baseline, strict=True))
    values = tuple(0.0 if abs(value) <= ROUNDING * scale else float(value) for value in raw)
    interval = mean_interval(values, level)
    return Difference(values, interval.mean, interval.low, interval.high, _p_value(values))


def holm(p_values: Sequence[float]) -> list[float]:
    """p values adjusted for being one of several tests (Holm 1979): the chance of even one false finding among all
    stays below the level. In the order given."""
    order = sorted(range(len(p_values)), key=lambda i: p_values[i])
    adjusted, running = [0.0] * len(p_values), 0.0
    for rank, i in enumerate(order):
        running = max(running, min(1.0, (len(p_values) - rank) * p_values[i]))
        adjusted[i] = running
    return adjusted


def _mean_and_error(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean and its standard error; 0 where all values agree up to rounding, None for a single value."""
    data = np.asarray(values, dtype=np.float64)
    if data.ndim != 1 or data.size == 0:
        raise ValueError("a mean needs at least one value")
    if not np.isfinite(data).all():
        raise ValueError(f"every value must be finite; got {list(values)}")
    if data.size == 1:
        return float(data[0]), None
    if np.ptp(data) <= ROUNDING * np.abs(data).max():
        return float(data[0]), 0.0
    return float(data.mean()), float(data.std(ddof=1) / math.sqrt(data.size))


def _p_value(values: Sequence[float]) -> float | None:
    mean, error = _mean_and_error(values)
    if error is None:
        return None
    if error == 0.0:
        return 1.0 if mean == 0.0 else 0.0
    return float(2 * stats.t.sf(abs(mean) / error, len(values) - 1))
