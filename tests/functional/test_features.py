"""fitnet_loss and at_loss: reference values, definitions, degenerate maps, and what they refuse."""

from __future__ import annotations

from inspect import unwrap
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tutelage.functional import at_loss, fitnet_loss

GOLDEN = Path(__file__).parent.parent / "golden" / "baselines"


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


def maps(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def attention(features: Tensor, p: int = 2) -> Tensor:
    return F.normalize(features.pow(p).mean(1).flatten(1))


@pytest.mark.parametrize("case", ["at_same_size", "at_student_larger"])
def test_at_golden_value_and_gradient(case: str) -> None:
    with np.load(GOLDEN / f"{case}.npz") as data:
        arrays = {name: torch.from_numpy(np.asarray(data[name])) for name in data}
    student = arrays["in_feat_student"].requires_grad_()
    loss = at_loss(student, arrays["in_feat_teacher"])
    loss.backward()
    torch.testing.assert_close(loss, arrays["out_loss"], rtol=1e-10, atol=0)
    torch.testing.assert_close(student.grad, arrays["grad_feat_student"], rtol=1e-8, atol=1e-13)


@pytest.mark.parametrize("p", [1, 2, 3, 4])
def test_at_is_the_mean_over_rows_and_positions(p: int) -> None:
    student, teacher = maps(1, 3, 4, 5, 2), maps(2, 3, 6, 5, 2)
    wanted = (attention(student, p) - attention(teacher, p)).square().mean()
    torch.testing.assert_close(at_loss(student, teacher, p), wanted)
    assert at_loss(student, student, p) == 0
    torch.testing.assert_close(at_loss(3 * student, teacher, p), wanted)


@pytest.mark.parametrize("p", [1, 2, 3])
def test_at_gradients(p: int) -> None:
    student, teacher = maps(3, 2, 3, 2, 3).requires_grad_(), maps(4, 2, 2, 4, 3)
    assert torch.autograd.gradcheck(lambda s: at_loss(s, teacher, p), student)
    assert torch.autograd.gradgradcheck(lambda s: at_loss(s, teacher, p), student)


def test_at_pools_the_larger_map_of_either_side_by_each_axis() -> None:
    student, teacher = maps(5, 2, 3, 8, 3), maps(6, 2, 5, 4, 6)
    small = F.adaptive_avg_pool2d(student, (4, 3)), F.adaptive_avg_pool2d(teacher, (4, 3))
    torch.testing.assert_close(at_loss(student, teacher), at_loss(*small))
    torch.testing.assert_close(at_loss(teacher, student), at_loss(*small))


def test_at_keeps_signs_with_an_odd_power_only() -> None:
    features = maps(7, 2, 3, 4, 4)
    assert at_loss(features, -features, 2) == 0
    torch.testing.assert_close(at_loss(features, -features, 3), torch.tensor(4 / 16, dtype=torch.float64))


@pytest.mark.parametrize("p", [1, 2, 3])
def test_at_of_a_map_of_zeros_is_zero_and_has_no_gradient(p: int) -> None:
    student, teacher = maps(8, 2, 3, 4, 4), maps(9, 2, 3, 4, 4)
    student[0] = 0
    loss = at_loss(student.requires_grad_(), teacher, p)
    wanted = (
        attention(teacher, p).square().sum(1)[0]
        + (attention(student, p) - attention(teacher, p))[1].square().sum()
    )
    torch.testing.assert_close(loss, wanted / 32)
    loss.backward()
    assert student.grad is not None
    assert (student.grad[0] == 0).all()
    assert student.grad[1].abs().sum() > 0


def test_at_sums_over_several_maps() -> None:
    student = [maps(1, 2, 3, 4, 4), maps(2, 2, 5, 2, 2)]
    teacher = (maps(3, 2, 4, 4, 4), maps(4, 2, 4, 1, 3))
    wanted = at_loss(student[0], teacher[0]) + at_loss(student[1], teacher[1])
    torch.testing.assert_close(at_loss(student, teacher), wanted)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_at_computes_half_precision_in_float32(dtype: torch.dtype) -> None:
    student, teacher = 300 * maps(1, 2, 3, 4, 4).to(dtype), maps(2, 2, 3, 4, 4).to(dtype)
    loss = at_loss(student, teacher)
    assert loss.dtype == torch.float32
    assert loss == at_loss(student.float(), teacher.float())


def test_at_of_no_rows_is_zero_with_a_gradient() -> None:
    student, teacher = (
        torch.zeros(0, 3, 4, 4, requires_grad=True),
        torch.zeros(0, 5, 4, 4, requires_grad=True),
    )
    loss = at_loss(student, teacher)
    loss.backward()
    assert loss == 0
    assert student.grad is not None
    assert teacher.grad is None


def test_at_bad_input() -> None:
    features, loss = maps(1, 2, 3, 4, 4), unwrap(at_loss)
    with pytest.raises(ValueError, match="p must be an integer of at least 1; got 0"):
        loss(features, features, 0)
    with pytest.raises(ValueError, match=r"the student gives 2 .*, the teacher 1"):
        loss([features, features], features)
    with pytest.raises(
        ValueError, match=r"the same rows; got student_features \[2, 3, 4, 4\], .* \[1, 3, 4, 4\]"
    ):
        loss(features, features[:1])
    with pytest.raises(
        ValueError, match=r"got student_features \[2, 3, 4, 4\], teacher_features \[2, 16, 3\]"
    ):
        loss(features, features.flatten(2).mT)
