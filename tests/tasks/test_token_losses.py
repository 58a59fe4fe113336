"""The terms of a divergence beside the label loss: fused or plain, alone or among others, from any form of teacher."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch

from tutelage.engine.types import Batch, Head, Outputs, Sampled, Term, Terms, TopK
from tutelage.functional.fused_statistics import token_statistics
from tutelage.tasks import LanguageModel, language_model
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


@pytest.mark.parametrize("name", NAMES)
def test_a_stored_tail_of_zero_is_one_too_small_to_store(name: str) -> None:
    """Its outcome is compared all the same: the student's mass there is none of the teacher's."""
    case = Case()
    stored = case.teacher("topk").stored_logits
    assert isinstance(stored, TopK)
    stored = TopK(stored.ids, stored.log_probs.log_softmax(-1), torch.zeros_like(stored.tail))
    found = []
    for whole in (True, False):
        terms = divergence_terms(
            name,
            case.student(whole=whole),
            Outputs(stored),
            case.batch,
            Context(),  # type: ignore[arg-type]
            options=NAMES[name],
        )
        assert terms[name].mean > 0
        found.append((terms[name].mean, *case.gradients(terms)))
    for plain, fused in zip(*found, strict=True):
        torch.testing.assert_close(plain, fused, rtol=1e-9, atol=1e-9)


def masks(target: torch.Tensor) -> dict[str, torch.Tensor | None]:
    some = torch.zeros_like(target)
    some[0, 1:4] = some[1, ::2] = 1
    return {"none": None, "integers": some, "floats": some.double(), "bools": some.bool()}


@pytest.mark.parametrize("mask", ["none", "integers", "floats", "bools"])
@pytest.mark.parametrize("form", ["dense", "topk", "draws"])
def test_a_token_counts_by_its_mask_and_its_target(form: str, mask: str) -> None:
    """Here neither says what the other does."""
    case = Case()
    target = case.batch.target
    assert target is not None
    counting = masks(target)[mask]
    counts = torch.ne(target, -100) if counting is None else torch.ne(target, -100) & torch.ne(counting, 0)
    case.batch = case.batch.replace(mask=counting)
    kept = Case()
    kept.batch = case.batch.replace(mask=counts, target=target.masked_fill(~counts, -100))
    wanted = kept.terms("forward_kl", form)
    slopes = kept.gradients(wanted)
    for fused in (True, False):
        terms = case.terms("forward_kl", form, fused=fused)
        for term, value in wanted.items():
            torch.testing.assert_close(terms[term].mean, value.mean, rtol=1e-9, atol=1e-9)
        for ours, theirs in zip(case.gradients(terms), slopes, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


def test_metrics_share_a_pass_and_let_go_of_the_outputs(monkeypatch: pytest.MonkeyPatch) -> None:
    passes = []

    def counting(*given: Any) -> Any:
        passes.append(given[0].shape)
        return token_statistics(*given)

    monkeypatch.setattr(language_model, "token_statistics", counting)
    case, task = Case(), LanguageModel(VOCABULARY)
    measured = task.metrics(["loss", "divergence", "acceptance"])
    outputs, teacher = case.student(whole=False), case.teacher("dense")
    for metric in measured.values():
        metric.update(outputs, case.batch, teacher)
    assert len(passes) == 1
    alive = weakref.ref(outputs), weakref.ref(teacher)
    del outputs, teacher
    gc.collect()
    assert [each() for each in alive] == [None, None]
    for metric in measured.values():
        metric.update(case.student(whole=False), case.batch, case.teacher("dense"))
    assert len(passes) == 4


def test_of_rows_the_target_says_nothing_of_what_counts() -> None:
    """A row without a label, or with a distribution for one, has a teacher all the same."""
    logits, teacher = torch.randn(2, 3, 4, dtype=torch.float64)
    batch = Batch(torch.zeros(3, 1))
    whole = plain_divergence("forward_kl", logits, teacher, batch, 1.0)
    for target in (torch.tensor([1, -100, 2]), torch.rand(3, 4), torch.rand(3)):
        assert plain_divergence("forward_kl", logits, teacher, batch.replace(target=target), 1.0) == whole
