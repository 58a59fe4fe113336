"""SinKD: the authors' values, the identities of the card, extremes, bad input."""

from __future__ import annotations

import math
from inspect import unwrap
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tutelage.functional import (
    annealed_temperature,
    sinkd_cost,
    sinkd_loss,
    sinkhorn_plan,
    soft_cross_entropy_loss,
)

GOLDEN = Path(__file__).parent.parent / "golden" / "sinkd"
seeds = st.integers(0, 2**31 - 1)
quick = settings(max_examples=25, deadline=None)


def arrays(case: str) -> dict[str, Tensor]:
    with np.load(GOLDEN / f"{case}.npz") as data:
        return {name: torch.from_numpy(data[name]) for name in data}


def pair(seed: int, rows: int = 6, classes: int = 4) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    student, teacher = 2 * torch.randn(2, rows, classes, generator=generator, dtype=torch.float64)
    return student.requires_grad_(), teacher


@pytest.mark.parametrize(
    ("case", "rtol", "atol"), [("batch8_c3", 1e-9, 1e-12), ("batch6_c20_f32", 1e-4, 1e-7)]
)
def test_golden(case: str, rtol: float, atol: float) -> None:
    data = arrays(case)
    student = data["in_student"].requires_grad_()
    loss = sinkd_loss(student, data["in_teacher"])
    loss.backward()
    cost = sinkd_cost(student, data["in_teacher"])
    for found, name in (
        (loss, "out_loss"),
        (sinkd_loss(student, data["in_teacher"], scale=1.0), "out_unscaled"),
        (cost, "out_cost"),
        (sinkhorn_plan(cost), "out_plan"),
        (student.grad, "grad_student"),
    ):
        torch.testing.assert_close(found, data[name], rtol=rtol, atol=atol)


def test_golden_kd_term() -> None:
    data = arrays("kd_term")
    student = data["in_student"].requires_grad_()
    loss = soft_cross_entropy_loss(student, data["in_teacher"], temperature=3.0)
    loss.backward()
    torch.testing.assert_close(loss, data["out_loss"], rtol=1e-10, atol=0)
    torch.testing.assert_close(student.grad, data["grad_student"], rtol=1e-9, atol=1e-12)


