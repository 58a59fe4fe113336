"""dkd and dist as methods: terms, weights, masks, warm-up, and what they refuse."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from objectives import CLASSES, ROWS, FakeStep, Pairing
from pydantic import ValidationError
from torch import Tensor

from tutelage.functional.correlation import dist_loss
from tutelage.functional.decoupled import dkd_terms
from tutelage.methods.baselines.logits import DIST, DKD

MASK = torch.tensor([1, 1, 0, 0, 1, 0])
masks = pytest.mark.parametrize("mask", [None, MASK], ids=["all", "masked"])


def dkd(**options: Any) -> DKD:
    return DKD(DKD.Config(name="dkd", **options))


def dist(**options: Any) -> DIST:
    return DIST(DIST.Config(name="dist", **options))


def counted(pairing: Pairing) -> tuple[Tensor, Tensor, Tensor]:
    """Logits and labels of the rows that count."""
    rows = slice(None) if pairing.batch.mask is None else pairing.batch.mask.bool()
    assert pairing.batch.target is not None
    return pairing.student.logits[rows], pairing.teacher.logits[rows], pairing.batch.target[rows]


@masks
def test_dkd_terms_carry_their_weights(mask: Tensor | None) -> None:
    method = dkd(label_weight=0.5, loss_weight=2, alpha=3, beta=5, temperature=2, warmup_epochs=0)
    pairing = Pairing(method, mask=mask)
    student, teacher, target = counted(pairing)
    parts = dkd_terms(student, teacher, target, temperature=2.0)
    label = FakeStep().label_loss(pairing.student, pairing.batch).mean
    wanted = {"label": 0.5 * label, "target": 6 * parts.target, "nontarget": 10 * parts.nontarget}
    torch.testing.assert_close({name: term.mean for name, term in pairing.terms().items()}, wanted)


@pytest.mark.parametrize(("epoch", "share"), [(0, 0.25), (2, 0.75), (3, 1.0), (30, 1.0)])
def test_dkd_grows_to_its_weight(epoch: int, share: float) -> None:
    pairing = Pairing(dkd(warmup_epochs=4))
    full, now = (pairing.terms(FakeStep(epoch=at)) for at in (1000, epoch))
    for name in ("target", "nontarget"):
        torch.testing.assert_close(now[name].mean, share * full[name].mean)
    assert now["label"].mean == full["label"].mean


@masks
def test_dist_terms_carry_their_weights(mask: Tensor | None) -> None:
    pairing = Pairing(dist(label_weight=0.5, loss_weight=3, beta=2, gamma=0.5, temperature=4), mask=mask)
    student, teacher, _ = counted(pairing)
    label = FakeStep().label_loss(pairing.student, pairing.batch).mean
    wanted = {"label": 0.5 * label, "dist": 3 * dist_loss(student, teacher, 2.0, 0.5, 4.0)}
    torch.testing.assert_close({name: term.mean for name, term in pairing.terms().items()}, wanted)


@pytest.mark.parametrize("method", [dkd(), dist()], ids=["dkd", "dist"])
def test_where_no_row_counts_the_loss_is_zero_with_a_gradient(method: Any) -> None:
    pairing = Pairing(method, mask=torch.zeros(ROWS))
    for name, term in pairing.terms().items():
        if name != "label":  # the task's own, which the fake step takes for a mean over nothing
            assert term.mean == 0
            assert term.mean.requires_grad


@pytest.mark.parametrize("method", [dkd(), dist()], ids=["dkd", "dist"])
def test_gradients_reach_the_student_alone(method: Any) -> None:
    pairing = Pairing(method)
    pairing.backward()
    student, teacher = pairing.nets
    assert all(parameter.grad is not None for parameter in student.parameters())
    assert all(parameter.grad is None for parameter in teacher.parameters())
    assert not list(method.parameters())


def test_dkd_refuses_distributions_before_the_first_step() -> None:
    with pytest.raises(ValueError, match=rf"takes class ids; this data's targets have shape \[{CLASSES}\]"):
        Pairing(dkd(), target=torch.full((ROWS, CLASSES), 1 / CLASSES))


def test_dist_takes_distributions() -> None:
    soft = torch.full((ROWS, CLASSES), 1 / CLASSES)
    assert Pairing(dist(), target=soft).terms()["dist"].mean == Pairing(dist()).terms()["dist"].mean


def test_card_defaults() -> None:
    one, other = dkd().config, dist().config
    assert (one.label_weight, one.loss_weight, one.alpha, one.beta) == (1, 1, 1, 8)
    assert (one.temperature, one.warmup_epochs) == (4, 20)
    assert (other.label_weight, other.loss_weight, other.beta, other.gamma, other.temperature) == (
        1,
        1,
        1,
        1,
        1,
    )


def test_dist_couples_rows_and_dkd_does_not() -> None:
    assert DIST.needs.couples_rows == "loss"
    assert DKD.needs.couples_rows is None
    assert DIST.needs.scale == DKD.needs.scale == "log_probs"


@pytest.mark.parametrize(
    ("make", "option"),
    [(dkd, {"temperature": 0}), (dkd, {"beta": -1}), (dkd, {"warmup_epochs": -1}), (dist, {"gamma": -1})],
)
def test_bounds_are_refused_by_name(make: Any, option: dict[str, float]) -> None:
    with pytest.raises(ValidationError, match=next(iter(option))):
        make(**option)
