"""Figures in few characters."""

from __future__ import annotations

import pytest

from tutelage.cli import figures


@pytest.mark.parametrize(
    ("shown", "wanted"),
    [
        (figures.metric("accuracy", 0.98765), "98.8"),
        (figures.metric("loss", 0.123456), "0.1235"),
        (figures.metric("accuracy", 0.015, signed=True), "+1.5"),
        (figures.metric("accuracy", None), "-"),
        (figures.interval("accuracy", {"mean": 0.5, "low": None, "high": None}), "50.0"),
        (figures.interval("loss", {"mean": -0.5, "low": -1, "high": 0.25}, signed=True), "-0.5 [-1, 0.25]"),
        (figures.interval("loss", None), "-"),
        (figures.amount(999), "999"),
        (figures.amount(7_430_000), "7.43 M"),
        (figures.amount(1.5e12), "1.5 T"),
        (figures.amount(None), "-"),
        (figures.milliseconds(12.345), "12.3 ms"),
        (figures.duration(3.25), "3.2 s"),
        (figures.duration(600), "10.0 min"),
        (figures.duration(9000), "2.5 h"),
        (figures.duration(None), "-"),
    ],
)
def test_figures_are_short(shown: str, wanted: str) -> None:
    assert shown == wanted
