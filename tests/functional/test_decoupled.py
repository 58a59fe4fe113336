"""dkd_loss: reference values, the definition, its limits, extremes, and what it refuses."""

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

from tutelage.functional import dkd_loss, dkd_terms, kd_loss
from tutelage.functional.checks import TargetError

GOLDEN = Path(__file__).parent.parent / "golden" / "baselines"
seeds = st.integers(0, 2**31 - 1)
temperatures = st.floats(0.5, 8.0)
quick = settings(max_examples=25, deadline=None)
ROWS, CLASSES = 5, 7


def draw(seed: int, rows: int = ROWS, classes: int = CLASSES) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    both = 3 * torch.randn(2, rows, classes, generator=generator, dtype=torch.float64)
    return both[0].requires_grad_(), both[1], torch.randint(classes, (rows,), generator=generator)


def plain_dkd(student: Tensor, teacher: Tensor, target: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Both parts, straight from the definition in probabilities, row by row."""
    parts = []
    for s, t, y in zip(student / temperature, teacher / temperature, target, strict=True):
        others = torch.arange(len(s)) != y
        p_s, p_t = s.softmax(0), t.softmax(0)
        binary_s, binary_t = (torch.stack([p[y], p[others].sum()]) for p in (p_s, p_t))
        q_s, q_t = s[others].softmax(0), t[others].softmax(0)
        kls = [(b * (b / a).log()).sum() for a, b in ((binary_s, binary_t), (q_s, q_t))]
        parts.append(torch.stack(kls) * temperature**2)
    target_part, nontarget = torch.stack(parts).mean(0)
    return target_part, nontarget


@pytest.mark.parametrize(
    ("case", "beta", "temperature"), [("dkd_default", 8.0, 4.0), ("dkd_t1", 0.5, 1.0)], ids=str
)
def test_golden_value_and_gradient(case: str, beta: float, temperature: float) -> None:
    with np.load(GOLDEN / f"{case}.npz") as data:
        arrays = {name: torch.from_numpy(np.asarray(data[name])) for name in data}
    student = arrays["in_logits_student"].requires_grad_()
    loss = dkd_loss(student, arrays["in_logits_teacher"], arrays["in_labels"], 1.0, beta, temperature)
    loss.backward()
    torch.testing.assert_close(loss, arrays["out_loss"], rtol=1e-10, atol=0)
    torch.testing.assert_close(student.grad, arrays["grad_logits_student"], rtol=1e-8, atol=1e-11)


@quick
@given(seeds, temperatures)
def test_parts_are_the_definition(seed: int, temperature: float) -> None:
    student, teacher, target = draw(seed)
    terms = dkd_terms(student, teacher, target, 0.5, 3.0, temperature)
    wanted = plain_dkd(student, teacher, target, temperature)
    torch.testing.assert_close((terms.target, terms.nontarget), wanted, rtol=1e-8, atol=1e-10)
    torch.testing.assert_close(terms.total, 0.5 * wanted[0] + 3.0 * wanted[1], rtol=1e-8, atol=1e-10)


@quick
@given(seeds, temperatures)
def test_kd_is_the_target_part_and_the_rest_by_its_share(seed: int, temperature: float) -> None:
    student, teacher, target = draw(seed, rows=1)
    rest = 1 - (teacher / temperature).softmax(1)[0, target[0]]
    terms = dkd_terms(student, teacher, target, 1.0, 1.0, temperature)
    torch.testing.assert_close(
        kd_loss(student, teacher, temperature), terms.target + rest * terms.nontarget, rtol=1e-8, atol=1e-10
    )


@quick
@given(seeds, st.floats(-1e3, 1e3))
def test_zero_with_zero_gradient_where_logits_agree_up_to_a_constant(seed: int, shift: float) -> None:
    student, teacher, target = draw(seed)
    assert dkd_loss(student, teacher, target) > 0
    same = dkd_loss(student, student.detach() + shift, target)
    same.backward()
    assert same.abs() < 1e-11
    assert student.grad is not None
    assert student.grad.abs().max() < 1e-11
    equal = dkd_loss(student, student.detach(), target)
    assert equal == 0


@quick
@given(seeds)
def test_order_of_classes_and_rows_does_not_matter(seed: int) -> None:
    student, teacher, target = draw(seed)
    generator = torch.Generator().manual_seed(seed)
    rows, classes = torch.randperm(ROWS, generator=generator), torch.randperm(CLASSES, generator=generator)
    moved = classes.argsort()[target][rows]
    torch.testing.assert_close(
        dkd_loss(student[rows][:, classes], teacher[rows][:, classes], moved),
        dkd_loss(student, teacher, target),
        rtol=1e-10,
        atol=1e-12,
    )


def test_gradcheck() -> None:
    student, teacher, target = draw(1, rows=3, classes=4)
    assert torch.autograd.gradcheck(lambda s: dkd_terms(s, teacher, target, 1.0, 2.0, 2.0), student)


def test_with_two_classes_there_is_no_other_part() -> None:
    student, teacher, target = draw(2, classes=2)
    terms = dkd_terms(student, teacher, target)
    assert terms.nontarget == 0
    assert torch.autograd.grad(terms.nontarget, student, retain_graph=True)[0].abs().max() == 0
    torch.testing.assert_close(terms.target, kd_loss(student, teacher, 4.0))


@pytest.mark.parametrize("dtype", [torch.int32, torch.uint8])
def test_any_integers_are_ids(dtype: torch.dtype) -> None:
    student, teacher, target = draw(3)
    assert dkd_loss(student, teacher, target.to(dtype)) == dkd_loss(student, teacher, target)


def test_the_other_part_does_not_see_the_targets_logit() -> None:
    student = torch.tensor([[1e4, 1.0, 0.0, -1.0]], dtype=torch.float64, requires_grad=True)
    teacher = torch.tensor([[-1e4, 0.0, 2.0, 1.0]], dtype=torch.float64)
    terms = dkd_terms(student, teacher, torch.tensor([0]), temperature=1.0)
    torch.testing.assert_close(terms.nontarget, kd_loss(student[:, 1:], teacher[:, 1:], 1.0))
    assert torch.autograd.grad(terms.nontarget, student)[0][0, 0].abs() < 1e-15


@pytest.mark.parametrize("temperature", [1.0, 4.0])
@pytest.mark.parametrize("target", [[0, 0], [1, 2]], ids=str)
def test_finite_at_extremes(temperature: float, target: list[int]) -> None:
    student = torch.tensor([[1e4, -1e4, 0.0], [-1e4, 1e4, 1e4]], requires_grad=True)
    loss = dkd_loss(student, -student.detach(), torch.tensor(target), temperature=temperature)
    loss.backward()
    assert loss.isfinite()
    assert loss > 1e3
    assert student.grad is not None
    assert student.grad.isfinite().all()
    assert student.grad.abs().sum() > 0.1


def test_a_large_constant_a_row_costs_float32_no_digits() -> None:
    student, teacher, target = (values.detach() for values in draw(4, rows=64, classes=100))
    shifted = (student.float() + 1024.0, teacher.float() - 1024.0)
    exact = dkd_loss(shifted[0].double(), shifted[1].double(), target)
    torch.testing.assert_close(dkd_loss(*shifted, target).double(), exact, rtol=2e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(dtype: torch.dtype) -> None:
    student, teacher, target = (values.detach() for values in draw(5))
    student, teacher = student.to(dtype), teacher.to(dtype)
    loss = dkd_loss(student, teacher, target)
    assert loss.dtype == torch.float32
    assert loss == dkd_loss(student.float(), teacher.float(), target)


def test_the_teacher_gets_no_gradient() -> None:
    student, teacher, target = draw(6)
    teacher.requires_grad_()
    dkd_loss(student, teacher, target).backward()
    assert teacher.grad is None


def test_no_rows_give_zero_with_a_gradient() -> None:
    student = torch.zeros(0, 4, requires_grad=True)
    loss = dkd_loss(student, torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64))
    loss.backward()
    assert loss == 0
    assert student.grad is not None


def test_bad_input() -> None:
    student, teacher, target = draw(7)
    loss = unwrap(dkd_loss)
    for temperature in (0.0, -1.0, math.nan):
        with pytest.raises(ValueError, match=r"temperature must be finite and above 0"):
            loss(student, teacher, target, temperature=temperature)
    terms = unwrap(dkd_terms)
    with pytest.raises(ValueError, match=r"student_logits \[5, 7\], teacher_logits \[5, 6\]"):
        terms(student, teacher[:, :6], target)
    with pytest.raises(ValueError, match=r"takes class ids \[5\], no distributions \[5, 7\]"):
        terms(student, teacher, teacher.softmax(1))
    with pytest.raises(ValueError, match=r"class ids must be integers"):
        terms(student, teacher, target.double())
    with pytest.raises(ValueError, match=r"target must be class ids \[5\]"):
        terms(student, teacher, target[:4])
    with pytest.raises(TargetError, match=r"target 7 names none of the 7 classes"):
        terms(student, teacher, target.clone().index_fill_(0, torch.tensor([2]), 7))
    with pytest.raises(ValueError, match=r"at least 2 classes; got 1"):
        terms(student[:, :1], teacher[:, :1], torch.zeros(5, dtype=torch.int64))
