"""Fused losses against the same losses from whole logits: values and gradients, in every type and with every option."""

from __future__ import annotations

import math
from inspect import unwrap
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from fused_cases import DIVERGENCES, ODD, Case, analytic, case, gradients, reference
from torch import Tensor

from tutelage.functional import (
    fused_linear_cross_entropy,
    fused_linear_divergence,
    fused_linear_loss,
    fused_linear_token_nll,
    token_statistics,
)
from tutelage.functional.fused_pass import chunk_rows
from tutelage.functional.heads import Head

every = pytest.mark.parametrize("key", DIVERGENCES)
EXACT: dict[str, Any] = {"rtol": 1e-10, "atol": 1e-12}
SINGLE: dict[str, Any] = {"rtol": 1e-6, "atol": 1e-6}
OPTIONS: list[dict[str, Any]] = [
    {},
    {"bias": True},
    {"softcap": 3.0},
    {"scale": 0.3},
    {"bias": True, "softcap": 4.0, "scale": 1.7},
]


def fused(key: str, of: Case, **options: Any) -> Tensor:
    found = fused_linear_loss(
        of.hidden, of.head, of.teacher, divergence=analytic(key), mask=of.mask, **options
    )
    loss: Tensor = found.loss
    return loss


def agree(key: str, of: Case, wanted: Case, tolerance: dict[str, Any], **options: Any) -> None:
    """The fused loss of one case is the reference of the other, gradients too."""
    label = {"label_weight": options["label_weight"]} if "label_weight" in options else {}
    tempered = {"temperature": options["temperature"]} if "temperature" in options else {}
    loss, true = fused(key, of, **options), reference(key, wanted, **label, **tempered)
    torch.testing.assert_close(loss.double(), true, **tolerance)
    for ours, theirs in zip(gradients(loss, of), gradients(true, wanted), strict=True):
        torch.testing.assert_close(ours.double(), theirs, **tolerance)


@every
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_equals_the_loss_from_logits(key: str, options: dict[str, Any], temperature: float) -> None:
    made = case(**options)
    agree(key, made, made.to(torch.float64), EXACT, temperature=temperature, chunk_size=50)


@every
@pytest.mark.parametrize("valid", [1.0, 0.1])
def test_single_precision_is_as_exact_as_it_can_be(key: str, valid: float) -> None:
    made = case(valid=valid, bias=True, dtype=torch.float32)
    agree(key, made, made.to(torch.float64), SINGLE, chunk_size=40)


@pytest.mark.parametrize("key", ["forward_kl", "generalized_jsd", "taid"])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_label_loss_in_the_same_pass(key: str, temperature: float) -> None:
    made = case(bias=True, softcap=5.0)
    options = {"target": made.target, "label_weight": 0.3, "temperature": temperature, "chunk_size": 31}
    agree(key, made, made.to(torch.float64), EXACT, **options)
    found = fused_linear_loss(
        made.hidden,
        made.head,
        made.teacher,
        divergence=analytic(key),
        mask=made.mask,
        loss_weight=2.0,
        **options,
    )
    assert found.label is not None
    assert found.divergence is not None
    assert not found.label.requires_grad
    assert not found.divergence.requires_grad
    torch.testing.assert_close(found.loss.detach(), 0.3 * found.label + 2.0 * found.divergence)
    torch.testing.assert_close(found.divergence, reference(key, made, temperature=temperature).detach())


def test_a_divergence_of_weight_zero_is_not_computed() -> None:
    made = case()
    found = fused_linear_loss(
        made.hidden, made.head, made.teacher, target=made.target, label_weight=1.0, loss_weight=0.0
    )
    assert found.divergence is None
    want = F.cross_entropy(made.logits()[0].flatten(0, 1), made.target.flatten())
    for ours, theirs in zip(gradients(found.loss, made), gradients(want, made), strict=True):
        torch.testing.assert_close(ours, theirs, **EXACT)


@pytest.mark.parametrize("chunk_size", [1, 7, 141, 1000, None])
def test_chunks_change_nothing(chunk_size: int | None) -> None:
    made = case(bias=True)
    agree("reverse_kl", made, made.to(torch.float64), EXACT, chunk_size=chunk_size)


