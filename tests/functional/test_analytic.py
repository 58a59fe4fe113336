"""Divergences with written-out gradients: against autograd, their properties, and what is refused."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from fused_cases import DIVERGENCES, analytic, named, plain
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tutelage.functional import adaptive_kl_loss
from tutelage.functional.analytic import ForwardKL, Interpolated, make_divergence
from tutelage.functional.fused_vocabulary import Vocabulary

seeds = st.integers(0, 2**31 - 1)
quick = settings(max_examples=15, deadline=None)
every = pytest.mark.parametrize("key", DIVERGENCES)


def pair(seed: int, rows: int = 5, vocabulary: int = 37, scale: float = 3.0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    student, teacher = scale * torch.randn(2, rows, vocabulary, generator=generator, dtype=torch.float64)
    return student, teacher


def by_row(key: str, student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Values and gradients of the plain loss, one row at a time."""
    student = student.clone().requires_grad_()
    values = torch.stack([plain(key, s[None], t[None]) for s, t in zip(student, teacher, strict=True)])
    (gradient,) = torch.autograd.grad(values.sum(), student)
    return values.detach(), gradient


@every
def test_value_and_gradient_are_those_of_the_plain_loss(key: str) -> None:
    student, teacher = pair(0)
    value, gradient = analytic(key)(student.log_softmax(-1), teacher.log_softmax(-1))
    wanted, slope = by_row(key, student, teacher)
    torch.testing.assert_close(value, wanted, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(gradient, slope, rtol=1e-10, atol=1e-13)


@every
def test_entries_of_minus_infinity_are_left_out_as_in_the_plain_loss(key: str) -> None:
    student, teacher = pair(1)
    student[:, 3] = teacher[:, 3] = -math.inf
    student[1, 5] = -math.inf
    teacher[2, 7] = -math.inf
    value, gradient = analytic(key)(student.log_softmax(-1), teacher.log_softmax(-1))
    wanted, slope = by_row(key, student, teacher)
    torch.testing.assert_close(value, wanted, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(gradient, slope, rtol=1e-10, atol=1e-13)


@every
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("size", [1e2, 1e4])
def test_finite_at_extreme_logits(key: str, dtype: torch.dtype, size: float) -> None:
    student, teacher = (logits.mul(size / 3).to(dtype) for logits in pair(2))
    value, gradient = analytic(key)(student.log_softmax(-1), teacher.log_softmax(-1))
    wanted, slope = by_row(key, student.double(), teacher.double())
    # A log-probability of that size is itself known to 1e-7 of it.
    torch.testing.assert_close(value.double(), wanted, rtol=1e-4, atol=1e-6 * size)
    torch.testing.assert_close(gradient.double(), slope, rtol=1e-3, atol=1e-6 * size)


@every
@quick
@given(seed=seeds)
def test_zero_at_equality_and_above_elsewhere(key: str, seed: int) -> None:
    if "cross-entropy" in key or named(key) == "taid" or key == "skewed_forward_kl, 1":
        key = "reverse_kl"
    student, teacher = (logits.log_softmax(-1) for logits in pair(seed))
    assert (analytic(key)(student, teacher)[0] > 0).all()
    value, gradient = analytic(key)(student, student)
    assert value.abs().max() < 1e-12
    assert gradient.abs().max() < 1e-12


@every
@quick
@given(seed=seeds)
def test_gradients_of_a_row_sum_to_zero(key: str, seed: int) -> None:
    student, teacher = (logits.log_softmax(-1) for logits in pair(seed))
    assert analytic(key)(student, teacher)[1].sum(-1).abs().max() < 1e-12


@every
@quick
@given(seed=seeds)
def test_order_of_the_vocabulary_does_not_matter(key: str, seed: int) -> None:
    student, teacher = (logits.log_softmax(-1) for logits in pair(seed))
    order = torch.randperm(student.shape[1], generator=torch.Generator().manual_seed(seed))
    value, gradient = analytic(key)(student, teacher)
    other, moved = analytic(key)(student[:, order], teacher[:, order])
    torch.testing.assert_close(other, value, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(moved, gradient[:, order], rtol=1e-9, atol=1e-12)


@every
def test_keeps_the_students_probabilities(key: str) -> None:
    student, teacher = (logits.log_softmax(-1) for logits in pair(3))
    q = student.exp()
    kept = q.clone()
    analytic(key).values(student, teacher, q, Vocabulary(q.shape[-1]), finite=True)
    assert torch.equal(q, kept)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_an_adaptive_head_of_all_mass_is_the_forward_kl(dtype: torch.dtype) -> None:
    student, teacher = (logits.log_softmax(-1).to(dtype) for logits in pair(6, 200, 301))
    found = make_divergence("adaptive_kl", mu=1)(student, teacher)
    torch.testing.assert_close(found, ForwardKL()(student, teacher), rtol=1e-5, atol=1e-6)
    assert make_divergence("adaptive_kl", mu=1)(student, student)[0].abs().max() < 1e-6


def test_taid_by_a_tensor_is_taid_by_a_number() -> None:
    student, teacher = (logits.log_softmax(-1) for logits in pair(4))
    by_tensor = Interpolated(torch.tensor(0.25))(student, teacher)
    by_number = Interpolated(0.25)(student, teacher)
    torch.testing.assert_close(by_tensor, by_number, rtol=1e-14, atol=1e-15)


@pytest.mark.parametrize("t", [0.0, 1.0])
def test_taid_at_its_ends(t: float) -> None:
    student, teacher = (logits.log_softmax(-1) for logits in pair(5))
    _, gradient = Interpolated(t)(student, teacher)
    wanted = student.exp() - (student if t == 0 else teacher).exp()
    torch.testing.assert_close(gradient, wanted, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("vocabulary", [40, 3000])
def test_the_adaptive_head_may_need_many_entries(vocabulary: int) -> None:
    student, teacher = pair(6, rows=3, vocabulary=vocabulary, scale=0.1)
    value, gradient = make_divergence("adaptive_kl", mu=0.6)(student.log_softmax(-1), teacher.log_softmax(-1))
    leaf = student.requires_grad_()
    wanted = torch.stack(
        [adaptive_kl_loss(s[None], t[None], mu=0.6) for s, t in zip(leaf, teacher, strict=True)]
    )
    (slope,) = torch.autograd.grad(wanted.sum(), leaf)
    torch.testing.assert_close(value, wanted.detach(), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(gradient, slope, rtol=1e-9, atol=1e-12)


def test_by_name_by_object_by_function() -> None:
    made = make_divergence("forward_kl", subtract_entropy=False)
    assert made == ForwardKL(subtract_entropy=False)
    assert make_divergence(made) is made
    assert make_divergence(torch.sub) is torch.sub


@pytest.mark.parametrize(
    ("arguments", "options", "says"),
    [
        (["forwards"], {}, r"must be one of forward_kl, .*; got 'forwards'"),
        (["reverse_kl"], {"beta": 0.1}, r"reverse_kl takes no options; got beta"),
        (["generalized_jsd"], {"bet": 0.1}, r"generalized_jsd takes beta; got bet"),
        (["generalized_jsd"], {"beta": 1.1}, r"beta must lie in \[0, 1\]; got 1.1"),
        (["skewed_forward_kl"], {"skew": -0.1}, r"skew must lie in \[0, 1\]; got -0.1"),
        (["skewed_reverse_kl"], {"skew": 2}, r"skew must lie in \[0, 1\]; got 2"),
        (["symmetric_kl"], {"weight": math.nan}, r"weight must lie in \[0, 1\]; got nan"),
        (["adaptive_kl"], {"mu": 1.5}, r"mu must lie in \[0, 1\]; got 1.5"),
        (["taid"], {"t": -1.0}, r"t must lie in \[0, 1\]; got -1.0"),
        (["taid"], {"t": torch.ones(2)}, r"t must be a single number; got a tensor of shape \[2\]"),
        ([ForwardKL()], {"beta": 0.1}, r"options belong to a divergence given by name; got beta"),
    ],
)
def test_refusals(arguments: list[Any], options: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        make_divergence(*arguments, **options)
