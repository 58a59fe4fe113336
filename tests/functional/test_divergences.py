"""kd_loss and the log-space helpers: reference values, properties, gradients, extremes."""

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

from tutelage.functional import kd_loss
from tutelage.functional.divergences import log_softmax_without, softmax_without

GOLDEN = Path(__file__).parent.parent / "golden" / "baselines"
seeds = st.integers(0, 2**31 - 1)
temperatures = st.floats(0.5, 8.0)
quick = settings(max_examples=25, deadline=None)


def pair(seed: int, rows: int = 5, classes: int = 7, scale: float = 3.0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    both = scale * torch.randn(2, rows, classes, generator=generator, dtype=torch.float64)
    return both[0].requires_grad_(), both[1]


def plain_kd(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """KL a row, straight from the definition in probabilities."""
    p_s, p_t = (student / temperature).softmax(-1), (teacher / temperature).softmax(-1)
    return temperature**2 * (p_t * (p_t / p_s).log()).sum(-1)


def test_golden_value_and_gradient() -> None:
    with np.load(GOLDEN / "kd_t4.npz") as data:
        student, teacher, value, gradient = (
            torch.from_numpy(data[name])
            for name in ("in_logits_student", "in_logits_teacher", "out_loss", "grad_logits_student")
        )
    student.requires_grad_()
    loss = kd_loss(student, teacher, temperature=4.0)
    loss.backward()
    torch.testing.assert_close(loss, value, rtol=1e-10, atol=0)
    torch.testing.assert_close(student.grad, gradient, rtol=1e-8, atol=1e-11)


@quick
@given(seeds, temperatures)
def test_is_the_mean_of_the_definition(seed: int, temperature: float) -> None:
    student, teacher = pair(seed)
    torch.testing.assert_close(
        kd_loss(student, teacher, temperature),
        plain_kd(student, teacher, temperature).mean(),
        rtol=1e-9,
        atol=1e-12,
    )


@quick
@given(seeds, temperatures)
def test_gradient_is_hintons(seed: int, temperature: float) -> None:
    student, teacher = pair(seed)
    kd_loss(student, teacher, temperature).backward()
    wanted = temperature / 5 * ((student / temperature).softmax(-1) - (teacher / temperature).softmax(-1))
    torch.testing.assert_close(student.grad, wanted.detach(), rtol=1e-9, atol=1e-14)


@quick
@given(seeds, temperatures, st.floats(-1e3, 1e3))
def test_a_constant_a_row_changes_nothing(seed: int, temperature: float, shift: float) -> None:
    student, teacher = pair(seed)
    shifts = shift * torch.arange(5, dtype=torch.float64)[:, None]
    torch.testing.assert_close(
        kd_loss(student + shifts, teacher - shifts, temperature),
        kd_loss(student, teacher, temperature),
        rtol=1e-8,
        atol=1e-9,
    )


@quick
@given(seeds, temperatures)
def test_zero_with_zero_gradient_at_equality_and_positive_elsewhere(seed: int, temperature: float) -> None:
    student, teacher = pair(seed)
    assert kd_loss(student, teacher, temperature) > 0
    same = kd_loss(student, student.detach(), temperature)
    same.backward()
    assert same == 0
    assert student.grad is not None
    assert student.grad.abs().max() < 1e-12


@quick
@given(seeds)
def test_order_of_classes_and_rows_does_not_matter(seed: int) -> None:
    student, teacher = pair(seed)
    generator = torch.Generator().manual_seed(seed)
    rows, classes = torch.randperm(5, generator=generator), torch.randperm(7, generator=generator)
    torch.testing.assert_close(
        kd_loss(student[rows][:, classes], teacher[rows][:, classes]),
        kd_loss(student, teacher),
        rtol=1e-10,
        atol=1e-12,
    )


def test_gradcheck() -> None:
    student, teacher = pair(1, rows=3, classes=4)
    mask, weight = torch.tensor([True, False, True]), torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda s: kd_loss(s, teacher, 2.0, mask, weight), student)


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.float32])
def test_mask_averages_over_the_rows_that_count(dtype: torch.dtype) -> None:
    student, teacher = pair(2)
    mask = torch.tensor([1, 0, 1, 1, 0]).to(dtype)
    loss = kd_loss(student, teacher, mask=mask)
    loss.backward()
    kept = torch.tensor([0, 2, 3])
    torch.testing.assert_close(loss, kd_loss(student[kept], teacher[kept]))
    assert student.grad is not None
    assert (student.grad[[1, 4]] == 0).all()
    assert (student.grad[kept] != 0).all()