@every
def test_half_precision_is_no_worse_than_logits_in_single(key: str) -> None:
    made = case((2, 40, 64, 96, 501), dtype=torch.bfloat16)
    true, eager = made.to(torch.float64), made.to(torch.bfloat16)
    loss, plain, exact = fused(key, made, chunk_size=17), reference(key, eager), reference(key, true)
    assert loss.dtype == torch.float32
    for ours, theirs, wanted in zip(
        [loss, *gradients(loss, made)],
        [plain, *gradients(plain, eager)],
        [exact, *gradients(exact, true)],
        strict=True,
    ):
        assert error(ours, wanted) <= 1.1 * error(theirs, wanted) + 1e-6


def error(found: Tensor, wanted: Tensor) -> float:
    return float((found.double() - wanted).detach().norm() / (wanted.detach().norm() + 1e-3))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_gradients_have_the_inputs_type(dtype: torch.dtype) -> None:
    made = case(bias=True, dtype=dtype)
    loss = fused("forward_kl", made)
    assert loss.dtype == torch.float32
    for leaf, gradient in zip(made.leaves(), gradients(loss, made), strict=True):
        assert gradient.dtype == dtype
        assert gradient.shape == leaf.shape


def test_small_gradients_survive_half_precision() -> None:
    """Divided by the number of tokens before a product, they would be 0 in float16."""
    made = case((1, 4, 8, 8, 16), valid=1.0, dtype=torch.float16)
    weight = torch.full((1, 4), 1e-7)
    scale = 1e6
    (ours,) = torch.autograd.grad(
        fused_linear_loss(made.hidden, made.head, made.teacher, token_weight=weight).loss * scale, made.hidden
    )
    wanted = made.to(torch.float64)
    (exact,) = torch.autograd.grad(reference("forward_kl", wanted) * 4e-7 * scale, wanted.hidden)
    assert error(ours, exact) < 5e-3


def test_autocast_makes_products_in_its_type_and_sums_in_single() -> None:
    made = case(valid=1.0, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        loss = fused("forward_kl", made)
        plain = reference("forward_kl", made)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, plain, rtol=1e-3, atol=1e-4)
    narrow = made.to(torch.bfloat16)
    assert torch.equal(loss, fused("forward_kl", narrow))
    for ours, theirs in zip(gradients(loss, made), gradients(plain, made), strict=True):
        assert ours.dtype == torch.float32
        assert error(ours, theirs.double()) < 2e-2


