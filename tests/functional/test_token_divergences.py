"""The divergences of next-token distributions: reference values, definitions, bounds, extremes, what counts."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from inspect import unwrap
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tutelage.functional import (
    adaptive_kl_loss,
    adaptive_kl_weights,
    forward_kl,
    forward_kl_loss,
    generalized_jsd_loss,
    reverse_kl,
    reverse_kl_loss,
    skewed_forward_kl_loss,
    skewed_reverse_kl_loss,
    symmetric_kl_loss,
    total_variation_loss,
)
from tutelage.functional.tokens import token_nll

GOLDEN = Path(__file__).parent.parent / "golden" / "llm_baselines"
seeds = st.integers(0, 2**31 - 1)
shares = st.floats(0.0, 1.0)
quick = settings(max_examples=20, deadline=None)
close = partial(torch.testing.assert_close, rtol=1e-9, atol=1e-12)

LOSSES: dict[str, Callable[..., Tensor]] = {
    "forward": forward_kl_loss,
    "reverse": reverse_kl_loss,
    "symmetric": symmetric_kl_loss,
    "variation": total_variation_loss,
    "skewed_forward": skewed_forward_kl_loss,
    "skewed_reverse": skewed_reverse_kl_loss,
    "jsd": generalized_jsd_loss,
    "jsd_at_0": partial(generalized_jsd_loss, beta=0),
    "jsd_at_1": partial(generalized_jsd_loss, beta=1.0),
    "adaptive": adaptive_kl_loss,
}
every = pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)


def arrays(case: str) -> dict[str, Tensor]:
    with np.load(GOLDEN / f"{case}.npz") as data:
        return {name: torch.from_numpy(data[name]) for name in data}


def pair(seed: int, scale: float = 3.0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    student, teacher = scale * torch.randn(2, 2, 5, 7, generator=generator, dtype=torch.float64)
    return student.requires_grad_(), teacher


@pytest.mark.parametrize(
    ("loss", "name"),
    [
        (partial(forward_kl_loss, subtract_entropy=False), "forward_kl"),
        (reverse_kl_loss, "reverse_kl"),
        (partial(symmetric_kl_loss, subtract_entropy=False), "symmetric_kl"),
        (partial(generalized_jsd_loss, beta=0.1), "js_distance"),
        (total_variation_loss, "tv_distance"),
        (partial(skewed_forward_kl_loss, subtract_entropy=False), "skewed_forward_kl"),
        (skewed_reverse_kl_loss, "skewed_reverse_kl"),
    ],
)
def test_golden_distillm(loss: Callable[..., Tensor], name: str) -> None:
    data = arrays("token_divergences")
    student = data["in_student"].requires_grad_()
    found = loss(student, data["in_teacher"], target=data["in_label"])
    found.backward()
    torch.testing.assert_close(found, data[f"out_{name}"], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(student.grad, data[f"grad_{name}"], rtol=1e-5, atol=1e-6)


def test_golden_trl() -> None:
    data = arrays("gjsd_trl")
    for beta, value, gradient in zip(data["in_beta"], data["out_loss"], data["grad_student"], strict=True):
        student = data["in_student"].clone().requires_grad_()
        loss = generalized_jsd_loss(student, data["in_teacher"], target=data["in_label"], beta=float(beta))
        loss.backward()
        torch.testing.assert_close(loss, value, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(student.grad, gradient, rtol=1e-8, atol=1e-12)


def test_golden_akl() -> None:
    data = arrays("akl")
    student = data["in_student"].requires_grad_()
    head, tail = adaptive_kl_weights(student, data["in_teacher"])
    assert not head.requires_grad
    torch.testing.assert_close(head, data["out_head_weight"], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(tail, data["out_tail_weight"], rtol=1e-5, atol=1e-6)
    loss = adaptive_kl_loss(student, data["in_teacher"], target=data["in_label"])
    loss.backward()
    torch.testing.assert_close(loss, data["out_loss"], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(student.grad, data["grad_student"], rtol=1e-5, atol=1e-6)


@quick
@given(seeds, shares, st.floats(0.5, 4.0))
def test_definitions(seed: int, share: float, temperature: float) -> None:
    student, teacher = pair(seed)
    q, p = (student / temperature).softmax(-1), (teacher / temperature).softmax(-1)

    def kl(a: Tensor, b: Tensor) -> Tensor:
        return (a * (a / b).log()).sum(-1).mean()

    at = {"temperature": temperature}
    close(forward_kl_loss(student, teacher, **at), kl(p, q))
    close(reverse_kl_loss(student, teacher, **at), kl(q, p))
    close(symmetric_kl_loss(student, teacher, weight=share, **at), (1 - share) * kl(p, q) + share * kl(q, p))
    close(total_variation_loss(student, teacher, **at), 0.5 * (p - q).abs().sum(-1).mean())
    skewed = share * p + (1 - share) * q
    close(skewed_forward_kl_loss(student, teacher, skew=share, **at), kl(p, skewed))
    close(skewed_reverse_kl_loss(student, teacher, skew=share, **at), kl(q, share * q + (1 - share) * p))
    if 0 < share < 1:
        wanted = share * kl(p, skewed) + (1 - share) * kl(q, skewed)
        close(generalized_jsd_loss(student, teacher, beta=share, **at), wanted)
    cross_entropy = forward_kl_loss(student, teacher, subtract_entropy=False, **at)
    close(cross_entropy, -(p * q.log()).sum(-1).mean())


def test_they_agree_with_the_row_functions_and_with_each_other() -> None:
    student, teacher = pair(1)
    close(forward_kl_loss(student, teacher), forward_kl(student, teacher).mean())
    close(reverse_kl_loss(student, teacher), reverse_kl(student, teacher).mean())
    for other in (
        symmetric_kl_loss(student, teacher, weight=0),
        skewed_forward_kl_loss(student, teacher, skew=0),
        generalized_jsd_loss(student, teacher, beta=0),
    ):
        close(other, forward_kl_loss(student, teacher))
    for other in (
        symmetric_kl_loss(student, teacher, weight=1),
        skewed_reverse_kl_loss(student, teacher, skew=0),
        generalized_jsd_loss(student, teacher, beta=1),
    ):
        close(other, reverse_kl_loss(student, teacher))


@quick
@given(seeds, st.floats(0.01, 0.99))
def test_jsd_is_symmetric_and_bounded(seed: int, beta: float) -> None:
    student, teacher = pair(seed, scale=20.0)
    found = generalized_jsd_loss(student, teacher, beta=beta)
    close(found, generalized_jsd_loss(teacher, student.detach(), beta=1 - beta))
    assert 0 <= found <= np.log(2) + 1e-12
    assert skewed_forward_kl_loss(student, teacher, skew=beta) <= -np.log(beta) + 1e-12
    assert skewed_reverse_kl_loss(student, teacher, skew=beta) <= -np.log(beta) + 1e-12


@every
@quick
@given(seed=seeds, shift=st.floats(-1e3, 1e3))
def test_a_constant_a_row_and_the_order_of_the_vocabulary_change_nothing(
    loss: Callable[..., Tensor], seed: int, shift: float
) -> None:
    student, teacher = pair(seed)
    value = loss(student, teacher)
    assert value >= 0
    torch.testing.assert_close(loss(student + shift, teacher - shift), value, rtol=1e-7, atol=1e-9)
    order = torch.randperm(7, generator=torch.Generator().manual_seed(seed))
    torch.testing.assert_close(loss(student[..., order], teacher[..., order]), value, rtol=1e-9, atol=1e-12)


@every
def test_zero_at_equality_and_no_gradient_to_the_teacher(loss: Callable[..., Tensor]) -> None:
    student, teacher = pair(2)
    teacher.requires_grad_()
    loss(student, teacher).backward()
    assert teacher.grad is None
    student.grad = None
    same = loss(student, student.detach().clone())
    same.backward()
    assert same.abs() < 1e-15
    assert student.grad is not None
    assert student.grad.abs().max() < 1e-15


@every
def test_gradients_are_the_numerical_ones(loss: Callable[..., Tensor]) -> None:
    student, teacher = pair(3, scale=1.0)
    mask = torch.tensor([[1, 0, 1, 1, 1], [0, 1, 1, 1, 0]])
    if loss is adaptive_kl_loss:  # its weights are detached: hold them still
        head, tail = (weight * mask for weight in adaptive_kl_weights(student, teacher))
        held = head * forward_kl(student, teacher) + tail * reverse_kl(student, teacher)
        wanted = torch.autograd.grad(held.sum() / mask.sum(), student)[0]
        close(torch.autograd.grad(loss(student, teacher, mask), student)[0], wanted)
        return
    assert torch.autograd.gradcheck(lambda logits: loss(logits, teacher, mask, temperature=1.5), student)


@every
def test_only_counted_tokens_are_read(loss: Callable[..., Tensor]) -> None:
    student, teacher = pair(4)
    mask = torch.rand(2, 5, generator=torch.Generator().manual_seed(4)) < 0.5
    target = torch.where(torch.tensor([True, True, False, True, True]), 3, -100).expand(2, 5)
    counts = mask & (target == 3)
    wanted = loss(student[counts], teacher[counts])
    close(loss(student, teacher, mask, target=target), wanted)
    close(loss(student, teacher, mask.float(), target=target + 0), wanted)
    close(loss(student, teacher, counts), wanted)
    close(loss(student, teacher, target=torch.where(counts, 0, 9), ignore_index=9), wanted)
    broken = torch.where(counts[..., None], student.detach(), torch.nan).requires_grad_()
    loss(broken, torch.where(counts[..., None], teacher, torch.nan), counts).backward()
    assert broken.grad is not None
    assert broken.grad.isfinite().all()
    assert (broken.grad[~counts] == 0).all()


@every
@pytest.mark.parametrize("shape", [(2, 5), (1, 1), (0, 5)])
def test_nothing_counted_is_zero_with_a_gradient(loss: Callable[..., Tensor], shape: tuple[int, int]) -> None:
    student = torch.full((*shape, 7), -torch.inf, requires_grad=True)
    value = loss(student, torch.randn(*shape, 7), torch.zeros(shape, dtype=torch.bool))
    value.backward()
    assert value == 0
    assert student.grad is not None
    assert (student.grad == 0).all()


@every
@pytest.mark.parametrize("size", [1e2, 1e4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_extreme_logits_are_finite(loss: Callable[..., Tensor], size: float, dtype: torch.dtype) -> None:
    signs = torch.tensor([[[1.0, -1, 1, -1], [-1, 1, 1, 1]]])
    for factor in (1, -1):
        student = (size * signs).to(dtype).requires_grad_()
        value = loss(student, factor * (size * signs.flip(-1)).to(dtype))
        value.backward()
        assert value.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert value.isfinite()
        assert student.grad is not None
        assert student.grad.isfinite().all()


@every
def test_infinite_entries_are_left_out(loss: Callable[..., Tensor]) -> None:
    student, teacher = (tensor.detach().clone() for tensor in pair(5))
    student[..., 0] = teacher[..., 0] = -torch.inf
    student.requires_grad_()
    value = loss(student, teacher)
    value.backward()
    close(value, loss(student[..., 1:], teacher[..., 1:]))  # both exclude it: as if it were not there
    assert student.grad is not None
    assert student.grad.isfinite().all()
    assert (student.grad[..., 0] == 0).all()
    for side in (student, teacher):  # one side alone: finite, where the divergence itself may not be
        alone = [tensor.detach().clone() for tensor in (student, teacher)]
        alone[0 if side is student else 1][..., 1] = -torch.inf
        leaf = alone[0].requires_grad_()
        one_sided = loss(leaf, alone[1])
        one_sided.backward()
        assert one_sided.isfinite()
        assert leaf.grad is not None
        assert leaf.grad.isfinite().all()


def test_left_out_by_the_student_by_hand() -> None:
    teacher = torch.tensor([[0.5, 0.3, 0.2]], dtype=torch.float64)
    student = torch.tensor([[0.0, 0.6, 0.4]], dtype=torch.float64)
    wanted = 0.3 * np.log(0.3 / 0.6) + 0.2 * np.log(0.2 / 0.4)
    assert forward_kl_loss(student.log(), teacher.log()).item() == pytest.approx(wanted)
    assert total_variation_loss(student.log(), teacher.log()).item() == pytest.approx(0.5 * (0.3 + 0.2))


def test_adaptive_weights_by_hand() -> None:
    teacher = torch.tensor([[0.4, 0.1, 0.3, 0.2], [0.9, 0.05, 0.03, 0.02]], dtype=torch.float64)
    student = torch.full((2, 4), 0.25, dtype=torch.float64)
    head, tail = adaptive_kl_weights(student.log(), teacher.log(), mu=0.75)
    # row 1: 0.4 + 0.3 stays below mu; row 2: the first passes mu and is the head all the same
    close(head, torch.tensor([0.2 / 0.4, 0.65 / 1.3], dtype=torch.float64))
    close(head + tail, torch.ones(2, dtype=torch.float64))
    assert adaptive_kl_weights(teacher.log(), teacher.log())[0].tolist() == [0.5, 0.5]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_head_of_all_mass_holds_every_entry(dtype: torch.dtype) -> None:
    """However the sum of the probabilities is rounded."""
    student, teacher = (logits.to(dtype) for logits in torch.randn(2, 200, 301, dtype=torch.float64))
    head, tail = adaptive_kl_weights(student, teacher, mu=1)
    assert (head == 1).all()
    assert (tail == 0).all()
    assert adaptive_kl_weights(teacher, teacher, mu=1)[0].unique().tolist() == [0.5]
    close(adaptive_kl_loss(student, teacher, mu=1), forward_kl_loss(student, teacher))


def test_batchmean_is_the_sum_by_the_first_axis() -> None:
    student, teacher = pair(6)
    found = generalized_jsd_loss(student, teacher, reduction="batchmean")
    close(found, 5 * generalized_jsd_loss(student, teacher))
    with pytest.raises(ValueError, match=r"'batchmean' counts every token; use 'tokenmean'"):
        generalized_jsd_loss(student, teacher, torch.ones(2, 5), reduction="batchmean")
    with pytest.raises(ValueError, match=r"reduction must be .* got 'mean'"):
        unwrap(generalized_jsd_loss)(student, teacher, reduction="mean")


@every
def test_bad_input(loss: Any) -> None:
    student, teacher = pair(7)
    loss = partial(unwrap(loss.func), **loss.keywords) if isinstance(loss, partial) else unwrap(loss)
    with pytest.raises(ValueError, match=r"vocabularies of 7 and 6 entries; cut heads .* use uld_loss"):
        loss(student, teacher[..., :6])
    with pytest.raises(ValueError, match=r"shapes must agree; got student_logits \[2, 5, 7\]"):
        loss(student, teacher[:, :4])
    with pytest.raises(ValueError, match=r"mask must hold one value a token, \[2, 5\]; got \[2, 4\]"):
        loss(student, teacher, torch.ones(2, 4))
    with pytest.raises(ValueError, match=r"target must hold one value a token, \[2, 5\]; got \[5\]"):
        loss(student, teacher, target=torch.ones(5, dtype=torch.int64))
    for temperature in (0.0, -1.0, float("nan")):
        with pytest.raises(ValueError, match=r"temperature must be finite and above 0"):
            loss(student, teacher, temperature=temperature)


@pytest.mark.parametrize(
    ("loss", "option"),
    [
        (symmetric_kl_loss, "weight"),
        (skewed_forward_kl_loss, "skew"),
        (skewed_reverse_kl_loss, "skew"),
        (generalized_jsd_loss, "beta"),
        (adaptive_kl_loss, "mu"),
        (adaptive_kl_weights, "mu"),
    ],
)
def test_shares_lie_in_0_and_1(loss: Callable[..., Any], option: str) -> None:
    for value in (-0.1, 1.1, float("nan")):
        with pytest.raises(ValueError, match=rf"{option} must lie in \[0, 1\]; got"):
            loss(*pair(8), **{option: value})


def test_token_nll_is_minus_the_log_probability() -> None:
    logits, _ = pair(9)
    ids = torch.tensor([[0, 1, 2, 3, 4], [6, -100, 99, 5, 5]])
    counts = (ids >= 0) & (ids < 7)
    found = token_nll(logits, ids, counts)
    wanted = -logits.log_softmax(-1).gather(-1, torch.where(counts, ids, 0)[..., None])[..., 0]
    close(found, torch.where(counts, wanted, 0.0))
    assert token_nll(logits.bfloat16(), ids, counts).dtype == torch.float32
    with pytest.raises(IndexError, match=r"target 99 names none of the 7"):
        token_nll(logits, torch.where(ids < 0, 0, ids))
    with pytest.raises(ValueError, match=r"ids must hold one value a token, \[2, 5\]; got \[2, 4\]"):
        unwrap(token_nll)(logits, ids[:, :4])
