"""mixkd and mixup: how much is mixed, the loss without a temperature, and what a step does to a batch."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from objectives import FakeStep, Pairing, images
from torch import Tensor
from torch.autograd import gradcheck

from tutelage.engine.types import Batch
from tutelage.functional import (
    kd_loss,
    mixstd_loss,
    output_smoothness,
    partial_mixup_weight,
    standardize_logits,
)
from tutelage.methods.mixkd.method import MixKD, MixKDConfig, Mixup, MixupConfig, mixed_batch


def logits(rows: int = 6, classes: int = 4, seed: int = 0) -> Tensor:
    return torch.randn(rows, classes, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@given(st.integers(1, 60), st.floats(0, 1), st.floats(0.05, 5))
def test_that_share_is_left_alone(batch: int, unmixed: float, beta: float) -> None:
    weight = partial_mixup_weight(
        batch, beta=beta, unmixed=unmixed, generator=torch.Generator().manual_seed(0)
    )
    assert ((weight >= 0) & (weight <= 1)).all()
    assert (weight == 1).sum() >= int(batch * unmixed)
    if unmixed == 1:
        assert (weight == 1).all()


def test_with_replacement_less_is_left_alone() -> None:
    """1 - exp(-0.9) of the rows, as the authors' code does."""
    weight = partial_mixup_weight(20000, unmixed=0.9, exact=False, generator=torch.Generator().manual_seed(0))
    assert float((weight == 1).float().mean()) == pytest.approx(1 - math.exp(-0.9), abs=0.01)
    exact = partial_mixup_weight(20000, unmixed=0.9, generator=torch.Generator().manual_seed(0))
    assert int((exact == 1).sum()) == 18000


