"""From the outcomes of trials to the verdict: choice on validation data, pairs over seeds, intervals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tutelage.runs.statistics import mean_interval, paired_difference
from tutelage.studies.study import Results, Study
from tutelage.studies.trials import TEACHER, Outcome
from tutelage.studies.verdict import verdict

INCOMPLETE = "incomplete"


@dataclass(frozen=True)
class Chosen:
    """The chosen trial of each seed of one arm (None where the seed has none), and why seeds have none."""

    by_seed: tuple[Outcome | None, ...]
    reasons: tuple[str, ...]

    def values(self, metric: str) -> list[float | None]:
        return [outcome.test.get(metric) if outcome else None for outcome in self.by_seed]


def judge(study: Study, outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """Everything of a ledger entry that is computed from the outcomes, as JSON values.

    A verdict, or ``falsified``, is given only where every trial of the primary arms is done and has the metric; else
    the verdict is ``incomplete`` and ``reason`` says why. The same holds for each secondary comparison alone.
    """
    chosen = {arm: choose(study, arm, outcomes) for arm in study.arms}
    main = _compare(
        study,
        chosen,
        *study.primary,
        study.metric,
        study.higher_is_better,
        study.margin,
        study.beyond or (),
    )
    complete = {arm: picked for arm, picked in chosen.items() if not picked.reasons}
    falsified = None
    if main["verdict"] != INCOMPLETE:
        tests = {
            arm: [outcome.test for outcome in picked.by_seed if outcome] for arm, picked in complete.items()
        }
        falsified = bool(study.falsified(Results(tests)))
    return {
        **main,
        "falsified_if": study.falsified_if,
        "falsified": falsified,
        "arms": {arm: _arm(study, picked) for arm, picked in chosen.items()},
        "teacher": _teacher(study, outcomes),
        "secondary": [
            {
                "claim": pair.claim,
                **_compare(
                    study,
                    chosen,
                    pair.arm,
                    pair.baseline,
                    pair.metric or study.metric,
                    pair.higher_is_better,
                    0.0,
                ),
            }
            for pair in study.secondary
        ],
        "tuning": {
            "selection": f"best validation {study.selection or study.metric}" if study.trials > 1 else "none",
            "trials": study.trials,
            "grids": {name: [dict(trial) for trial in arm.grid] for name, arm in study.arms.items()},
            "chosen": {
                arm: [outcome.trial if outcome else None for outcome in picked.by_seed]
                for arm, picked in chosen.items()
            },
        },
        "cost": _cost(outcomes),
    }


def choose(study: Study, arm: str, outcomes: Sequence[Outcome]) -> Chosen:
    """For each seed, the trial of ``arm`` with the best validation metric; of equal ones the first of the grid."""
    picked: list[Outcome | None] = []
    reasons: list[str] = []
    for seed in study.seeds:
        trials = sorted((o for o in outcomes if (o.arm, o.seed) == (arm, seed)), key=lambda o: o.trial)
        bad = [f"{o.label}: {o.error}" for o in trials if o.status != "done"]
        metric = study.selection or study.metric
        if study.trials > 1:
            bad += [
                f"{o.label}: no validation {metric}"
                for o in trials
                if o.status == "done" and metric not in o.validation
            ]
        if len(trials) != study.trials:
            bad.append(f"{arm}, seed {seed}: {len(trials)} of {study.trials} trials were run")
        reasons += bad
        picked.append(None if bad else _best(trials, metric, study.higher_is_better))
    return Chosen(tuple(picked), tuple(reasons))


def _best(trials: Sequence[Outcome], metric: str, higher_is_better: bool) -> Outcome:
    if len(trials) == 1:
        return trials[0]
    return (max if higher_is_better else min)(trials, key=lambda outcome: outcome.validation[metric])


def _compare(
    study: Study,
    chosen: Mapping[str, Chosen],
    arm: str,
    baseline: str,
    metric: str,
    higher_is_better: bool,
    margin: float,
    beyond: tuple[str, ...] = (),
) -> dict[str, Any]:
    """``arm`` against ``baseline``; ``beyond``: their difference against that of a second pair."""
    head = {
        "arm": arm,
        "baseline": baseline,
        "beyond": list(beyond) or None,
        "metric": metric,
        "higher_is_better": higher_is_better,
        "margin": margin,
    }
    names = dict.fromkeys((arm, baseline, *beyond))
    values = {name: chosen[name].values(metric) for name in names}
    reasons = [reason for name in names for reason in chosen[name].reasons]
    for name, row in values.items():
        missing = [seed for seed, value in zip(study.seeds, row, strict=True) if value is None]
        if missing and not chosen[name].reasons:
            reasons.append(f"{name}: no test {metric} for seeds {', '.join(map(str, missing))}")
    if reasons:
        nothing = dict.fromkeys(("paired_differences", "mean", "interval", "p"))
        return {**head, "verdict": INCOMPLETE, "reason": "; ".join(reasons), **nothing}
    known = {name: [value for value in row if value is not None] for name, row in values.items()}
    left, right = known[arm], known[baseline]
    if beyond:
        left, right = _differences(left, right), _differences(*(known[name] for name in beyond))
    difference = paired_difference(left, right, higher_is_better=higher_is_better)
    # A study has at least five seeds, and two have an interval.
    assert difference.low is not None
    assert difference.high is not None
    return {
        **head,
        "verdict": verdict(difference.low, difference.high, margin),
        "reason": None,
        "paired_differences": list(difference.values),
        "mean": difference.mean,
        "interval": [difference.low, difference.high],
        "p": difference.p,
    }


def _differences(left: Sequence[float], right: Sequence[float]) -> list[float]:
    return [a - b for a, b in zip(left, right, strict=True)]


def _arm(study: Study, picked: Chosen) -> dict[str, Any]:
    """Metrics of one arm by seed, and mean and interval of the primary one over the seeds that have it."""
    names = sorted({name for outcome in picked.by_seed if outcome for name in outcome.test})
    return {"values": {name: picked.values(name) for name in names}, **_mean(picked.values(study.metric))}


def _teacher(study: Study, outcomes: Sequence[Outcome]) -> dict[str, Any] | None:
    if study.teacher is None:
        return None
    rows = {o.seed: o.test.get(study.metric) for o in outcomes if (o.arm, o.trial) == (TEACHER, 0)}
    values = [rows.get(seed) for seed in study.seeds]
    return {"values": {study.metric: values}, **_mean(values)}


def _mean(values: Sequence[float | None]) -> dict[str, Any]:
    known = [value for value in values if value is not None]
    if not known:
        return {"mean": None, "interval": None}
    interval = mean_interval(known)
    return {
        "mean": interval.mean,
        "interval": None if interval.low is None else [interval.low, interval.high],
    }


def _cost(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    seconds: dict[str, float] = {}
    for outcome in outcomes:
        seconds[outcome.arm] = round(seconds.get(outcome.arm, 0.0) + outcome.seconds, 2)
    return {"seconds": round(sum(seconds.values()), 2), "seconds_by_arm": seconds, "runs": len(outcomes)}
