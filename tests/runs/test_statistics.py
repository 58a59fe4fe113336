"""Intervals and paired tests against scipy's own, and at the edges."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from tutelage.runs.statistics import mean_interval, paired_difference

ARM = [0.91, 0.93, 0.90, 0.95, 0.92]
BASELINE = [0.89, 0.92, 0.91, 0.90, 0.90]
SHARES = st.lists(st.floats(0, 1), min_size=2, max_size=12)


def test_mean_interval_is_students() -> None:
    interval = mean_interval(ARM)
    low, high = stats.t.interval(0.95, len(ARM) - 1, loc=np.mean(ARM), scale=stats.sem(ARM))
    assert (interval.mean, interval.low, interval.high) == pytest.approx((np.mean(ARM), low, high), abs=1e-12)


def test_mean_interval_by_hand() -> None:
    # mean 2, standard deviation 1, t(2, 0.975) = 4.30265: 2 ± 4.30265 / sqrt(3)
    interval = mean_interval([1.0, 2.0, 3.0])
    assert interval.high == pytest.approx(2 + 4.302652729911275 / math.sqrt(3), abs=1e-9)
    assert mean_interval([1.0, 2.0, 3.0], level=0.5).high == pytest.approx(
        2 + 0.8164965809 / math.sqrt(3), abs=1e-9
    )


def test_one_value_has_no_interval() -> None:
    interval = mean_interval([0.5])
    assert (interval.mean, interval.low, interval.high) == (0.5, None, None)


def test_equal_values_are_a_point() -> None:
    interval = mean_interval([0.1 + 0.2, 0.3, 0.3])
    assert interval.low == interval.high == interval.mean == pytest.approx(0.3)


@pytest.mark.parametrize("values", [[], [0.5, math.nan], [math.inf, 1.0]])
def test_mean_of_nothing_and_of_what_is_not_finite_is_refused(values: list[float]) -> None:
    with pytest.raises(ValueError, match=r"at least one value|finite"):
        mean_interval(values)


def test_paired_difference_is_scipys() -> None:
    found = paired_difference(ARM, BASELINE)
    test = stats.ttest_rel(ARM, BASELINE)
    interval = test.confidence_interval(0.95)
    assert found.values == pytest.approx(np.subtract(ARM, BASELINE), abs=1e-12)
    assert found.p == pytest.approx(test.pvalue, abs=1e-12)
    assert (found.low, found.high) == pytest.approx((interval.low, interval.high), abs=1e-12)


def test_lower_is_better_turns_the_sign() -> None:
    up, down = paired_difference(ARM, BASELINE), paired_difference(ARM, BASELINE, higher_is_better=False)
    assert up.low is not None
    assert down.high == pytest.approx(-up.low)
    assert down.mean == pytest.approx(-up.mean)
    assert down.p == pytest.approx(up.p)


@pytest.mark.parametrize(("gap", "p"), [(0.25, 0.0), (0.0, 1.0)])
def test_pairs_that_all_differ_alike(gap: float, p: float) -> None:
    found = paired_difference([value + gap for value in BASELINE], BASELINE)
    assert (found.low, found.high) == pytest.approx((gap, gap))
    assert found.low == found.high
    assert found.p == p


def test_rounding_is_no_difference() -> None:
    assert paired_difference([0.1 + 0.2, 0.7], [0.3, 0.7]).values == (0.0, 0.0)


def test_one_pair_has_neither_interval_nor_p() -> None:
    found = paired_difference([0.9], [0.8])
    assert found.mean == pytest.approx(0.1)
    assert (found.low, found.high, found.p) == (None, None, None)


@pytest.mark.parametrize(("arm", "baseline"), [([0.9], [0.8, 0.7]), ([], [])])
def test_pairs_must_be_pairs(arm: list[float], baseline: list[float]) -> None:
    with pytest.raises(ValueError, match=r"as many values|at least one value"):
        paired_difference(arm, baseline)


@given(SHARES)
def test_interval_holds_its_mean_and_moves_with_the_values(values: list[float]) -> None:
    here, moved = mean_interval(values), mean_interval([value + 1 for value in values])
    assert here.low is not None
    assert here.high is not None
    assert moved.low is not None
    assert here.low <= here.mean + 1e-12
    assert here.mean <= here.high + 1e-12
    assert moved.low == pytest.approx(here.low + 1, abs=1e-9)
