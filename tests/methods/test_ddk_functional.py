"""DDK: reference values, the card's hand values, properties of the factors, draws, extremes, bad input."""

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

from tutelage.functional import (
    ddk_draw_domains,
    ddk_initial_factor,
    ddk_loss,
    ddk_update_factor,
    domain_perplexity,
    forward_kl_loss,
)

GOLDEN = Path(__file__).parent.parent / "golden" / "ddk"
seeds = st.integers(0, 2**31 - 1)
quick = settings(max_examples=25, deadline=None)
close = partial(torch.testing.assert_close, rtol=1e-8, atol=1e-11)
double = partial(torch.tensor, dtype=torch.float64)


def arrays(case: str) -> dict[str, Tensor]:
    with np.load(GOLDEN / f"{case}.npz") as data:
        return {name: torch.from_numpy(data[name]) for name in data}


def pair(seed: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    student, teacher = 2 * torch.randn(2, 2, 4, 6, generator=generator, dtype=torch.float64)
    target = torch.randint(6, (2, 4), generator=generator)
    target[0, 1] = -100
    return student.requires_grad_(), teacher, target


def test_golden_factors() -> None:
    data = arrays("factors")
    student, teacher = data["in_student_perplexity_2"], data["in_teacher_perplexity_2"]
    first = ddk_initial_factor(data["in_student_perplexity"], data["in_teacher_perplexity"])
    close(first, data["out_factor"])
    close(ddk_initial_factor(student, teacher), data["out_factor_2"])
    close(ddk_update_factor(data["in_factor"], student, teacher), data["out_factor_3"])
    close(ddk_update_factor(data["in_factor"], student, teacher, alpha=0.9), data["out_factor_4"])
    last = ddk_update_factor(data["in_factor"], data["in_student_perplexity_3"], teacher, alpha=1.0)
    close(last, data["out_factor_5"])


def test_golden_perplexity_and_loss() -> None:
    data = arrays("perplexity")
    close(domain_perplexity(data["in_nll"], data["in_domain"], None, 4), data["out_perplexity"])
    close(domain_perplexity(data["in_nll"], data["in_domain"], data["in_mask"], 4), data["out_perplexity_2"])
    data = arrays("loss")
    inputs = data["in_teacher_logits"], data["in_target"]
    student = data["in_student_logits"].clone().requires_grad_()
    terms = ddk_loss(student, *inputs)
    for found, name in zip(terms, ("loss", "ce", "kl"), strict=True):
        close(found, data[f"out_{name}"])
    terms.loss.backward()
    close(student.grad, data["grad_student_logits"])
    student = data["in_student_logits"].clone().requires_grad_()
    terms = ddk_loss(student, *inputs, data["in_mask"], gamma=0.3, temperature=2.0)
    for found, name in zip(terms, ("loss", "ce", "kl"), strict=True):
        close(found, data[f"out_{name}_2"])
    terms.loss.backward()
    close(student.grad, data["grad_student_logits_2"])


def test_factors_by_hand() -> None:
    student, teacher = double([2.0, 4.0]), double([2.0, 2.0])
    first = ddk_initial_factor(student, teacher)
    assert first.tolist() == pytest.approx([0.268941, 0.731059], abs=1e-6)
    second = ddk_update_factor(first, student, teacher)
    assert second.tolist() == pytest.approx([0.309601, 0.690399], abs=1e-6)


@quick
@given(st.lists(st.floats(1, 50), min_size=1, max_size=8), st.floats(0, 1), seeds)
def test_factors_are_shares_with_a_floor_and_follow_the_domains_order(
    perplexity: list[float], alpha: float, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    student = double(perplexity)
    teacher = 1 + 3 * torch.rand(len(perplexity), generator=generator, dtype=torch.float64)
    shares = torch.rand(len(perplexity), generator=generator, dtype=torch.float64).softmax(0)
    found = ddk_update_factor(shares, student, teacher, alpha=alpha)
    close(found.sum(), double(1.0))
    assert (found >= (1 - alpha) / len(perplexity) - 1e-12).all()
    order = torch.randperm(len(perplexity), generator=generator)
    close(ddk_update_factor(shares[order], student[order], teacher[order], alpha=alpha), found[order])
    uniform = torch.full_like(shares, 1 / len(shares))
    close(ddk_update_factor(uniform, 3 * teacher, teacher, alpha=alpha), uniform)
    close(ddk_initial_factor(3 * teacher, teacher), uniform)


def test_factors_at_extremes() -> None:
    exploding = double([1e30, 1.0, 1.0])
    teacher = double([2.0, 1.0, 1.0])
    assert ddk_initial_factor(exploding, teacher).tolist() == [1, 0, 0]
    found = ddk_update_factor(torch.full((3,), 1 / 3, dtype=torch.float64), exploding, teacher)
    close(found, double([0.5 + 0.5 / 3, 0.5 / 3, 0.5 / 3]))
    dead = ddk_update_factor(double([0.0, 1.0]), double([9.0, 2.0]), double([1.0, 1.0]), alpha=1.0)
    assert dead.tolist() == [0, 1]  # without a floor it stays there
    assert ddk_initial_factor(torch.tensor([7.0]), torch.tensor([2.0])).tolist() == [1]
    assert ddk_update_factor(torch.ones(1), torch.tensor([7.0]), torch.tensor([2.0])).tolist() == [1]
    assert ddk_initial_factor(torch.ones(2).half(), torch.ones(2).half()).dtype == torch.float32


def test_factors_refuse() -> None:
    good = double([2.0, 3.0])
    for bad in (0.0, -1.0, math.nan, math.inf):
        for side, arguments in (
            ("student", (double([2.0, bad]), good)),
            ("teacher", (good, double([2.0, bad]))),
        ):
            with pytest.raises(ValueError, match=rf"the {side}'s perplexity on domain 1 is {bad}"):
                ddk_initial_factor(*arguments)
    with pytest.raises(ValueError, match=r"perplexities must be \[domains\], at least one; got \[0\]"):
        ddk_initial_factor(good[:0], good[:0])
    with pytest.raises(ValueError, match=r"shapes must agree"):
        unwrap(ddk_initial_factor)(good, good[:1])
    with pytest.raises(ValueError, match=r"factor \[1\], perplexity \[2\]"):
        unwrap(ddk_update_factor)(torch.ones(1), good, good)
    with pytest.raises(ValueError, match=r"alpha must lie in \[0, 1\]; got 1.5"):
        ddk_update_factor(double([0.5, 0.5]), good, good, alpha=1.5)
    for shares in ([0.5, 0.6], [1.5, -0.5], [math.nan, 1.0]):
        with pytest.raises(ValueError, match=r"factor must hold shares from 0 on that sum to 1; got \["):
            ddk_update_factor(double(shares), good, good)
        with pytest.raises(ValueError, match=r"factor must hold shares"):
            ddk_draw_domains(double(shares), 3)


def test_draws_follow_the_shares_and_the_seed() -> None:
    shares = double([0.1, 0.0, 0.6, 0.3])

    def draws(systematic: bool, seed: int = 0, n: int = 4000) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        found: Tensor = ddk_draw_domains(shares, n, generator=generator, systematic=systematic)
        return found

    for systematic in (True, False):
        found = draws(systematic)
        assert found.dtype == torch.int64
        assert torch.equal(found, draws(systematic))
        assert not torch.equal(found, draws(systematic, seed=1))
        counts = found.bincount(minlength=4)
        assert counts[1] == 0
        error = 1e-9 if systematic else 4 * math.sqrt(0.25 / 4000)
        assert ((counts.double() / 4000 - shares).abs() <= error).all()
        assert draws(systematic, n=0).tolist() == []
        assert ddk_draw_domains(torch.ones(1), 3, systematic=systematic).tolist() == [0, 0, 0]
    with pytest.raises(ValueError, match=r"n must be at least 0; got -1"):
        ddk_draw_domains(shares, -1)
    with pytest.raises(ValueError, match=r"factor must be \[domains\], at least one; got \[1, 4\]"):
        unwrap(ddk_draw_domains)(shares[None], 3)


@quick
@given(st.integers(1, 6), st.integers(0, 50), seeds)
def test_systematic_counts_are_off_by_less_than_one(domains: int, n: int, seed: int) -> None:
    shares = torch.rand(domains, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).softmax(
        0
    )
    counts = ddk_draw_domains(shares, n, systematic=True).bincount(minlength=domains)
    assert counts.sum() == n
    assert ((counts.double() - n * shares).abs() < 1).all()


def test_perplexity_is_of_all_tokens_and_not_of_sequences() -> None:
    nll = double([1.0, 3.0, 2.0, math.nan])
    domain, mask = torch.tensor([0, 0, 1, 1]), torch.tensor([True, True, True, False])
    close(domain_perplexity(nll, domain, mask, 2), double([math.exp(2), math.exp(2)]))
    many = torch.full((100_000,), 0.1)  # a float32 sum would drift
    found = domain_perplexity(many, torch.zeros(100_000, dtype=torch.int64), None, 1)
    torch.testing.assert_close(found, torch.tensor([math.exp(0.1)]), rtol=1e-6, atol=0)
    assert domain_perplexity(nll[:1].half(), domain[:1], None, 1).dtype == torch.float32


def test_perplexity_refuses() -> None:
    nll, domain = torch.ones(3), torch.tensor([0, 0, 1])
    with pytest.raises(ValueError, match=r"domain 1 has no token that counts"):
        domain_perplexity(nll, domain, torch.tensor([1, 1, 0]), 2)
    with pytest.raises(ValueError, match=r"n_domains must be at least 1"):
        domain_perplexity(nll, domain, None, 0)
    with pytest.raises(IndexError, match=r"target 1 names none of the 1"):
        domain_perplexity(nll, domain, None, 1)
    with pytest.raises(ValueError, match=r"nll \[3\], mask \[2\]"):
        unwrap(domain_perplexity)(nll, domain, torch.ones(2), 2)


@quick
@given(seeds, st.floats(0, 3), st.floats(0.5, 3))
def test_loss_is_its_two_parts_over_the_same_tokens(seed: int, gamma: float, temperature: float) -> None:
    student, teacher, target = pair(seed)
    mask = torch.tensor([[1, 1, 1, 0], [0, 1, 1, 1]])
    counts = (mask == 1) & (target != -100)
    terms = ddk_loss(student, teacher, target, mask, gamma=gamma, temperature=temperature)
    close(terms.ce, torch.nn.functional.cross_entropy(student[counts], target[counts]))
    close(terms.kl, forward_kl_loss(student[counts], teacher[counts], temperature=temperature))
    close(terms.loss, terms.ce + gamma * terms.kl)
    shifted = ddk_loss(student + 3, teacher - 3, target, mask, gamma=gamma, temperature=temperature)
    close(shifted.loss, terms.loss)
    assert ddk_loss(student, student.detach(), target, mask).kl.abs() < 1e-15


def test_loss_gradient_is_the_numerical_one() -> None:
    student, teacher, target = pair(1)
    assert torch.autograd.gradcheck(lambda s: ddk_loss(s, teacher, target, temperature=2.0).loss, student)
    teacher.requires_grad_()
    ddk_loss(student, teacher, target).loss.backward()
    assert teacher.grad is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_extremes_are_finite_and_nothing_counted_is_zero_with_a_gradient(dtype: torch.dtype) -> None:
    _, _, target = pair(2)
    student = torch.full((2, 4, 6), 1e4, dtype=dtype)
    student[..., ::2] = -1e4
    for targets, mask in ((target, None), (torch.full_like(target, -100), None), (target, torch.zeros(2, 4))):
        leaf = student.clone().requires_grad_()
        terms = ddk_loss(leaf, -student, targets, mask)
        terms.loss.backward()
        assert terms.loss.dtype == torch.float32
        assert terms.loss.isfinite()
        assert leaf.grad is not None
        assert leaf.grad.isfinite().all()
        if targets is not target or mask is not None:
            assert terms.loss == 0
            assert (leaf.grad == 0).all()


def test_loss_refuses() -> None:
    student, teacher, target = pair(3)
    with pytest.raises(ValueError, match=r"gamma must be finite and at least 0; got -1"):
        ddk_loss(student, teacher, target, gamma=-1)
    with pytest.raises(ValueError, match=r"temperature must be finite and above 0"):
        ddk_loss(student, teacher, target, temperature=0)
    with pytest.raises(ValueError, match=r"vocabularies of 6 and 5"):
        unwrap(ddk_loss)(student, teacher[..., :5], target)
    with pytest.raises(ValueError, match=r"target must hold one value a token, \[2, 4\]; got \[4\]"):
        unwrap(ddk_loss)(student, teacher, target[0])
    with pytest.raises(IndexError, match=r"target 6 names none of the 6"):
        ddk_loss(student, teacher, torch.where(target == -100, -100, 6))
