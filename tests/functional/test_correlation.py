"""dist_loss: reference values, the definition, its limits, extremes, and what it refuses."""

from __future__ import annotations

from inspect import unwrap
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tutelage.functional import dist_loss

GOLDEN = Path(__file__).parent.parent / "golden" / "baselines"
seeds = st.integers(0, 2**31 - 1)
quick = settings(max_examples=25, deadline=None)
ROWS, CLASSES = 6, 5


def pair(seed: int, rows: int = ROWS, classes: int = CLASSES) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    both = 2 * torch.randn(2, rows, classes, generator=generator, dtype=torch.float64)
    return both[0].requires_grad_(), both[1]


def mean_correlation(a: Tensor, b: Tensor) -> Tensor:
    """Over the rows of two matrices, by torch's own correlation."""
    return torch.stack([torch.corrcoef(torch.stack(rows))[0, 1] for rows in zip(a, b, strict=True)]).mean()


@pytest.mark.parametrize(("case", "weight"), [("dist_default", 1.0), ("dist_cifar_2_2", 2.0)])
def test_golden_value_and_gradient(case: str, weight: float) -> None:
    with np.load(GOLDEN / f"{case}.npz") as data:
        arrays = {name: torch.from_numpy(np.asarray(data[name])) for name in data}
    student = arrays["in_logits_student"].requires_grad_()
    loss = dist_loss(student, arrays["in_logits_teacher"], weight, weight)
    loss.backward()
    torch.testing.assert_close(loss, arrays["out_loss"], rtol=1e-10, atol=0)
    torch.testing.assert_close(student.grad, arrays["grad_logits_student"], rtol=1e-8, atol=1e-11)


@quick
@given(seeds, st.floats(0.5, 8.0))
def test_is_the_definition(seed: int, temperature: float) -> None:
    student, teacher = pair(seed)
    p_s, p_t = (student / temperature).softmax(1), (teacher / temperature).softmax(1)
    wanted = 0.5 * (1 - mean_correlation(p_s, p_t)) + 2.0 * (1 - mean_correlation(p_s.T, p_t.T))
    loss = dist_loss(student, teacher, 0.5, 2.0, temperature)
    torch.testing.assert_close(loss, wanted * temperature**2, rtol=1e-4, atol=1e-5)


@quick
@given(seeds)
def test_almost_zero_at_equality_and_positive_elsewhere(seed: int) -> None:
    student, teacher = pair(seed)
    assert dist_loss(student, teacher) > 1e-3
    same = dist_loss(student, student.detach())
    same.backward()
    assert 0 <= same < 1e-4
    assert student.grad is not None
    assert student.grad.abs().max() < 1e-4


@quick
@given(seeds, st.floats(-1e3, 1e3))
def test_constants_and_order_do_not_matter(seed: int, shift: float) -> None:
    student, teacher = pair(seed)
    generator = torch.Generator().manual_seed(seed)
    rows, classes = torch.randperm(ROWS, generator=generator), torch.randperm(CLASSES, generator=generator)
    moved = dist_loss(student[rows][:, classes] + shift, teacher[rows][:, classes] - shift)
    torch.testing.assert_close(moved, dist_loss(student, teacher), rtol=1e-8, atol=1e-10)


def test_gradcheck() -> None:
    student, teacher = pair(1, rows=3, classes=4)
    assert torch.autograd.gradcheck(lambda s: dist_loss(s, teacher, 0.5, 2.0, 2.0), student)


def test_in_one_row_only_its_classes_correlate() -> None:
    student, teacher = pair(2, rows=1)
    loss = dist_loss(student, teacher, beta=2.0, gamma=3.0)
    torch.testing.assert_close(loss, 3.0 + dist_loss(student, teacher, beta=2.0, gamma=0.0))
    by_classes, by_rows = (
        torch.autograd.grad(dist_loss(student, teacher, *weights), student)[0]
        for weights in ((2.0, 0.0), (2.0, 3.0))
    )
    assert by_rows.isfinite().all()
    torch.testing.assert_close(by_rows, by_classes)
    assert dist_loss(student, teacher, beta=0.0, gamma=3.0) == 3.0


def test_equal_probabilities_have_no_correlation() -> None:
    student = torch.zeros(4, 5, dtype=torch.float64, requires_grad=True)
    loss = dist_loss(student, pair(3, rows=4)[1])
    loss.backward()
    torch.testing.assert_close(loss, torch.tensor(2.0, dtype=torch.float64))
    assert student.grad is not None
    assert student.grad.isfinite().all()


def test_finite_at_extremes() -> None:
    student = torch.tensor([[1e4, -1e4, 0.0], [-1e4, 1e4, 1e4]], requires_grad=True)
    loss = dist_loss(student, -student.detach())
    loss.backward()
    assert loss.isfinite()
    assert loss > 1
    assert student.grad is not None
    assert student.grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(dtype: torch.dtype) -> None:
    student, teacher = (logits.detach().to(dtype) for logits in pair(5))
    loss = dist_loss(student, teacher)
    assert loss.dtype == torch.float32
    assert loss == dist_loss(student.float(), teacher.float())


def test_the_teacher_gets_no_gradient() -> None:
    student, teacher = pair(6)
    teacher.requires_grad_()
    dist_loss(student, teacher).backward()
    assert teacher.grad is None


def test_no_rows_give_zero_with_a_gradient() -> None:
    student = torch.zeros(0, 4, requires_grad=True)
    loss = dist_loss(student, torch.zeros(0, 4))
    loss.backward()
    assert loss == 0
    assert student.grad is not None


def test_bad_input() -> None:
    student, teacher = pair(7)
    loss = unwrap(dist_loss)
    with pytest.raises(ValueError, match=r"at least 2 classes; got 1"):
        loss(student[:, :1], teacher[:, :1])
    with pytest.raises(ValueError, match=r"student_logits \[6, 5\], teacher_logits \[6, 4\]"):
        loss(student, teacher[:, :4])
    for name in ("temperature", "eps"):
        with pytest.raises(ValueError, match=rf"{name} must be finite and above 0"):
            loss(student, teacher, **{name: 0.0})