def test_the_weights_are_betas() -> None:
    weight = partial_mixup_weight(50000, beta=0.4, unmixed=0.0, generator=torch.Generator().manual_seed(0))
    assert float(weight.mean()) == pytest.approx(0.5, abs=0.01)
    assert float(weight.var()) == pytest.approx(1 / (4 * (2 * 0.4 + 1)), abs=0.005)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"beta": 0.0}, "beta"), ({"unmixed": 1.1}, "unmixed"), ({"unmixed": -0.1}, "unmixed")],
)
def test_bad_shares(options: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        partial_mixup_weight(4, **options)


def test_the_deviation_is_1_and_keeps_its_gradient() -> None:
    found = standardize_logits(logits())
    torch.testing.assert_close(found.std(1), torch.ones(6, dtype=torch.float64))
    assert gradcheck(standardize_logits, logits().requires_grad_())
    # A scale of the logits changes nothing, so no gradient points along them.
    student = logits().requires_grad_()
    (standardize_logits(student) * logits(seed=1)).sum().backward()
    assert student.grad is not None
    assert ((student.grad * student).sum(1).abs() < 1e-12).all()


def test_rows_of_equal_logits_are_finite() -> None:
    student = torch.full((2, 4), 3.0, requires_grad=True)
    mixstd_loss(student, torch.zeros(2, 4), torch.tensor([0, 1])).total.backward()
    assert student.grad is not None
    assert torch.isfinite(student.grad).all()
    with pytest.raises(ValueError, match="needs two of them; got 1"):
        standardize_logits(torch.zeros(2, 1))


def test_the_largest_probability_has_the_cards_bound() -> None:
    for classes in (2, 10, 100):
        row = torch.zeros(1, classes, dtype=torch.float64)
        row[0, 0] = 7.0
        m = (classes - 1) / math.sqrt(classes)
        bound = math.exp(m) / (math.exp(m) + (classes - 1) * math.exp(-m / (classes - 1)))
        assert float(standardize_logits(row).softmax(1).max()) == pytest.approx(bound)
    assert bound == pytest.approx(0.995, abs=0.01)


def test_scale_and_shift_change_nothing_and_equal_logits_have_no_divergence() -> None:
    student, teacher, target = logits(), logits(seed=1), torch.tensor([0, 1, 2, 3, 0, 1])
    before = mixstd_loss(student, teacher, target)
    after = mixstd_loss(3 * student + 5, 0.2 * teacher - 1, target)
    torch.testing.assert_close(after.total, before.total)
    assert mixstd_loss(student, 2 * student, target).div.abs() < 1e-12
    soft = mixstd_loss(student, teacher, F.one_hot(target, 4).double())
    torch.testing.assert_close(soft.total, before.total)
    order = torch.randperm(6)
    torch.testing.assert_close(mixstd_loss(student[order], teacher[order], target[order]).total, before.total)


def test_gradients_reach_the_student_alone() -> None:
    student, teacher = logits().requires_grad_(), logits(seed=1).requires_grad_()
    target = torch.rand(6, 4, dtype=torch.float64).softmax(1)
    assert gradcheck(lambda z: mixstd_loss(z, teacher.detach(), target).total, student)
    mixstd_loss(student, teacher, target).total.backward()
    assert teacher.grad is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_large_logits_and_no_rows(dtype: torch.dtype) -> None:
    student = (logits() * 1e4).to(dtype).requires_grad_()
    total = mixstd_loss(student, -student, torch.zeros(6, dtype=torch.int64)).total
    total.backward()
    assert total.dtype == torch.float32
    assert torch.isfinite(total)
    assert torch.isfinite(student.grad).all()  # type: ignore[arg-type]
    empty = torch.zeros(0, 4, requires_grad=True)
    assert mixstd_loss(empty, empty, torch.zeros(0, dtype=torch.int64)).total == 0


def test_smoothness() -> None:
    flat = output_smoothness(torch.zeros(3, 8))
    assert (float(flat.entropy), float(flat.std), float(flat.max_prob)) == pytest.approx(
        (math.log(8), 0, 1 / 8)
    )
    sharp, soft = output_smoothness(logits()), output_smoothness(logits(), temperature=4.0)
    assert soft.entropy > sharp.entropy
    assert soft.max_prob < sharp.max_prob
    assert soft.std == sharp.std
    with pytest.raises(ValueError, match="at least two classes"):
        output_smoothness(torch.zeros(0, 4))


# The methods.


def mixkd(**options: Any) -> MixKD:
    return MixKD(MixKDConfig(name="mixkd", **options))


def transformed(method: Mixup, batch: Batch | None = None) -> Batch:
    Pairing(method)
    return method.transform(batch or images(), FakeStep())  # type: ignore[arg-type]


def test_ids_masks_and_columns_go_along() -> None:
    batch = images(columns={"code": torch.arange(6) * 10}, mask=torch.tensor([1, 1, 1, 0, 1, 1]))
    first, second = torch.tensor([5, 4, 3, 2, 1, 0]), torch.tensor([0, 1, 2, 3, 4, 5])
    mixed = mixed_batch(batch, first, second, torch.tensor([1.0, 0.5, 0.5, 0.5, 1.0, 0.0]), 5)
    assert mixed.index.tolist() == first.tolist()  # type: ignore[union-attr]
    assert mixed.columns["code"].tolist() == [50, 40, 30, 20, 10, 0]
    assert mixed.mask.tolist() == [True, True, False, False, True, True]  # type: ignore[union-attr]
    assert torch.equal(mixed.inputs[0], batch.inputs[5])
    torch.testing.assert_close(mixed.inputs[1], 0.5 * batch.inputs[4] + 0.5 * batch.inputs[1])
    assert mixed.target[1].tolist() == [0, 0.5, 0, 0, 0.5]  # type: ignore[index]
    assert mixed.target[5].tolist() == [1, 0, 0, 0, 0]  # type: ignore[index]


def test_nothing_mixed_is_the_batch_in_another_order() -> None:
    batch = images()
    mixed = transformed(mixkd(unmixed=1.0), batch)
    assert sorted(mixed.index.tolist()) == list(range(6))  # type: ignore[union-attr]
    assert torch.equal(mixed.inputs, batch.inputs[mixed.index])
    one = transformed(Mixup(MixupConfig(name="mixup")), images(1))
    assert torch.equal(one.inputs, images(1).inputs)


def test_terms_of_both_ways_to_smooth() -> None:
    pairing = Pairing(mixkd(label_weight=0.2, loss_weight=0.7))
    assert pairing.batch.target is not None
    parts = mixstd_loss(
        pairing.student.logits, pairing.teacher.logits, pairing.batch.target, gamma=0.2, alpha=0.7
    )
    terms = pairing.terms()
    torch.testing.assert_close((terms["class"].mean, terms["divergence"].mean), (parts.cls, parts.div))
    plain = Pairing(mixkd(smoothing="temperature", loss_weight=0.7, temperature=2.0))
    wanted = 0.7 * kd_loss(plain.student.logits, plain.teacher.logits, 2.0)
    terms = plain.terms()
    torch.testing.assert_close(terms["kd"].mean, wanted)
    torch.testing.assert_close(
        terms["label"].mean, 0.1 * F.cross_entropy(plain.student.logits, pairing.batch.target)
    )


def test_masked_rows_do_not_count() -> None:
    keep = torch.tensor([1, 0, 1, 1, 0, 1])
    pairing = Pairing(mixkd(), mask=keep)
    rows = keep.bool()
    assert pairing.batch.target is not None
    wanted = mixstd_loss(
        pairing.student.logits[rows], pairing.teacher.logits[rows], pairing.batch.target[rows]
    )
    torch.testing.assert_close(pairing.terms()["class"].mean, wanted.cls)


def test_what_cannot_be_mixed() -> None:
    with pytest.raises(ValueError, match="mixup needs labels"):
        transformed(mixkd(), images(target=None))
    with pytest.raises(ValueError, match="inputs in one tensor"):
        transformed(mixkd(), Batch({"pixels": torch.rand(6, 2)}, target=torch.zeros(6, dtype=torch.int64)))
