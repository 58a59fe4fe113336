"""The verdict's three answers and its edges, as design.md has them."""

from __future__ import annotations

import math

import pytest

from tutelage.studies.verdict import Verdict, verdict


@pytest.mark.parametrize(
    ("low", "high", "margin", "expected"),
    [
        (0.01, 0.03, 0.0, "holds"),
        (0.01, 0.01, 0.0, "holds"),
        (0.01, 0.03, 0.02, "not shown at this scale"),
        (0.02, 0.03, 0.02, "not shown at this scale"),
        (0.0, 0.03, 0.0, "not shown at this scale"),
        (-0.01, 0.03, 0.0, "not shown at this scale"),
        (-0.03, 0.0, 0.0, "not shown at this scale"),
        (0.0, 0.0, 0.0, "not shown at this scale"),
        (-0.03, -0.01, 0.0, "contradicted"),
        # Below 0, not below the margin, is what contradicts.
        (-0.03, 0.01, 0.02, "not shown at this scale"),
        (-0.03, -0.01, 0.02, "contradicted"),
    ],
)
def test_verdict(low: float, high: float, margin: float, expected: Verdict) -> None:
    assert verdict(low, high, margin) == expected


@pytest.mark.parametrize(("low", "high"), [(0.2, 0.1), (math.nan, 0.1), (0.1, math.inf)])
def test_what_is_no_interval_is_refused(low: float, high: float) -> None:
    with pytest.raises(ValueError, match="finite ends"):
        verdict(low, high)


@pytest.mark.parametrize("margin", [-0.01, math.nan])
def test_margin_is_not_negative(margin: float) -> None:
    with pytest.raises(ValueError, match="margin"):
        verdict(0.1, 0.2, margin)
