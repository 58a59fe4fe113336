"""The balance of both divergences: reference values, the card's identities, extremes, bad input."""

from __future__ import annotations

import math
from inspect import unwrap
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tutelage.functional import balance_weights, bdkd_student_loss, entropy, forward_kl, reverse_kl

GOLDEN = Path(__file__).parent.parent / "golden" / "bdkd"
seeds = st.integers(0, 2**31 - 1)
quick = settings(max_examples=25, deadline=None)
WEIGHTINGS = ("switch", "sigmoid")


def arrays(case: str) -> dict[str, Tensor]:
    with np.load(GOLDEN / f"{case}.npz") as data:
        return {name: torch.from_numpy(data[name]) for name in data if data[name].dtype.kind in "fiu"}


def draw(seed: int, rows: int = 5, classes: int = 7, scale: float = 3.0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    student, teacher = scale * torch.randn(2, rows, classes, generator=generator, dtype=torch.float64)
    return student.requires_grad_(), teacher


@pytest.mark.parametrize(
    ("case", "suffix", "options"),
    [
        ("student_loss_switch", "", {}),
        ("student_loss_switch", "_2", {"delta": 3.5, "temperature": 2.0}),
        ("student_loss_sigmoid", "", {"weighting": "sigmoid"}),
    ],
)
def test_golden(case: str, suffix: str, options: dict[str, Any]) -> None:
    data = arrays(case)
    student = data["in_student_logits"].requires_grad_()
    found = bdkd_student_loss(student, data["in_teacher_logits"], **options)
    found.total.backward()
    for name, value in found._asdict().items():
        torch.testing.assert_close(value, data[f"out_{name}{suffix}"], rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(student.grad, data[f"grad_student_logits{suffix}"], rtol=1e-8, atol=1e-12)


def test_golden_weights() -> None:
    for case, options in (
        ("student_loss_switch", {"delta": 3.5, "temperature": 2.0}),
        ("student_loss_sigmoid", {"delta": 1.5, "weighting": "sigmoid", "scale": 0.4}),
    ):
        data = arrays(case)
        found = balance_weights(data["in_student_logits"], data["in_teacher_logits"], **options)
        for value, name in zip(found, ("w_forward", "w_reverse"), strict=True):
            torch.testing.assert_close(value, data[f"out_{name}"], rtol=1e-9, atol=1e-12)


@quick
@given(seeds, st.floats(1.0, 5.0), st.floats(0.5, 8.0), st.sampled_from(WEIGHTINGS))
def test_it_is_the_weighted_mean_of_both_divergences(
    seed: int, delta: float, tau: float, weighting: Any
) -> None:
    student, teacher = draw(seed)
    weights = balance_weights(student, teacher, delta, tau, weighting)
    found = bdkd_student_loss(student, teacher, delta, tau, weighting)
    forward = tau**2 * (weights[0] * forward_kl(student, teacher, tau)).mean()
    reverse = tau**2 * (weights[1] * reverse_kl(student, teacher, tau)).mean()
    torch.testing.assert_close(found.forward, forward, rtol=1e-8, atol=1e-10)
    torch.testing.assert_close(found.reverse, reverse, rtol=1e-8, atol=1e-10)
    torch.testing.assert_close(found.total, forward + reverse, rtol=1e-8, atol=1e-10)
    surer = entropy(teacher, tau) > entropy(student, tau)
    torch.testing.assert_close(found.forward_share, surer.double().mean())
    assert not weights[0].requires_grad
    assert not found.forward_share.requires_grad


@quick
@given(seeds, st.floats(1.0, 5.0))
def test_the_surer_student_is_spread_and_the_less_sure_one_sharpened(seed: int, delta: float) -> None:
    student, teacher = draw(seed)
    surer = entropy(teacher) > entropy(student)
    forward, reverse = balance_weights(student, teacher, delta)
    large = torch.full_like(forward, delta)
    for found, chosen in ((forward, surer), (reverse, ~surer)):
        torch.testing.assert_close(found, large.where(chosen, torch.tensor(1.0).double()), rtol=1e-12, atol=0)
    smooth = balance_weights(student, teacher, delta, weighting="sigmoid", scale=1e-9)
    torch.testing.assert_close(smooth, (forward, reverse))
    for one, other in (balance_weights(student, teacher, delta, weighting="sigmoid"),):
        torch.testing.assert_close(one + other, torch.full_like(one, 1 + delta))


def test_equally_sure_rows_go_to_the_reverse_divergence() -> None:
    student = torch.tensor([[2.0, 0.0], [0.0, 0.0]])
    forward, reverse = balance_weights(student, student.flip(1), 3.0)
    assert (forward.tolist(), reverse.tolist()) == ([1.0, 1.0], [3.0, 3.0])
    assert bdkd_student_loss(student, student.flip(1)).forward_share == 0


@quick
@given(seeds, st.sampled_from(WEIGHTINGS))
def test_with_delta_1_it_is_the_symmetric_divergence(seed: int, weighting: Any) -> None:
    student, teacher = draw(seed)
    one = bdkd_student_loss(student, teacher, 1.0, weighting=weighting).total
    other = bdkd_student_loss(teacher.detach(), student.detach(), 1.0, weighting=weighting).total
    torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)
    jeffreys = (forward_kl(student, teacher) + reverse_kl(student, teacher)).mean()
    torch.testing.assert_close(one, jeffreys, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_zero_without_a_gradient_where_the_logits_agree(weighting: Any) -> None:
    student, _ = draw(0)
    found = bdkd_student_loss(student, student.detach() + 5.0, weighting=weighting)
    found.total.backward()
    assert abs(found.total.item()) < 1e-12
    assert student.grad is not None
    assert student.grad.abs().max() < 1e-12


@quick
@given(seeds, st.floats(-1e3, 1e3), st.sampled_from(WEIGHTINGS))
def test_a_constant_a_row_and_the_order_change_nothing(seed: int, shift: float, weighting: Any) -> None:
    student, teacher = draw(seed)
    whole = bdkd_student_loss(student, teacher, weighting=weighting)
    shifts = shift * torch.arange(5, dtype=torch.float64)[:, None]
    rows = torch.randperm(5, generator=torch.Generator().manual_seed(seed))
    for moved in (
        bdkd_student_loss(student + shifts, teacher - shifts, weighting=weighting),
        bdkd_student_loss(student[rows], teacher[rows], weighting=weighting),
        bdkd_student_loss(student.view(5, 1, 7), teacher.view(5, 1, 7), weighting=weighting),
    ):
        torch.testing.assert_close(tuple(moved), tuple(whole), rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_gradcheck_and_a_constant_teacher(weighting: Any) -> None:
    """The weights are constant, so differences of the loss with them fixed are its gradient."""
    student, teacher = draw(3, rows=3, classes=4)
    forward, reverse = balance_weights(student, teacher, 2.0, 1.5, weighting)

    def fixed(logits: Tensor) -> Tensor:
        both = forward * forward_kl(logits, teacher, 1.5) + reverse * reverse_kl(logits, teacher, 1.5)
        mean: Tensor = 1.5**2 * both.mean()
        return mean

    assert torch.autograd.gradcheck(fixed, student)
    (wanted,) = torch.autograd.grad(fixed(student), student)
    bdkd_student_loss(student, teacher.requires_grad_(), 2.0, 1.5, weighting).total.backward()
    torch.testing.assert_close(student.grad, wanted)
    assert teacher.grad is None


@pytest.mark.parametrize("weighting", WEIGHTINGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("size", [200.0, 1e4])
def test_large_logits_are_finite(size: float, dtype: torch.dtype, weighting: Any) -> None:
    student = torch.tensor([[size, -size, 0.0]], dtype=dtype, requires_grad=True)
    found = bdkd_student_loss(student, torch.tensor([[-size, size, 3.0]], dtype=dtype), weighting=weighting)
    found.total.backward()
    assert all(value.isfinite() for value in found)
    assert found.total.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert student.grad is not None
    assert student.grad.isfinite().all()


def test_one_class_one_row_and_no_row() -> None:
    alone = torch.ones(4, 1, requires_grad=True)
    assert bdkd_student_loss(alone, torch.zeros(4, 1)).total == 0
    student, teacher = draw(1, rows=1, classes=2)
    assert bdkd_student_loss(student, teacher).forward_share in (0, 1)
    empty = torch.zeros(0, 3, requires_grad=True)
    found = bdkd_student_loss(empty, torch.zeros(0, 3))
    found.total.backward()
    assert tuple(found) == (0, 0, 0, 0)
    assert empty.grad is not None


def test_bad_input() -> None:
    student, teacher = draw(0)
    for loss in (unwrap(bdkd_student_loss), unwrap(balance_weights)):
        with pytest.raises(ValueError, match=r"student_logits \[5, 7\], teacher_logits \[5, 6\]"):
            loss(student, teacher[:, :6])
        for delta in (0.99, -1.0, math.nan, math.inf):
            with pytest.raises(ValueError, match="delta must be finite and at least 1"):
                loss(student, teacher, delta=delta)
        for option in ("temperature", "scale"):
            with pytest.raises(ValueError, match=f"{option} must be finite and above 0"):
                loss(student, teacher, **{option: 0.0})
        with pytest.raises(ValueError, match="weighting must be one of switch, sigmoid; got 'soft'"):
            loss(student, teacher, weighting="soft")
