"""fitnet_loss: the mean squared difference, and what it refuses."""

from __future__ import annotations

from inspect import unwrap

import pytest
import torch

from tutelage.functional import fitnet_loss


def test_value_and_gradient_by_hand() -> None:
    student = torch.tensor([[1.0, 2.0], [3.0, 4.0]], requires_grad=True)
    teacher = torch.tensor([[0.0, 2.0], [1.0, 5.0]], requires_grad=True)
    loss = fitnet_loss(student, teacher)
    loss.backward()
    assert loss == (1 + 0 + 4 + 1) / 4
    torch.testing.assert_close(student.grad, torch.tensor([[0.5, 0.0], [1.0, -0.5]]))
    assert teacher.grad is None


def test_zero_at_equality_and_quadratic_in_the_difference() -> None:
    teacher, step = torch.randn(2, 3, 4, 4, dtype=torch.float64), torch.randn(2, 3, 4, 4, dtype=torch.float64)
    assert fitnet_loss(teacher, teacher) == 0
    torch.testing.assert_close(
        fitnet_loss(teacher + 3 * step, teacher), 9 * fitnet_loss(teacher + step, teacher)
    )


def test_gradcheck() -> None:
    teacher = torch.randn(2, 3, 2, 2, dtype=torch.float64)
    assert torch.autograd.gradcheck(
        lambda student: fitnet_loss(student, teacher), torch.randn_like(teacher).requires_grad_()
    )


def test_no_rows_give_zero_with_a_gradient() -> None:
    student = torch.zeros(0, 3, 4, 4, requires_grad=True)
    loss = fitnet_loss(student, torch.zeros(0, 3, 4, 4))
    loss.backward()
    assert loss == 0
    assert student.grad is not None


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(dtype: torch.dtype) -> None:
    student, teacher = torch.full((4, 4), 300.0, dtype=dtype), torch.zeros(4, 4)
    loss = fitnet_loss(student, teacher)
    assert loss.dtype == torch.float32
    assert loss == 300.0**2  # beyond float16's range


def test_shapes_must_agree() -> None:
    with pytest.raises(ValueError, match=r"student_features \[2, 3\], teacher_features \[2, 1\]"):
        unwrap(fitnet_loss)(torch.ones(2, 3), torch.ones(2, 1))
