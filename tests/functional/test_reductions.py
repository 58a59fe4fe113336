"""Reductions and checks that every loss goes through."""

from __future__ import annotations

from inspect import unwrap

import pytest
import torch

from tutelage.functional.checks import TargetError, check_target
from tutelage.functional.reductions import keep_rows, masked_mean, upcast


def test_upcast_copies_halves_alone() -> None:
    for dtype, wanted in [(torch.float16, torch.float32), (torch.bfloat16, torch.float32)]:
        assert upcast(torch.ones(2, dtype=dtype)).dtype == wanted
    for dtype in (torch.float32, torch.float64):
        tensor = torch.ones(2, dtype=dtype)
        assert upcast(tensor) is tensor


def test_masked_mean_ignores_what_is_masked_even_infinity() -> None:
    values = torch.tensor([1.0, float("inf"), 4.0], requires_grad=True)
    mean = masked_mean(values, torch.tensor([2, 0, -1]))
    mean.backward()
    assert mean == 2.5
    torch.testing.assert_close(values.grad, torch.tensor([0.5, 0.0, 0.5]))


def test_masked_mean_refuses_a_mask_of_another_shape() -> None:
    with pytest.raises(ValueError, match=r"values \[3\], mask \[3, 1\]"):
        unwrap(masked_mean)(torch.ones(3), torch.ones(3, 1))


def test_keep_rows_cuts_all_alike() -> None:
    a, b = torch.arange(6.0).reshape(3, 2), torch.arange(3)
    assert keep_rows(None, a, b) == (a, b)
    kept = keep_rows(torch.tensor([0.0, 1.0, 1.0]), a, b)
    assert kept[0].tolist() == [[2.0, 3.0], [4.0, 5.0]]
    assert kept[1].tolist() == [1, 2]


def test_keep_rows_wants_one_value_a_row() -> None:
    with pytest.raises(ValueError, match=r"one value a row; got shape \[3, 2\]"):
        unwrap(keep_rows)(torch.ones(3, 2), torch.ones(3, 2))
    with pytest.raises(ValueError, match=r"one value a row; got shape \[2\]"):
        keep_rows(torch.ones(2), torch.ones(3, 2))


def test_check_target_accepts_ids_of_any_integer_type_and_distributions() -> None:
    logits = torch.zeros(2, 3)
    for target in (torch.tensor([0, 2], dtype=torch.uint8), torch.tensor([0, 2]), torch.full((2, 3), 1 / 3)):
        check_target(target, logits)
    check_target(torch.zeros(0, dtype=torch.int64), torch.zeros(0, 3))


@pytest.mark.parametrize(("ids", "value"), [([0, 3], "3"), ([-1, 3], "-1"), ([-100, 0], "-100")])
def test_check_target_names_the_value_that_is_no_class(ids: list[int], value: str) -> None:
    with pytest.raises(IndexError, match=rf"target {value} names none of the 3 classes"):
        check_target(torch.tensor(ids), torch.zeros(2, 3))
    assert issubclass(TargetError, ValueError)


@pytest.mark.parametrize(
    ("target", "message"),
    [
        (torch.zeros(2, 4), r"logits' shape \[2, 3\]; got \[2, 4\]"),
        (torch.zeros(3, dtype=torch.int64), r"class ids \[2\] or a distribution \[2, 3\]; got shape \[3\]"),
        (torch.zeros(2, 3, 1), r"got shape \[2, 3, 1\]"),
        (torch.zeros(2), r"integers; got torch.float32"),
    ],
)
def test_check_target_names_bad_shapes_and_types(target: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_target(target, torch.zeros(2, 3))