@quick
@given(seeds, st.integers(1, 7), st.floats(0.5, 4.0))
def test_permutations_and_constants_change_nothing(seed: int, rows: int, temperature: float) -> None:
    student, teacher = pair(seed, rows)
    generator = torch.Generator().manual_seed(seed)
    order, classes = torch.randperm(rows, generator=generator), torch.randperm(4, generator=generator)
    loss = sinkd_loss(student, teacher, temperature=temperature, scale=1.0)
    assert loss >= 0
    for others in (
        (student[order], teacher[order]),
        (student, teacher[order]),  # so it binds no sample to its own teacher output
        (student[:, classes], teacher[:, classes]),
        (student + 7, teacher - 7),
    ):
        found = sinkd_loss(*others, temperature=temperature, scale=1.0)
        torch.testing.assert_close(found, loss, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("p", [1.0, 1.5, 2])
def test_cost_is_the_norm_of_all_differences(p: float) -> None:
    student, teacher = pair(1, rows=30)  # above 25 rows cdist may go by products of rows, which loses digits
    found = sinkd_cost(student, teacher, temperature=3.0, p=p)
    difference = (student / 3).softmax(-1)[:, None] - (teacher / 3).softmax(-1)
    torch.testing.assert_close(found, difference.abs().pow(p).sum(-1).pow(1 / p), rtol=1e-10, atol=1e-12)
    assert (sinkd_cost(student, student.detach()).diagonal() == 0).all()


def test_options_reach_their_parts() -> None:
    student, teacher = pair(2)
    cost = sinkd_cost(student, teacher, temperature=1.0, p=2.0)
    plan = sinkhorn_plan(cost, epsilon=0.5, n_iters=3)
    found = sinkd_loss(student, teacher, temperature=1.0, epsilon=0.5, n_iters=3, p=2.0, scale=0.1)
    torch.testing.assert_close(found, 0.1 * (plan * cost).sum())
    mean = sinkd_loss(student, teacher, reduction="mean")
    torch.testing.assert_close(6 * mean, sinkd_loss(student, teacher))


def test_gradients_are_the_numerical_ones_and_the_teacher_has_none() -> None:
    student, teacher = pair(3, rows=4)
    teacher.requires_grad_()
    assert torch.autograd.gradcheck(lambda s: sinkd_loss(s, teacher.detach(), scale=1.0), student)
    sinkd_loss(student, teacher).backward()
    assert teacher.grad is None


def test_one_row_is_its_distance_equal_rows_are_not_free_and_one_class_is() -> None:
    student, teacher = pair(4, rows=1)
    distance = ((student / 2).softmax(-1) - (teacher / 2).softmax(-1)).abs().sum()
    torch.testing.assert_close(sinkd_loss(student, teacher, scale=1.0), distance)
    student, _ = pair(5)
    assert sinkd_loss(student, student.detach(), scale=1.0) > 1e-3  # the plan is blurred
    assert sinkd_loss(student[:, :1], student[:, 1:2].detach()) == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("epsilon", [0.1, 1e-3])
def test_extremes_are_finite(dtype: torch.dtype, epsilon: float) -> None:
    signs = pair(6)[0].detach().sign()
    student = (1e4 * signs).to(dtype).requires_grad_()
    teacher = (-1e4 * signs).to(dtype)
    teacher[:, 0] = -torch.inf
    loss = sinkd_loss(student, teacher, epsilon=epsilon) + soft_cross_entropy_loss(student, teacher)
    loss.backward()
    assert loss.dtype == torch.float32
    assert loss.isfinite()
    assert student.grad is not None
    assert student.grad.isfinite().all()
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(sinkd_loss(student, teacher), sinkd_loss(student.float(), teacher.float()))


def test_an_empty_batch_is_zero_with_a_gradient() -> None:
    student = torch.zeros(0, 3, requires_grad=True)
    loss = sinkd_loss(student, student.detach()) + sinkd_loss(student, student.detach(), reduction="mean")
    (loss + soft_cross_entropy_loss(student, student.detach())).backward()
    assert loss == 0
    assert student.grad is not None


def test_annealed_temperature_by_hand() -> None:
    assert [annealed_temperature(epoch, 4, 4.0) for epoch in range(4)] == [4.0, 3.0, 2.0, 1.0]
    assert annealed_temperature(0, 1, 3.0) == 3.0
    for epoch, epochs in ((-1, 4), (4, 4), (0, 0)):
        with pytest.raises(ValueError, match=rf"epoch must be one of 0 … {epochs - 1}; got {epoch}"):
            annealed_temperature(epoch, epochs, 2.0)
    with pytest.raises(ValueError, match=r"temperature must be finite and above 0"):
        annealed_temperature(0, 4, 0.0)


def test_bad_input() -> None:
    student, teacher = pair(7)
    loss, cost = unwrap(sinkd_loss), unwrap(sinkd_cost)
    with pytest.raises(
        ValueError, match=r"shapes must agree; got student_logits \[6, 4\], teacher_logits \[5, 4\]"
    ):
        cost(student, teacher[:5])
    with pytest.raises(ValueError, match=r"temperature must be finite and above 0; got -1"):
        soft_cross_entropy_loss(student, teacher, temperature=-1)
    with pytest.raises(ValueError, match=r"shapes must agree"):
        cost(student, teacher[:, :3])
    with pytest.raises(ValueError, match=r"must be \[batch, classes\]; got \[1, 6, 4\]; flatten the tokens"):
        cost(student[None], teacher[None])
    for option in ("temperature", "epsilon"):
        with pytest.raises(ValueError, match=rf"{option} must be finite and above 0; got 0"):
            loss(student, teacher, **{option: 0})
    with pytest.raises(ValueError, match=r"n_iters must be at least 1; got 0"):
        loss(student, teacher, n_iters=0)
    for p in (0.5, math.nan):
        with pytest.raises(ValueError, match=r"p must be at least 1; got"):
            loss(student, teacher, p=p)
    with pytest.raises(ValueError, match=r"reduction must be 'sum' or 'mean'; got 'none'"):
        loss(student, teacher, reduction="none")
    with pytest.raises(ValueError, match=r"teacher_logits hold NaN"):
        loss(student, teacher / torch.zeros(6, 4) * 0)
