"""The terms of a divergence beside the label loss: fused or plain, alone or among others, from any form of teacher."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tutelage.engine.types import Batch, Head, Outputs, Sampled, Term, Terms, TopK
from tutelage.tasks import LanguageModel
from tutelage.tasks.token_losses import divergence_terms, plain_divergence

ROWS, TOKENS, WIDTH, VOCABULARY = 2, 5, 4, 11
NAMES = {
    "forward_kl": {},
    "reverse_kl": {},
    "skewed_forward_kl": {"skew": 0.2},
    "skewed_reverse_kl": {"skew": 0.2},
    "generalized_jsd": {"beta": 0.3},
    "adaptive_kl": {"mu": 0.4},
    "total_variation": {},
}


class Context:
    """What the terms ask of a step."""

    items = "tokens"
    task = LanguageModel(VOCABULARY)

    def label_loss(self, outputs: Outputs, batch: Batch) -> Term:
        return self.task.label_loss(outputs, batch)


class Case:
    def __init__(self, *, masked: bool = False) -> None:
        generator = torch.Generator().manual_seed(3)

        def draw(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        self.hidden = draw(ROWS, TOKENS, WIDTH).requires_grad_()
        self.weight = draw(VOCABULARY, WIDTH).requires_grad_()
        self.teacher_logits = draw(ROWS, TOKENS, VOCABULARY)
        target = torch.randint(VOCABULARY, (ROWS, TOKENS), generator=generator)
        target[0, :2] = -100
        target = torch.full_like(target, -100) if masked else target
        self.batch = Batch({"input_ids": target}, target=target, mask=target != -100)

    def student(self, *, whole: bool) -> Outputs:
        head = Head(self.weight)
        return Outputs(head(self.hidden)) if whole else Outputs(hidden=self.hidden, head=head)

    def teacher(self, form: str) -> Outputs:
        log_probs = self.teacher_logits.log_softmax(-1)
        if form == "dense":
            return Outputs(self.teacher_logits)
        kept = log_probs.topk(4 if form == "topk" else VOCABULARY, dim=-1)
        if form == "draws":  # every class once, weighed by its probability: the expectation itself
            return Outputs(Sampled(kept.indices, kept.values.exp()))
        return Outputs(TopK(kept.indices, kept.values, 1 - kept.values.exp().sum(-1)))

    def terms(self, name: str, form: str = "dense", *, fused: bool = True, **options: Any) -> Terms:
        return divergence_terms(
            name,
            self.student(whole=not fused),
            self.teacher(form),
            self.batch,
            Context(),  # type: ignore[arg-type]
            options=NAMES[name],
            fused=fused,
            **{"label_weight": 0.3, "loss_weight": 0.7} | options,
        )

    def gradients(self, terms: Terms) -> tuple[torch.Tensor, ...]:
        total = torch.stack([term.mean for term in terms.values()]).sum()
        return torch.autograd.grad(total, (self.hidden, self.weight))


@pytest.mark.parametrize("form", ["dense", "topk"])
@pytest.mark.parametrize("name", NAMES)
def test_fused_and_plain_agree_in_every_term_and_in_their_sums_gradient(name: str, form: str) -> None:
    case = Case()
    fused, plain = (case.terms(name, form, fused=flag) for flag in (True, False))
    assert list(fused) == list(plain) == ["label", name]
    for term in fused:
        torch.testing.assert_close(fused[term].mean, plain[term].mean, rtol=1e-9, atol=1e-9)
        assert fused[term].items == "tokens"
    for ours, theirs in zip(case.gradients(fused), case.gradients(plain), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


def test_among_others_the_label_has_a_gradient_of_its_own() -> None:
    case = Case()
    alone, among = (case.terms("forward_kl", alone=flag) for flag in (True, False))
    assert not alone["label"].mean.requires_grad
    assert among["label"].mean.requires_grad
    for ours, theirs in zip(case.gradients(alone), case.gradients(among), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_draws_give_the_cross_entropy_of_the_forward_kl() -> None:
    case = Case()
    drawn, dense = (case.terms("forward_kl", form) for form in ("draws", "dense"))
    entropy = -(case.teacher_logits.log_softmax(-1).exp() * case.teacher_logits.log_softmax(-1)).sum(-1)
    counted = entropy[case.batch.mask].mean()
    torch.testing.assert_close(drawn["forward_kl"].mean, dense["forward_kl"].mean + 0.7 * counted)
    for ours, theirs in zip(case.gradients(drawn), case.gradients(dense), strict=True):
        torch.testing.assert_close(ours, theirs)
    plain = case.terms("forward_kl", "draws", fused=False)
    torch.testing.assert_close(plain["forward_kl"].mean, drawn["forward_kl"].mean)
    with pytest.raises(ValueError, match="forward_kl"):
        case.terms("reverse_kl", "draws", fused=False)


@pytest.mark.parametrize("fused", [True, False])
def test_where_nothing_counts_there_are_zeros_with_a_gradient(fused: bool) -> None:
    case = Case(masked=True)
    terms = case.terms("forward_kl", fused=fused)
    assert all(float(term.mean.detach()) == 0 for term in terms.values())
    assert all(not gradient.any() for gradient in case.gradients(terms))


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("form", ["topk", "draws"])
def test_stored_answers_have_no_other_temperature(form: str, fused: bool) -> None:
    with pytest.raises(ValueError, match="temperature"):
        Case().terms("forward_kl", form, fused=fused, temperature=2.0)


def test_rows_of_classes_are_rows() -> None:
    """A classifier's mask is one value a row."""
    logits, teacher = torch.randn(3, 4).double(), torch.randn(3, 4).double()
    batch = Batch(torch.zeros(3, 1), mask=torch.tensor([True, False, True]))
    found = plain_divergence("reverse_kl", logits, teacher, batch, 1.0)
    kept = plain_divergence("reverse_kl", logits[[0, 2]], teacher[[0, 2]], batch.replace(mask=None), 1.0)
    torch.testing.assert_close(found, kept)