@pytest.mark.parametrize("label_weight", [0.0, 0.4])
def test_token_weights_stand_in_for_the_mean(label_weight: float) -> None:
    made = case()
    weight = torch.rand(made.mask.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    loss = fused_linear_loss(
        made.hidden,
        made.head,
        made.teacher,
        mask=made.mask,
        target=made.target,
        label_weight=label_weight,
        token_weight=weight,
        chunk_size=20,
    ).loss
    student, teacher = (logits.log_softmax(-1) for logits in made.logits())
    by_token = (teacher.exp() * (teacher - student)).sum(-1)
    by_token = by_token - label_weight * student.gather(-1, made.target[..., None])[..., 0]
    wanted = (by_token * weight * made.mask).sum()
    torch.testing.assert_close(loss, wanted, **EXACT)
    for ours, theirs in zip(gradients(loss, made), gradients(wanted, made), strict=True):
        torch.testing.assert_close(ours, theirs, **EXACT)


@every
def test_where_nothing_counts_it_is_zero_with_a_gradient(key: str) -> None:
    made = case(valid=0.0, bias=True, dtype=torch.float32)
    for options in ({}, {"target": made.target, "label_weight": 1.0}, {"token_weight": torch.ones(3, 47)}):
        loss = fused(key, made, **options)
        assert loss == 0
        assert all((gradient == 0).all() for gradient in gradients(loss, made))


def test_what_does_not_count_may_hold_anything() -> None:
    made = case()
    spoilt = made.hidden.detach().clone()
    spoilt[~made.mask] = torch.nan
    target = made.target.masked_fill(~made.mask, -100)
    leaf = spoilt.requires_grad_()
    loss = fused_linear_loss(leaf, made.head, made.teacher, target=target, label_weight=1.0).loss
    (gradient,) = torch.autograd.grad(loss, leaf)
    assert torch.isfinite(loss)
    assert (gradient[~made.mask] == 0).all()
    assert torch.isfinite(gradient).all()


@every
@pytest.mark.parametrize("size", [1e2, 1e4])
def test_finite_at_extreme_logits(key: str, size: float) -> None:
    made = case(dtype=torch.float32)
    with torch.no_grad():
        made.hidden.mul_(size)
        made.teacher_hidden.mul_(size)
    loss = fused(key, made, target=made.target, label_weight=1.0)
    assert torch.isfinite(loss)
    assert all(torch.isfinite(gradient).all() for gradient in gradients(loss, made))
    wanted = reference(key, made.to(torch.float64), label_weight=1.0)
    torch.testing.assert_close(loss.double(), wanted, rtol=1e-5, atol=1e-5)


def test_entries_that_a_bias_excludes_are_left_out() -> None:
    made = case(bias=True)
    assert made.head.bias is not None
    assert made.teacher_head.bias is not None
    with torch.no_grad():
        made.head.bias[-5:] = -torch.inf
        made.teacher_head.bias[-4:] = -torch.inf
    for key in DIVERGENCES:
        agree(key, made, made.to(torch.float64), EXACT)


def test_an_excluded_target_of_no_weight_does_no_harm() -> None:
    made = case(bias=True)
    assert made.head.bias is not None
    with torch.no_grad():
        made.head.bias[made.target[0, 0]] = -torch.inf
    found = fused_linear_loss(made.hidden, made.head, made.teacher, target=made.target)
    assert found.label == torch.inf
    assert torch.isfinite(found.loss)
    assert all(torch.isfinite(gradient).all() for gradient in gradients(found.loss, made))


@pytest.mark.parametrize("key", ["forward_kl", "reverse_kl", "generalized_jsd", "total_variation"])
def test_gradcheck(key: str) -> None:
    made = case((1, 4, 3, 5, 6), bias=True, softcap=2.0, scale=1.2)

    def loss(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        leaves = Case(hidden, Head(weight, bias, 2.0, 1.2), *made.teacher, made.target, made.mask)
        return fused(key, leaves, target=made.target, label_weight=0.5, chunk_size=2)

    assert torch.autograd.gradcheck(loss, tuple(made.leaves()))


def test_a_function_of_logits_is_differentiated_in_the_chunk() -> None:
    made = case(softcap=3.0)

    def reverse(student: Tensor, teacher: Tensor) -> Tensor:
        assert len(student) <= 20
        return (student.softmax(-1) * (student.log_softmax(-1) - teacher.log_softmax(-1))).sum(-1)

    options = {"target": made.target, "label_weight": 0.2, "temperature": 2.0, "chunk_size": 20}
    own = fused_linear_loss(
        made.hidden, made.head, made.teacher, divergence=reverse, mask=made.mask, **options
    ).loss
    wanted = reference("reverse_kl", made, label_weight=0.2, temperature=2.0)
    torch.testing.assert_close(own, wanted, **EXACT)
    for ours, theirs in zip(gradients(own, made), gradients(wanted, made), strict=True):
        torch.testing.assert_close(ours, theirs, **EXACT)


def test_stored_logits_serve_as_a_teacher() -> None:
    made = case()
    loss = fused_linear_loss(made.hidden, made.head, made.logits()[1].detach(), mask=made.mask).loss
    torch.testing.assert_close(loss, reference("forward_kl", made), **EXACT)


def test_only_what_needs_a_gradient_gets_one() -> None:
    made = case(bias=True)
    assert made.head.bias is not None
    for leaf in made.leaves():
        for other in made.leaves():
            other.requires_grad_(other is leaf)
        loss = fused("forward_kl", made)
        (ours,) = torch.autograd.grad(loss, leaf)
        (theirs,) = torch.autograd.grad(reference("forward_kl", made), leaf)
        torch.testing.assert_close(ours, theirs, **EXACT)
    for leaf in made.leaves():
        leaf.requires_grad_(False)
    assert not fused("forward_kl", made).requires_grad


def test_without_grad_no_graph_and_no_gradient_products(monkeypatch: pytest.MonkeyPatch) -> None:
    made = case()
    expected = fused("forward_kl", made).detach()
    monkeypatch.setattr("tutelage.functional.fused_products.Gradients.add", None)
    with torch.no_grad():
        loss = fused("forward_kl", made)
    assert not loss.requires_grad
    assert loss == expected


def test_the_teacher_gets_no_gradient() -> None:
    made = case(bias=True)
    teacher = Head(made.teacher_head.weight.requires_grad_(), made.teacher_head.bias)
    hidden = made.teacher_hidden.requires_grad_()
    fused_linear_loss(made.hidden, made.head, (hidden, teacher)).loss.backward()
    assert hidden.grad is None
    assert teacher.weight.grad is None


def test_backward_scales_and_can_be_run_twice() -> None:
    made = case()
    loss = fused("forward_kl", made)
    first = torch.autograd.grad(3 * loss, made.leaves(), retain_graph=True)
    second = torch.autograd.grad(loss, made.leaves())
    for scaled, plain in zip(first, second, strict=True):
        torch.testing.assert_close(scaled, 3 * plain, **EXACT)
    with pytest.raises(
        RuntimeError, match=r"gradients were handed out; keep the graph with retain_graph=True"
    ):
        torch.autograd.grad(loss, made.leaves())


def test_a_padded_head_is_cut_and_a_tied_one_gets_both_gradients() -> None:
    made = case()
    vocabulary, width = made.head.weight.shape
    padded = torch.cat(
        [made.head.weight.detach(), torch.ones(5, width, dtype=torch.float64)]
    ).requires_grad_()
    embedded = padded[made.target].mean(1, keepdim=True)

    def loss(of_logits: bool) -> Tensor:
        hidden = made.hidden + embedded
        cut = Case(hidden, Head(padded[:vocabulary]), *made.teacher, made.target, made.mask)
        return reference("forward_kl", cut) if of_logits else fused("forward_kl", cut)

    for leaf in (padded, made.hidden):
        ours, theirs = (torch.autograd.grad(loss(kind), leaf, retain_graph=True)[0] for kind in (False, True))
        torch.testing.assert_close(ours, theirs, **EXACT)
    (gradient,) = torch.autograd.grad(loss(False), padded)
    assert (gradient[vocabulary:] == 0).all()


def test_the_cards_function_takes_names_options_and_heads() -> None:
    made = case(bias=True, softcap=3.0, scale=1.4)
    loss = fused_linear_divergence(
        made.hidden,
        made.head.weight,
        made.teacher_hidden,
        made.teacher_head.weight,
        made.mask,
        divergence="generalized_jsd",
        beta=0.3,
        target=made.target.masked_fill(made.target < 20, -100),
        student_bias=made.head.bias,
        teacher_bias=made.teacher_head.bias,
        student_softcap=3.0,
        teacher_softcap=3.0,
        student_scale=1.4,
        teacher_scale=1.4,
        chunk_size=11,
    )
    made.mask &= made.target >= 20
    torch.testing.assert_close(loss, reference("generalized_jsd", made), **EXACT)


def test_cross_entropy_and_the_nll_of_each_token() -> None:
    made = case(bias=True)
    target = made.target.masked_fill(made.target < 20, -100)
    flat = F.cross_entropy(
        made.logits()[0].flatten(0, 1), target.masked_fill(~made.mask, -100).flatten(), reduction="none"
    )
    weight, bias = made.head.weight, made.head.bias
    nll = fused_linear_token_nll(made.hidden, weight, target, made.mask, bias=bias, chunk_size=9)
    torch.testing.assert_close(nll, flat.detach().view_as(target), **EXACT)
    assert not nll.requires_grad
    loss = fused_linear_cross_entropy(made.hidden, weight, target, made.mask, bias=bias, chunk_size=9)
    wanted = flat.sum() / (made.mask & (target != -100)).sum()
    torch.testing.assert_close(loss, wanted, **EXACT)
    for ours, theirs in zip(gradients(loss, made), gradients(wanted, made), strict=True):
        torch.testing.assert_close(ours, theirs, **EXACT)


def test_statistics_of_tokens() -> None:
    made = case(softcap=4.0)
    found = token_statistics(made.hidden, made.head, made.target, made.teacher, made.mask, chunk_size=13)
    student, teacher = (logits.detach().log_softmax(-1) for logits in made.logits())
    ids = made.target[..., None]
    assert found.agreement is not None
    assert torch.equal(found.agreement, (student.argmax(-1) == teacher.argmax(-1)) & made.mask)
    for ours, theirs in (
        (found.nll, -student.gather(-1, ids)[..., 0]),
        (found.teacher_nll, -teacher.gather(-1, ids)[..., 0]),
        (found.acceptance, torch.minimum(student.exp(), teacher.exp()).sum(-1)),
    ):
        torch.testing.assert_close(ours, theirs * made.mask, **EXACT)
    alone = token_statistics(made.hidden, made.head, made.target, mask=made.mask)
    torch.testing.assert_close(alone.nll, found.nll, **EXACT)
    assert alone.agreement is alone.acceptance is alone.teacher_nll is None


def test_divergence_of_tokens_leaves_out_what_the_teacher_excludes() -> None:
    made = case()
    teacher = made.logits()[1].detach().clone()
    teacher[..., 5] = -math.inf
    teacher[..., 7] = -1e4  # too little for a number
    found = token_statistics(made.hidden, made.head, made.target, teacher, made.mask)
    student, log_p = made.logits()[0].detach().log_softmax(-1), teacher.log_softmax(-1)
    wanted = F.kl_div(student, log_p.exp(), reduction="none").sum(-1) * made.mask
    torch.testing.assert_close(found.divergence, wanted, **EXACT)
    bias = torch.zeros(ODD[-1], dtype=made.hidden.dtype)
    bias[[5, 7]] = -math.inf
    head = Head(made.head.weight, bias)
    target = made.target.masked_fill((made.target == 5) | (made.target == 7), 0)
    both = token_statistics(made.hidden, head, target, teacher, made.mask).divergence
    assert both is not None
    assert both.isfinite().all()
    alone = token_statistics(made.hidden, head, target, made.teacher, made.mask).divergence
    assert alone is not None
    assert (alone[made.mask] == math.inf).all()


def test_statistics_of_nothing() -> None:
    made = case(valid=0.0)
    found = token_statistics(made.hidden, made.head, made.target, made.teacher, made.mask)
    assert all(part is not None and part.shape == made.mask.shape and not part.any() for part in found)


def test_chunks_are_picked_by_bytes() -> None:
    assert chunk_rows(1024, 32_768 * 4, 2, "cpu") == 256
    assert chunk_rows(1024, 32_768 * 4, 1, "cpu") == 512
    assert chunk_rows(4096, 50_257 * 4, 2, "cpu") == 682
    assert chunk_rows(131_072, 151_936 * 4, 2, "cpu") * 151_936 * 4 * 2 <= 2**29
    assert chunk_rows(8, 2**40, 2, "cpu") == 1


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"teacher": None}, r"nothing to learn: give a target, or a teacher"),
        ({"temperature": 0.0}, r"temperature must be finite and above 0; got 0.0"),
        ({"chunk_size": 0}, r"chunk_size must be at least 1; got 0"),
        ({"target": torch.full((3, 47), 123)}, r"target 123 names none of the 123 classes"),
        ({"divergence": "kl"}, r"divergence must be one of forward_kl"),
        ({"divergence": lambda s, t: s.sum()}, r"must give one value a row, \[\d+\]; got \[\]"),
    ],
)
def test_refusals(change: dict[str, Any], says: str) -> None:
    made = case()
    with pytest.raises(ValueError, match=says):
        fused_linear_loss(
            **{"student_hidden": made.hidden, "student_head": made.head, "teacher": made.teacher} | change
        )


