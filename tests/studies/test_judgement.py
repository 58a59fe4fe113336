"""From outcomes to the entry: choice on validation data, whole pairs only, the card's own condition."""

from __future__ import annotations

from typing import Any

import pytest

from tutelage.studies.judgement import choose, judge
from tutelage.studies.study import Arm, Comparison, Study
from tutelage.studies.trials import Outcome

SEEDS = (0, 1, 2, 3, 4)


def make_study(**changes: Any) -> Study:
    fields: dict[str, Any] = {
        "claim": "a is better than b.",
        "primary": ("a", "b"),
        "arms": {"a": Arm("kd"), "b": Arm("none"), "c": Arm("fitnet")},
        "falsified_if": "a is below b in mean",
        "falsified": lambda results: results.difference("a", "b", "accuracy").mean < 0,
        "secondary": (Comparison("c", "b", "c is reported."),),
    }
    return Study(**fields | changes)


def make_outcomes(**values: list[float]) -> list[Outcome]:
    return [
        Outcome(arm, seed, 0, "done", test={"accuracy": value, "loss": 1 - value}, seconds=2.0)
        for arm, row in values.items()
        for seed, value in zip(SEEDS, row, strict=True)
    ]


BASE = [0.80, 0.82, 0.81, 0.83, 0.80]
UP = [value + gap for value, gap in zip(BASE, (0.02, 0.03, 0.02, 0.04, 0.03), strict=True)]
MIXED = [value + gap for value, gap in zip(BASE, (0.02, -0.03, 0.02, -0.01, 0.0), strict=True)]


@pytest.mark.parametrize(
    ("arm", "margin", "verdict", "falsified"),
    [
        (UP, 0.0, "holds", False),
        (UP, 0.025, "not shown at this scale", False),
        (MIXED, 0.0, "not shown at this scale", False),
        ([2 * base - up for base, up in zip(BASE, UP, strict=True)], 0.0, "contradicted", True),
    ],
)
def test_verdict_and_the_cards_own_condition(
    arm: list[float], margin: float, verdict: str, falsified: bool
) -> None:
    entry = judge(make_study(margin=margin), make_outcomes(a=arm, b=BASE, c=MIXED))
    assert (entry["verdict"], entry["falsified"], entry["reason"]) == (verdict, falsified, None)
    assert entry["paired_differences"] == pytest.approx([x - y for x, y in zip(arm, BASE, strict=True)])
    low, high = entry["interval"]
    assert low < entry["mean"] < high
    assert entry["arms"]["a"]["values"]["accuracy"] == arm
    assert entry["secondary"][0]["verdict"] == "not shown at this scale"
    assert entry["cost"] == {"seconds": 30.0, "seconds_by_arm": {"a": 10.0, "b": 10.0, "c": 10.0}, "runs": 15}


def test_a_gain_that_grows() -> None:
    """The verdict is on (a - b) - (c - d), seed by seed."""
    arms = {name: Arm("kd") for name in "abcd"}
    study = make_study(arms=arms, beyond=("c", "d"), secondary=())
    less = [base + (up - base) / 4 for base, up in zip(BASE, UP, strict=True)]
    entry = judge(study, make_outcomes(a=UP, b=BASE, c=less, d=BASE))
    gains = [3 / 4 * (up - base) for base, up in zip(BASE, UP, strict=True)]
    assert entry["paired_differences"] == pytest.approx(gains)
    assert entry["beyond"] == ["c", "d"]
    assert entry["verdict"] == "holds"
    missing = judge(study, make_outcomes(a=UP, b=BASE, c=less))
    assert missing["verdict"] == "incomplete"
    assert "d, seed 0: 0 of 1 trials were run" in missing["reason"]
    with pytest.raises(ValueError, match="no arm named 'e'"):
        make_study(arms=arms, beyond=("c", "e"), secondary=())


def test_lower_is_better() -> None:
    entry = judge(make_study(metric="loss", higher_is_better=False), make_outcomes(a=UP, b=BASE, c=MIXED))
    assert entry["verdict"] == "holds"
    assert entry["mean"] == pytest.approx(0.028)


