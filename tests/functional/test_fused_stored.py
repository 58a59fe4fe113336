"""Fused losses with stored teachers: top-k with the mass of the rest, and weighted samples."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from fused_cases import DIVERGENCES, ODD, Case, analytic, case, gradients, named, plain, reference
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tutelage.functional import fused_linear_loss
from tutelage.functional.heads import Sampled, TopK

EXACT: dict[str, Any] = {"rtol": 1e-9, "atol": 1e-12}
MIXABLE = [key for key in DIVERGENCES if named(key) != "taid"]
every = pytest.mark.parametrize("key", MIXABLE)


def top_k(logits: Tensor, k: int) -> TopK:
    log_probs = logits.detach().log_softmax(-1)
    kept = log_probs.topk(k, -1)
    tail = log_probs.exp().scatter(-1, kept.indices, 0.0).sum(-1)
    return TopK(kept.indices, kept.values, tail)


def coarse(logits: Tensor, ids: Tensor) -> Tensor:
    """Log-probabilities of the kept entries and of all others together."""
    kept, rest = logits.gather(-1, ids), logits.scatter(-1, ids, -torch.inf).logsumexp(-1, keepdim=True)
    return torch.cat([kept, rest], -1) - logits.logsumexp(-1, keepdim=True)


def label_loss(of: Case) -> Tensor:
    return F.cross_entropy(of.logits()[0][of.mask], of.target[of.mask])


@every
@pytest.mark.parametrize("label_weight", [0.0, 0.6])
@pytest.mark.parametrize("k", [1, 8, 122])
def test_top_k_compares_the_kept_entries_and_the_rest(key: str, label_weight: float, k: int) -> None:
    made = case(bias=True, softcap=6.0)
    student, teacher = made.logits()
    stored = top_k(teacher, k)
    loss = fused_linear_loss(
        made.hidden,
        made.head,
        stored,
        divergence=analytic(key),
        target=made.target,
        mask=made.mask,
        label_weight=label_weight,
        chunk_size=17,
    ).loss
    wanted = plain(key, coarse(student, stored.ids), coarse(teacher, stored.ids), mask=made.mask)
    wanted = wanted + label_weight * label_loss(made)
    torch.testing.assert_close(loss, wanted, **EXACT)
    for ours, theirs in zip(gradients(loss, made), gradients(wanted, made), strict=True):
        torch.testing.assert_close(ours, theirs, **EXACT)


@every
def test_all_entries_kept_are_the_dense_teacher(key: str) -> None:
    made = case()
    stored = top_k(made.logits()[1], ODD[-1])
    loss = fused_linear_loss(made.hidden, made.head, stored, divergence=analytic(key), mask=made.mask).loss
    wanted = reference(key, made)
    torch.testing.assert_close(loss, wanted, **EXACT)
    for ours, theirs in zip(gradients(loss, made), gradients(wanted, made), strict=True):
        torch.testing.assert_close(ours, theirs, **EXACT)


@every
def test_a_stored_tail_of_zero_leaves_all_finite(key: str) -> None:
    made = case(dtype=torch.float32)
    stored = top_k(made.logits()[1], 5)
    stored = TopK(stored.ids, stored.log_probs.log_softmax(-1), torch.zeros_like(stored.tail))
    loss = fused_linear_loss(made.hidden, made.head, stored, divergence=analytic(key), mask=made.mask).loss
    assert torch.isfinite(loss)
    assert all(torch.isfinite(gradient).all() for gradient in gradients(loss, made))


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 2**31 - 1), st.integers(1, 30))
def test_top_k_never_exceeds_the_dense_divergence(seed: int, k: int) -> None:
    """What joins outcomes cannot tell two distributions further apart."""
    made = case((1, 6, 5, 4, 31), valid=1.0, seed=seed)
    stored = top_k(made.logits()[1], k)
    for key in ("forward_kl", "reverse_kl", "generalized_jsd", "total_variation"):
        few = fused_linear_loss(made.hidden, made.head, stored, divergence=analytic(key)).loss
        assert -1e-12 <= few <= reference(key, made) + 1e-12


@pytest.mark.parametrize("label_weight", [0.0, 0.6])
def test_samples_give_their_weighted_cross_entropy(label_weight: float) -> None:
    made = case(bias=True)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(ODD[-1], (*made.mask.shape, 9), generator=generator)
    weights = torch.rand(ids.shape, generator=generator, dtype=torch.float64)
    loss = fused_linear_loss(
        made.hidden,
        made.head,
        Sampled(ids, weights),
        target=made.target,
        mask=made.mask,
        label_weight=label_weight,
        chunk_size=17,
    ).loss
    log_q = made.logits()[0].log_softmax(-1)
    wanted = -(weights * log_q.gather(-1, ids)).sum(-1)[made.mask].mean() + label_weight * label_loss(made)
    torch.testing.assert_close(loss, wanted, **EXACT)
    for ours, theirs in zip(gradients(loss, made), gradients(wanted, made), strict=True):
        torch.testing.assert_close(ours, theirs, **EXACT)


def test_samples_have_the_teachers_cross_entropy_as_their_mean() -> None:
    made = case((1, 3, 6, 5, 20), valid=1.0)
    p = made.logits()[1].softmax(-1)
    proposal = p.sqrt() / p.sqrt().sum(-1, keepdim=True)
    draws, generator = 20_000, torch.Generator().manual_seed(0)
    ids = torch.multinomial(proposal[0], draws, replacement=True, generator=generator)[None]
    weights = p.gather(-1, ids) / proposal.gather(-1, ids) / draws
    loss = fused_linear_loss(made.hidden, made.head, Sampled(ids, weights)).loss
    wanted = reference("forward_kl, cross-entropy", made)
    torch.testing.assert_close(loss, wanted, rtol=0.02, atol=0)
    for ours, theirs in zip(gradients(loss, made), gradients(wanted, made), strict=True):
        assert (ours - theirs).norm() < 0.05 * theirs.norm()


@pytest.mark.parametrize("form", ["top-k", "sampled"])
def test_where_nothing_counts_it_is_zero_with_a_gradient(form: str) -> None:
    made = case(valid=0.0, dtype=torch.float32)
    stored = top_k(made.logits()[1], 5)
    teacher = stored if form == "top-k" else Sampled(stored.ids, stored.log_probs.exp())
    loss = fused_linear_loss(
        made.hidden, made.head, teacher, target=made.target, label_weight=1.0, mask=made.mask
    ).loss
    assert loss == 0
    assert all((gradient == 0).all() for gradient in gradients(loss, made))


@pytest.mark.parametrize(
    ("form", "options", "says"),
    [
        ("top-k", {"divergence": "taid"}, r"taid mixes the logits of every entry"),
        ("top-k", {"temperature": 2.0}, r"known at temperature 1 alone; got 2.0"),
        ("sampled", {"temperature": 2.0}, r"known at temperature 1 alone; got 2.0"),
        (
            "top-k",
            {"divergence": lambda s, t: s[:, 0]},
            r"a callable divergence needs the teacher's whole rows",
        ),
        ("sampled", {"divergence": "reverse_kl"}, r"cross-entropy of forward_kl alone; got ReverseKL"),
    ],
)
def test_refusals(form: str, options: dict[str, Any], says: str) -> None:
    made = case()
    stored = top_k(made.logits()[1], 5)
    teacher = stored if form == "top-k" else Sampled(stored.ids, stored.log_probs.exp())
    with pytest.raises(ValueError, match=says):
        fused_linear_loss(made.hidden, made.head, teacher, **options)


def test_refuses_other_rows() -> None:
    made = case()
    stored = top_k(made.logits()[1], 5)
    with pytest.raises(
        ValueError, match=r"the teacher's tail must have the student's rows, \[3, 47\]; got \[3\]"
    ):
        fused_linear_loss(made.hidden, made.head, TopK(stored.ids, stored.log_probs, stored.tail[:, 0]))


@pytest.mark.parametrize("form", ["top-k", "sampled"])
def test_refuses_entries_that_do_not_fit(form: str) -> None:
    made = case()
    stored = top_k(made.logits()[1], 5)

    def teacher(ids: Tensor, k: int = 5) -> TopK | Sampled:
        values = stored.log_probs[..., :k]
        return TopK(ids, values, stored.tail) if form == "top-k" else Sampled(ids, values.exp())

    with pytest.raises(
        ValueError, match=r"ids and (log_probs|weights) must have one entry each; got 5 and 4 a row"
    ):
        fused_linear_loss(made.hidden, made.head, teacher(stored.ids, 4), mask=made.mask)
    for wrong in (-1, ODD[-1]):
        ids = stored.ids.clone()
        ids[~made.mask] = wrong  # what does not count may hold anything
        fused_linear_loss(made.hidden, made.head, teacher(ids), mask=made.mask)
        row, token = made.mask.nonzero()[-1].tolist()
        ids[row, token, 3] = wrong
        with pytest.raises(
            ValueError, match=rf"ids name the entry {wrong}; the student's vocabulary has 0 to 122"
        ):
            fused_linear_loss(made.hidden, made.head, teacher(ids), mask=made.mask)