def test_refuses_targets_between_two_ids() -> None:
    made, loss = case(), unwrap(fused_linear_loss)
    with pytest.raises(ValueError, match=r"class ids must be integers; got torch\.float32"):
        loss(made.hidden, made.head, made.teacher, target=torch.full((3, 47), 1.7))


@pytest.mark.parametrize(
    ("sizes", "says"),
    [
        ((3, 47, 31, 19, 130), r"vocabularies of 123 and 130 entries; cut heads that are padded"),
        ((3, 46, 31, 19, 123), r"the teacher must have the student's rows, \[3, 47\]; got \[3, 46\]"),
    ],
)
def test_refuses_another_teacher(sizes: tuple[int, int, int, int, int], says: str) -> None:
    made, other = case(), case(sizes)
    with pytest.raises(ValueError, match=says):
        fused_linear_loss(made.hidden, made.head, other.teacher)


def test_refuses_heads_that_do_not_fit() -> None:
    made, other = case(), case((*ODD[:2], 30, *ODD[3:]))
    with pytest.raises(ValueError, match=r"the student's hidden states \[..., width\] and its head's weight"):
        fused_linear_loss(made.hidden, other.head, made.teacher)
    with pytest.raises(
        ValueError, match=r"the teacher's bias must be \[123\], one a row of its head; got \[7\]"
    ):
        fused_linear_loss(
            made.hidden, made.head, (made.teacher_hidden, Head(made.teacher_head.weight, torch.zeros(7)))
        )
    with pytest.raises(
        ValueError, match=r"the student's hidden states and head must have one type outside autocast"
    ):
        fused_linear_loss(made.hidden, made.to(torch.float32).head, made.teacher)
    with pytest.raises(ValueError, match=r"token_weight must hold one number a token, \[3, 47\]; got \[47\]"):
        unwrap(fused_linear_loss)(made.hidden, made.head, made.teacher, token_weight=torch.ones(47))
