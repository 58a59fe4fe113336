"""forward_kl, reverse_kl and entropy: reference values, definitions, extremes, what is refused."""

from __future__ import annotations

import math
from functools import partial
from inspect import unwrap
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tutelage.functional import entropy, forward_kl, kd_loss, reverse_kl

GOLDEN = Path(__file__).parent.parent / "golden" / "bdkd"
seeds = st.integers(0, 2**31 - 1)
temperatures = st.floats(0.5, 8.0)
quick = settings(max_examples=25, deadline=None)


def pair(seed: int, scale: float = 3.0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    student, teacher = scale * torch.randn(2, 5, 7, generator=generator, dtype=torch.float64)
    return student.requires_grad_(), teacher


def test_golden_values_and_gradients() -> None:
    with np.load(GOLDEN / "divergences.npz") as file:
        data = {name: torch.from_numpy(file[name]) for name in file}
    cases = [
        (forward_kl, 1.0, "forward_kl", "student_logits"),
        (reverse_kl, 1.0, "reverse_kl", "student_logits_2"),
        (forward_kl, 3.0, "forward_kl_2", "student_logits_3"),
        (reverse_kl, 3.0, "reverse_kl_2", "student_logits_4"),
    ]
    for function, temperature, value, gradient in cases:
        student = data["in_student_logits"].clone().requires_grad_()
        found = function(student, data["in_teacher_logits"], temperature)
        hold(found, student, data[f"out_{value}"], data[f"grad_{gradient}"])
    for temperature, suffix in ((1.0, ""), (3.0, "_2")):
        logits = data["in_logits"].clone().requires_grad_()
        hold(entropy(logits, temperature), logits, data[f"out_entropy{suffix}"], data[f"grad_logits{suffix}"])


def hold(found: Tensor, leaf: Tensor, value: Tensor, gradient: Tensor) -> None:
    found.sum().backward()
    torch.testing.assert_close(found, value, rtol=1e-10, atol=1e-13)
    torch.testing.assert_close(leaf.grad, gradient, rtol=1e-8, atol=1e-12)


@quick
@given(seeds, temperatures)
def test_definitions(seed: int, temperature: float) -> None:
    student, teacher = pair(seed)
    p_s, p_t = (student / temperature).softmax(-1), (teacher / temperature).softmax(-1)
    close = partial(torch.testing.assert_close, rtol=1e-9, atol=1e-12)
    close(forward_kl(student, teacher, temperature), (p_t * (p_t / p_s).log()).sum(-1))
    close(reverse_kl(student, teacher, temperature), (p_s * (p_s / p_t).log()).sum(-1))
    close(entropy(student, temperature), -(p_s * p_s.log()).sum(-1))
    mean = temperature**2 * forward_kl(student, teacher, temperature).mean()
    close(kd_loss(student, teacher, temperature), mean)


@quick
@given(seeds, temperatures)
def test_each_is_the_others_mirror_image(seed: int, temperature: float) -> None:
    student, teacher = pair(seed)
    torch.testing.assert_close(
        forward_kl(student, teacher, temperature), reverse_kl(teacher, student, temperature)
    )


@pytest.mark.parametrize("function", [forward_kl, reverse_kl])
def test_zero_with_zero_gradient_at_equality_and_no_gradient_to_the_teacher(function: object) -> None:
    student, teacher = pair(0)
    teacher.requires_grad_()
    assert callable(function)
    assert (function(student, teacher) > 0).all()
    same = function(student, student.detach())
    (same.sum() + function(student, teacher).sum() * 0).backward()
    assert torch.equal(same, torch.zeros(5, dtype=torch.float64))
    assert student.grad is not None
    assert student.grad.abs().max() < 1e-15
    assert teacher.grad is None


def test_gradients_by_differences() -> None:
    student, teacher = pair(3)
    for function in (forward_kl, reverse_kl):
        assert torch.autograd.gradcheck(lambda logits, f=function: f(logits, teacher, 2.0), (student,))
    assert torch.autograd.gradcheck(lambda logits: entropy(logits, 0.7), (student,))


def test_entropy_by_hand() -> None:
    logits = torch.tensor([[0.0, 0.0, 0.0, 0.0], [0.0, 0.0, -1000.0, -1000.0], [1000.0, 0.0, 0.0, 0.0]])
    torch.testing.assert_close(entropy(logits), torch.tensor([math.log(4), math.log(2), 0.0]))
    assert entropy(torch.zeros(3, 1)).tolist() == [0, 0, 0]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_extremes_stay_finite(dtype: torch.dtype) -> None:
    student = torch.tensor(
        [[200.0, -200.0], [-200.0, 200.0], [200.0, 200.0]], dtype=dtype, requires_grad=True
    )
    teacher = torch.tensor([[-200.0, 200.0]] * 3, dtype=dtype)
    for function in (forward_kl, reverse_kl):
        found = function(student, teacher)
        assert found.dtype == (dtype if dtype == torch.float64 else torch.float32)
        wanted = [400.0, 0.0, math.log(2) if function is forward_kl else 200 - math.log(2)]
        torch.testing.assert_close(found, torch.tensor(wanted, dtype=found.dtype), rtol=1e-3, atol=1e-6)
        (gradient,) = torch.autograd.grad(found.sum(), student)
        assert torch.isfinite(gradient).all()


def test_rows_of_any_shape_and_none() -> None:
    generator = torch.Generator().manual_seed(0)
    student, teacher = torch.randn(2, 3, 4, 5, generator=generator)
    assert forward_kl(student, teacher).shape == (3, 4)
    torch.testing.assert_close(reverse_kl(student, teacher)[1], reverse_kl(student[1], teacher[1]))
    assert entropy(torch.zeros(0, 5)).shape == (0,)
    assert reverse_kl(torch.zeros(0, 5), torch.zeros(0, 5)).shape == (0,)


def test_bad_input() -> None:
    student, teacher = pair(0)
    for temperature in (0.0, -1.0, math.inf, math.nan):
        with pytest.raises(ValueError, match="temperature must be finite and above 0"):
            forward_kl(student, teacher, temperature)
        with pytest.raises(ValueError, match="temperature"):
            entropy(student, temperature)
    with pytest.raises(ValueError, match=r"student_logits \[5, 7\], teacher_logits \[5, 6\]"):
        unwrap(reverse_kl)(student, teacher[:, :6])
