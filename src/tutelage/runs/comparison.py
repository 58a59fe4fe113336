"""The table that the runs of a comparison give. Nothing here runs anything."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from tutelage.runs.batch import Json
from tutelage.runs.plan import Key, Plan
from tutelage.runs.statistics import holm, mean_interval, paired_difference


def finite_metrics(result: Json) -> Json:
    """Metrics on test data, or on validation data where there is no test data; None in place of what is no number."""
    metrics = result.get("test") or result.get("validation") or {}
    return {
        name: value if value is not None and math.isfinite(value) else None for name, value in metrics.items()
    }


def summarise(plan: Plan, runs: Mapping[Key, Json]) -> list[Json]:
    """The comparison's ``methods``: by method its runs so far, their mean and interval, and the paired difference to
    the baseline over the seeds that both have finished (``pairs`` of them)."""
    done = {
        label: {seed: runs[label, seed]["value"] for seed in plan.seeds if _is_done(runs.get((label, seed)))}
        for label in plan.options
    }
    differences = _differences(plan, done)
    return [
        {
            "name": label,
            "options": {key: value for key, value in plan.options[label].items() if key != "name"},
            "tuning": plan.tuning.get(label),
            "runs": [runs[label, seed] for seed in plan.seeds if (label, seed) in runs],
            **_mean(list(done[label].values())),
            "difference": differences.get(label),
            "seconds": _mean_seconds([runs[label, seed]["seconds"] for seed in done[label]]),
        }
        for label in plan.options
    ]


def _differences(plan: Plan, done: Mapping[str, Mapping[int, float]]) -> dict[str, Json]:
    """Paired differences to the baseline; ``p_adjusted`` is corrected for as many tests as there are methods."""
    found = {
        label: difference
        for label, values in done.items()
        if label != plan.baseline and (difference := _difference(values, done[plan.baseline])) is not None
    }
    tested = [difference for difference in found.values() if difference["p"] is not None]
    adjusted = holm([difference["p"] for difference in tested])
    for difference, p in zip(tested, adjusted, strict=True):
        difference["p_adjusted"] = p
    return found


def _is_done(run: Json | None) -> bool:
    return run is not None and run["status"] == "done"


def _mean(values: Sequence[float]) -> Json:
    if not values:
        return {"mean": None, "low": None, "high": None}
    interval = mean_interval(values)
    return {"mean": interval.mean, "low": interval.low, "high": interval.high}


def _difference(arm: Mapping[int, float], baseline: Mapping[int, float]) -> Json | None:
    seeds = [seed for seed in arm if seed in baseline]
    if not seeds:
        return None
    found = paired_difference([arm[seed] for seed in seeds], [baseline[seed] for seed in seeds])
    return {
        "mean": found.mean,
        "low": found.low,
        "high": found.high,
        "p": found.p,
        "p_adjusted": None,
        "pairs": len(seeds),
    }


def _mean_seconds(seconds: Sequence[float | None]) -> float | None:
    known = [value for value in seconds if value is not None]
    return sum(known) / len(known) if known else None
