"""How numbers are written."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tutelage.report import format as written


@pytest.mark.parametrize(
    ("call", "expected"),
    [
        (lambda: written.percent(0.91254), "91.25%"),
        (lambda: written.percent(0.91254, 1), "91.3%"),
        (lambda: written.percent(-0.02), "−2.00%"),
        (lambda: written.percent(None), "–"),
        (lambda: written.percent(math.nan), "NaN"),
        (lambda: written.percent(math.inf), "∞"),
        (lambda: written.points(0.0125), "+1.25"),
        (lambda: written.points(-0.0125), "−1.25"),
        (lambda: written.points(-0.000001), "0.00"),
        (lambda: written.si(1_233_540), "1.23 M"),
        (lambda: written.si(999_900), "1.00 M"),
        (lambda: written.si(999.96), "1.00 k"),
        (lambda: written.si(41_200_000_000), "41.2 G"),
        (lambda: written.si(861), "861"),
        (lambda: written.si(True), "–"),
        (lambda: written.milliseconds(0.0212), "0.0212 ms"),
        (lambda: written.milliseconds(12_000), "12.00 s"),
        (lambda: written.duration(0.424), "0.42 s"),
        (lambda: written.duration(59.96), "1 min 00 s"),
        (lambda: written.duration(192.4), "3 min 12 s"),
        (lambda: written.duration(7500), "2 h 05 min"),
        (lambda: written.duration(None), "–"),
        (lambda: written.p_value(0.0004), "< 0.001"),
        (lambda: written.p_value(0.0432), "0.043"),
        (lambda: written.p_value(0.21), "0.21"),
        (lambda: written.p_clause(0.0432), "p = 0.043"),
        (lambda: written.p_clause(0.0004), "p < 0.001"),
        (lambda: written.times(6.03), "6.0×"),
        (lambda: written.times(1.314), "1.31×"),
        (lambda: written.plain(3.2e-05), "3.2 × 10⁻⁵"),
        (lambda: written.plain(50_000), "50\u202f000"),
        (lambda: written.metric_value("loss", 1.4), "1.400"),
        (lambda: written.metric_value("accuracy", 0.5), "50.00%"),
        (lambda: written.metric_value("loss", math.nan), "NaN"),
        (lambda: written.metric_difference("loss", 0.25), "+0.25"),
        (lambda: written.metric_difference("accuracy", -0.25), "−25.00"),
    ],
)
def test_written(call: Callable[[], str], expected: str) -> None:
    assert call().replace("\u00a0", " ") == expected


@given(st.floats(min_value=1, max_value=9e17))
def test_si_keeps_three_digits(value: float) -> None:
    amount, _, prefix = written.si(value).partition("\u00a0")
    scale = {"": 1, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "P": 1e15}[prefix]
    assert float(amount) * scale == pytest.approx(value, rel=0.0051)
    assert len(amount.replace(".", "")) <= 4 or prefix == "P"


@given(st.one_of(st.none(), st.booleans(), st.text(), st.floats(), st.integers(), st.lists(st.integers())))
def test_nothing_breaks_a_writer(value: object) -> None:
    for write in (
        written.percent,
        written.points,
        written.si,
        written.duration,
        written.milliseconds,
        written.p_value,
        written.plain,
        written.times,
        written.count,
    ):
        assert write(value)


def test_metrics_are_told_apart_by_name() -> None:
    assert written.split_group("accuracy[sex=1]") == ("accuracy", "sex=1")
    assert written.metric_label("top5") == "Top-5 accuracy"
    assert written.metric_label("accuracy[sex=1]") == "Accuracy, sex=1"
    assert written.in_sentence("accuracy") == "accuracy"
    assert written.in_sentence("r2") == "R²"
    assert written.in_sentence("f1") == "F1"
    shares = {
        name
        for name in ("accuracy", "average_precision", "old_to_new_rate", "loss", "mae", "r2")
        if written.is_share(name)
    }
    assert shares == {"accuracy", "average_precision", "old_to_new_rate"}
    falling = {
        name
        for name in ("accuracy", "calibration_error", "loss", "mae", "r2")
        if written.lower_is_better(name)
    }
    assert falling == {"calibration_error", "loss", "mae"}