def test_serves_tokens() -> None:
    student, teacher = (logits.detach().reshape(2, 3, 7) for logits in pair(3, rows=6))
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
    weight = torch.rand(2, 3, dtype=torch.float64)
    rows = plain_kd(student, teacher, 4.0) * weight
    torch.testing.assert_close(kd_loss(student, teacher, 4.0, mask, weight), rows[mask.bool()].mean())
    torch.testing.assert_close(kd_loss(student, teacher, 4.0, weight=weight), rows.mean())


def test_weight_is_multiplied_in_before_an_unweighted_mean() -> None:
    student, teacher = pair(4)
    torch.testing.assert_close(kd_loss(student, teacher, weight=3), 3 * kd_loss(student, teacher))
    torch.testing.assert_close(
        kd_loss(student, teacher, weight=torch.tensor(3.0)), 3 * kd_loss(student, teacher)
    )
    torch.testing.assert_close(
        kd_loss(student, teacher, weight=torch.tensor([0.0, 0.0, 2.0, 0.0, 0.0])),
        2 * kd_loss(student[2:3], teacher[2:3]) / 5,
    )


@pytest.mark.parametrize("mask", [torch.zeros(4), None], ids=["empty mask", "no rows"])
def test_nothing_that_counts_is_zero_with_a_gradient(mask: Tensor | None) -> None:
    student = torch.randn(4 if mask is not None else 0, 6, requires_grad=True)
    loss = kd_loss(student, torch.randn_like(student), mask=mask)
    loss.backward()
    assert loss == 0
    assert student.grad is not None
    assert (student.grad == 0).all()


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_finite_at_extremes(temperature: float) -> None:
    student = torch.tensor([[1e4, -1e4, 0.0], [-1e4, 1e4, 1e4]], requires_grad=True)
    loss = kd_loss(student, -student.detach(), temperature)
    loss.backward()
    assert loss.isfinite()
    assert loss > 1e3
    assert student.grad is not None
    assert student.grad.isfinite().all()
    assert student.grad.abs().sum() > 0.1


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(dtype: torch.dtype) -> None:
    student, teacher = (logits.detach().to(dtype) for logits in pair(5))
    loss = kd_loss(student, teacher)
    assert loss.dtype == torch.float32
    assert loss == kd_loss(student.float(), teacher.float())


def test_float32_is_as_good_as_its_dtype_also_inside_autocast() -> None:
    student, teacher = (logits.detach() for logits in pair(6, rows=47, classes=123))
    exact = kd_loss(student, teacher)
    with torch.autocast("cpu", torch.bfloat16):
        loss = kd_loss(student.float(), teacher.float())
    torch.testing.assert_close(loss.double(), exact, rtol=1e-5, atol=0)


def test_the_teacher_gets_no_gradient() -> None:
    student, teacher = pair(7)
    teacher.requires_grad_()
    kd_loss(student, teacher).backward()
    assert teacher.grad is None


def test_bad_input() -> None:
    student, teacher = pair(8)
    for temperature in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match=r"temperature must be finite and above 0"):
            kd_loss(student, teacher, temperature)
    # Without the shape checks that tests switch on, as a user runs it.
    with pytest.raises(ValueError, match=r"student_logits \[5, 7\], teacher_logits \[5, 6\]"):
        unwrap(kd_loss)(student, teacher[:, :6])
    with pytest.raises(ValueError, match=r"weight \[5, 1\]"):
        unwrap(kd_loss)(student, teacher, weight=torch.ones(5, 1))


@quick
@given(seeds, st.integers(1, 3))
def test_softmax_without_is_the_softmax_of_the_rest(seed: int, excluded: int) -> None:
    logits, _ = pair(seed)
    generator = torch.Generator().manual_seed(seed)
    exclude = torch.rand(5, 7, generator=generator).argsort(1)[:, :excluded]
    rest = torch.ones(5, 7, dtype=torch.bool).scatter(1, exclude, False)
    log_probs, probs = log_softmax_without(logits, exclude), softmax_without(logits, exclude)
    wanted = logits[rest].reshape(5, 7 - excluded).log_softmax(1)
    torch.testing.assert_close(log_probs[rest].reshape(wanted.shape), wanted)
    torch.testing.assert_close(probs[rest].reshape(wanted.shape), wanted.exp())
    assert (log_probs[~rest] == 0).all()
    assert (probs[~rest] == 0).all()
    gradient = torch.autograd.grad((log_probs * torch.rand(5, 7, dtype=torch.float64)).sum(), logits)[0]
    assert (gradient[~rest] == 0).all()


def test_softmax_without_is_exact_beside_a_huge_logit() -> None:
    logits = torch.tensor([[1e4, 1.0, 0.0]], requires_grad=True)
    log_probs = log_softmax_without(logits, torch.tensor([[0]]))
    torch.testing.assert_close(log_probs[0, 1:], torch.tensor([1.0, 0.0]).log_softmax(0))
    log_probs.sum().backward()
    assert logits.grad is not None
    assert logits.grad.isfinite().all()