def test_choice_is_by_validation_never_by_test() -> None:
    study = make_study(arms={name: Arm("kd", grid=({}, {"x": 1}, {"x": 2})) for name in "abc"})
    outcomes = [
        Outcome("a", 0, trial, "done", validation={"accuracy": validation}, test={"accuracy": test})
        for trial, (validation, test) in enumerate([(0.7, 0.99), (0.9, 0.5), (0.9, 0.8)])
    ]
    chosen = choose(study, "a", outcomes).by_seed[0]
    assert chosen is not None
    # The best test metric is trial 0's; of the two equal on validation the first in the grid is taken.
    assert (chosen.trial, chosen.test["accuracy"]) == (1, 0.5)
    reversed_order = choose(study, "a", outcomes[::-1]).by_seed[0]
    assert reversed_order == chosen


def test_selection_metric_of_its_own() -> None:
    grid = ({}, {"x": 1})
    study = make_study(
        arms={name: Arm("kd", grid=grid) for name in "abc"},
        metric="loss",
        higher_is_better=False,
        selection="nll",
    )
    outcomes = [
        Outcome("a", 0, trial, "done", validation={"nll": nll}) for trial, nll in enumerate([0.4, 0.3])
    ]
    chosen = choose(study, "a", outcomes).by_seed[0]
    assert chosen is not None
    assert chosen.trial == 1


@pytest.mark.parametrize("fault", ["failed", "missing", "no metric"])
def test_no_verdict_on_fewer_pairs(fault: str) -> None:
    outcomes = make_outcomes(a=UP, b=BASE, c=MIXED)
    place = next(i for i, outcome in enumerate(outcomes) if (outcome.arm, outcome.seed) == ("a", 2))
    if fault == "failed":
        outcomes[place] = Outcome("a", 2, 0, "failed", "ValueError: loss is nan")
    elif fault == "missing":
        del outcomes[place]
    else:
        outcomes[place] = Outcome("a", 2, 0, "done", test={"top5": 1.0})
    entry = judge(make_study(), outcomes)
    assert entry["verdict"] == "incomplete"
    expected = {
        "failed": "a, seed 2, trial 0: ValueError: loss is nan",
        "missing": "0 of 1",
        "no metric": "seeds 2",
    }
    assert expected[fault] in entry["reason"]
    for name in ("interval", "mean", "p", "paired_differences", "falsified"):
        assert entry[name] is None
    assert entry["arms"]["a"]["values"]["accuracy"][2] is None
    # The comparison that has all its pairs is still judged.
    assert entry["secondary"][0]["verdict"] == "not shown at this scale"


def test_a_failed_trial_of_a_grid_is_no_quiet_loss() -> None:
    study = make_study(arms={name: Arm("kd", grid=({}, {"x": 1})) for name in "abc"})
    outcomes = [
        Outcome(arm, seed, trial, "done", validation={"accuracy": 0.5}, test={"accuracy": 0.5})
        for arm in "abc"
        for seed in SEEDS
        for trial in (0, 1)
    ]
    assert judge(study, outcomes)["verdict"] == "not shown at this scale"
    outcomes[1] = Outcome("a", 0, 1, "failed", "diverged")
    assert judge(study, outcomes)["verdict"] == "incomplete"


def test_a_failed_secondary_arm_leaves_the_verdict() -> None:
    outcomes = make_outcomes(a=UP, b=BASE, c=MIXED)
    outcomes[-1] = Outcome("c", 4, 0, "failed", "killed")
    entry = judge(make_study(), outcomes)
    assert entry["verdict"] == "holds"
    assert entry["secondary"][0]["verdict"] == "incomplete"
    assert "killed" in entry["secondary"][0]["reason"]


def test_teacher_stands_beside_the_arms() -> None:
    study = make_study(teacher={"method": "none"})
    outcomes = [*make_outcomes(a=UP, b=BASE, c=MIXED), *make_outcomes(teacher=[0.9] * 5)]
    entry = judge(study, outcomes)
    assert entry["teacher"] == {"values": {"accuracy": [0.9] * 5}, "mean": 0.9, "interval": [0.9, 0.9]}
    assert judge(make_study(), outcomes)["teacher"] is None
