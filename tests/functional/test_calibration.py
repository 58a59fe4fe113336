"""The expected calibration error: reference values, a table by hand, edges of bins, bad input."""

from __future__ import annotations

from inspect import unwrap
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tutelage.functional import expected_calibration_error
from tutelage.functional.calibration import calibration_error, confidence_bins
from tutelage.functional.checks import TargetError

GOLDEN = Path(__file__).parent.parent / "golden" / "bdkd"


def binary(*confidence: float) -> Tensor:
    """Two classes; the first is the more probable one."""
    values = torch.tensor(confidence, dtype=torch.float64)
    return torch.stack([values, 1 - values], dim=1)


def test_golden() -> None:
    with np.load(GOLDEN / "calibration.npz") as file:
        data = {name: torch.from_numpy(file[name]) for name in ("in_probabilities", "in_target", "out_ece")}
    found = expected_calibration_error(data["in_probabilities"], data["in_target"])
    torch.testing.assert_close(found, data["out_ece"], rtol=1e-12, atol=0)


def test_eight_rows_by_hand() -> None:
    """Two bins of four are filled: confidence 0.7 with half right, 0.95 with three of four right."""
    probabilities = binary(0.6, 0.65, 0.75, 0.8, 0.9, 0.95, 0.95, 1.0)
    wrong = torch.tensor([1, 0, 1, 0, 0, 0, 1, 0])
    found = expected_calibration_error(probabilities, wrong, bins=4)
    first, second = [0.6, 0.65, 0.75], [0.8, 0.9, 0.95, 0.95, 1.0]
    wanted = (abs(1 - sum(first)) + abs(4 - sum(second))) / 8
    assert found.item() == pytest.approx(wanted)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**31 - 1), st.integers(1, 40))
def test_it_is_the_sum_over_bins_whatever_the_order(seed: int, bins: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    probabilities = (2 * torch.randn(30, 5, generator=generator, dtype=torch.float64)).softmax(1)
    target = torch.randint(5, (30,), generator=generator)
    confidence, predicted = probabilities.max(1)
    wanted = 0.0
    for number in range(bins):
        inside = (confidence > number / bins) & (confidence <= (number + 1) / bins)
        if inside.any():
            right = (predicted == target)[inside].double().mean()
            wanted += float(inside.double().mean() * (right - confidence[inside].mean()).abs())
    order = torch.randperm(30, generator=generator)
    for rows in (slice(None), order):
        found = expected_calibration_error(probabilities[rows], target[rows], bins)
        assert found.item() == pytest.approx(wanted, abs=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_an_edge_belongs_to_the_bin_below_and_1_to_the_last(dtype: torch.dtype) -> None:
    edges = torch.arange(1, 16, dtype=dtype) / 15
    assert confidence_bins(edges, 15).tolist() == list(range(15))
    assert confidence_bins(torch.nextafter(edges[:-1], edges.new_tensor(2)), 15).tolist() == list(
        range(1, 15)
    )
    assert confidence_bins(torch.zeros(1, dtype=dtype), 15).tolist() == [0]


def test_bounds_types_and_no_rows() -> None:
    sure = torch.tensor([[1.0, 0.0]])
    assert expected_calibration_error(sure, torch.tensor([0])) == 0
    assert expected_calibration_error(sure, torch.tensor([1])) == 1
    assert expected_calibration_error(sure, torch.tensor([0])).dtype == torch.float32
    assert expected_calibration_error(sure.bfloat16(), torch.tensor([1])).dtype == torch.float32
    assert expected_calibration_error(torch.zeros(0, 2), torch.zeros(0, dtype=torch.int64)) == 0
    assert expected_calibration_error(torch.ones(3, 1), torch.zeros(3, dtype=torch.int64)) == 0


def test_bad_input() -> None:
    probabilities, target = binary(0.6, 0.7), torch.tensor([0, 1])
    with pytest.raises(ValueError, match="bins must be at least 1; got 0"):
        expected_calibration_error(probabilities, target, bins=0)
    with pytest.raises(ValueError, match=r"got -3 to 3: take the softmax of logits first"):
        expected_calibration_error(torch.tensor([[3.0, -3.0]]), torch.tensor([0]))
    with pytest.raises(ValueError, match="must lie in"):
        expected_calibration_error(torch.tensor([[torch.nan, 0.5]]), torch.tensor([0]))
    with pytest.raises(TargetError, match="target 2 names none of the 2 classes"):
        expected_calibration_error(probabilities, torch.tensor([0, 2]))
    with pytest.raises(ValueError, match=r"\[rows, classes\]; got shape \[2\]"):
        unwrap(expected_calibration_error)(probabilities[:, 0], target)
    with pytest.raises(ValueError, match="bins must be at least 1"):
        calibration_error(torch.ones(2), torch.ones(2), 0)
