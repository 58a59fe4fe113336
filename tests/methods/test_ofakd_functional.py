"""OFA-KD's loss and patch merging: the authors' values, identities, extremes, bad input."""

from __future__ import annotations

from inspect import unwrap
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tutelage.functional import ofa_loss, ofakd_loss, patch_merge

GOLDEN = Path(__file__).parent.parent / "golden" / "ofakd"
seeds = st.integers(0, 2**31 - 1)
quick = settings(max_examples=25, deadline=None)


def draw(seed: int, rows: int = 5, classes: int = 7, scale: float = 3.0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    student, teacher = scale * torch.randn(2, rows, classes, generator=generator, dtype=torch.float64)
    return student.requires_grad_(), teacher, torch.randint(classes, (rows,), generator=generator)


def soft_label(target: Tensor, classes: int, share: float = 0.7) -> Tensor:
    return share * F.one_hot(target, classes).double() + (1 - share) / classes


@pytest.mark.parametrize(
    ("case", "gamma", "temperature"),
    [("ofa_loss_eps1", 1.0, 1.0), ("ofa_loss_eps15", 1.5, 1.0), ("ofa_loss_eps2_t3", 2.0, 3.0)],
)
def test_golden(case: str, gamma: float, temperature: float) -> None:
    with np.load(GOLDEN / f"{case}.npz") as data:
        arrays = {name: torch.from_numpy(np.asarray(data[name])) for name in data}
    student = arrays["in_logits_student"].requires_grad_()
    loss = ofa_loss(student, arrays["in_logits_teacher"], arrays["in_labels"], gamma, temperature)
    loss.backward()
    torch.testing.assert_close(loss, arrays["out_loss"], rtol=1e-10, atol=0)
    torch.testing.assert_close(student.grad, arrays["grad_logits_student"], rtol=1e-9, atol=1e-12)


@quick
@given(seeds, st.floats(0.3, 4.0), st.floats(0.5, 8.0))
def test_it_is_the_cards_formula(seed: int, gamma: float, temperature: float) -> None:
    student, teacher, target = draw(seed)
    p, log_q = (teacher / temperature).softmax(1), (student / temperature).log_softmax(1)
    hit = F.one_hot(target, 7)
    code = -(((p + hit) ** gamma - hit) * log_q).sum(1).mean()
    paper = -(((1 + p) ** gamma * hit + p * (1 - hit)) * log_q).sum(1).mean()
    torch.testing.assert_close(ofa_loss(student, teacher, target, gamma, temperature), code)
    torch.testing.assert_close(ofa_loss(student, teacher, target, gamma, temperature, form="paper"), paper)


@quick
@given(seeds)
def test_gamma_one_is_the_cross_entropy_to_the_teacher(seed: int) -> None:
    student, teacher, target = draw(seed)
    plain = F.cross_entropy(student, teacher.softmax(1))
    torch.testing.assert_close(ofa_loss(student, teacher, target), plain, rtol=1e-12, atol=1e-12)
    both = plain + F.cross_entropy(student, target)
    torch.testing.assert_close(ofa_loss(student, teacher, target, form="paper"), both, rtol=1e-12, atol=1e-12)


@quick
@given(seeds, st.floats(1.0, 4.0))
def test_above_one_the_target_weighs_more_and_the_others_less(seed: int, gamma: float) -> None:
    _, teacher, target = draw(seed, rows=1)
    p = teacher.softmax(1)
    # A student to whom class k alone is next to impossible pays for its weight alone.
    unlikely = -1e9 * torch.eye(7, dtype=torch.float64)
    weights = torch.stack([ofa_loss(row[None], teacher, target, gamma) / 1e9 for row in unlikely])
    hit = F.one_hot(target, 7)[0].bool()
    assert (weights[hit] >= p[0, hit] - 1e-7).all()
    assert (weights[~hit] <= p[0, ~hit] + 1e-7).all()


def test_no_small_probability_of_the_target_is_lost() -> None:
    teacher = torch.tensor([[0.0, 30.0]])
    student = torch.tensor([[-1e6, 0.0]])
    loss = ofa_loss(student, teacher, torch.tensor([0]), gamma=1.0)
    torch.testing.assert_close(loss, 1e6 * teacher.softmax(1)[0, 0], rtol=1e-5, atol=0)


@quick
@given(seeds, st.floats(-1e3, 1e3), st.sampled_from(["code", "paper"]))
def test_a_constant_a_row_and_the_order_of_rows_and_classes_change_nothing(
    seed: int, shift: float, form: Any
) -> None:
    student, teacher, target = draw(seed)
    loss = ofa_loss(student, teacher, target, 1.5, 2.0, form)
    classes = torch.randperm(7, generator=torch.Generator().manual_seed(seed))
    moved = ofa_loss(student + shift, teacher - shift, target, 1.5, 2.0, form)
    torch.testing.assert_close(moved, loss, rtol=1e-8, atol=1e-9)
    turned = ofa_loss(student.flip(0), teacher.flip(0), target.flip(0), 1.5, 2.0, form)
    torch.testing.assert_close(turned, loss)
    shuffled = student[:, classes], teacher[:, classes], classes.argsort()[target]
    torch.testing.assert_close(ofa_loss(*shuffled, 1.5, 2.0, form), loss)


@pytest.mark.parametrize("form", ["code", "paper"])
@pytest.mark.parametrize("gamma", [0.5, 1.0, 2.0])
def test_gradcheck(form: Any, gamma: float) -> None:
    student, teacher, target = draw(1, rows=3, classes=4)
    soft = soft_label(target, 4)
    for given_target in (target, soft):
        assert torch.autograd.gradcheck(
            lambda z, y=given_target: ofa_loss(z, teacher, y, gamma, 2.0, form), student
        )
    branch = teacher.flip(0).clone().requires_grad_()
    assert torch.autograd.gradcheck(
        lambda z, h: ofakd_loss(z, [h], teacher, soft, gamma, form=form).total, (student, branch)
    )


def test_a_soft_target_enhances_its_largest_entry_and_its_label_part_is_whole() -> None:
    student, teacher, target = draw(2)
    soft = soft_label(target, 7)
    assert ofa_loss(student, teacher, soft, 1.5) == ofa_loss(student, teacher, target, 1.5)
    terms = ofakd_loss(student, [teacher], teacher, soft, 1.5)
    torch.testing.assert_close(terms.label, F.cross_entropy(student, soft))


@quick
@given(seeds)
def test_the_whole_loss_is_the_weighted_sum_of_its_parts(seed: int) -> None:
    student, teacher, target = draw(seed)
    branches = [student.flip(0), student.roll(1, 1)]
    terms = ofakd_loss(student, branches, teacher, target, [1.0, 1.5, 2.0], 2.0, 0.5, 3.0, 0.25)
    torch.testing.assert_close(terms.label, 0.5 * F.cross_entropy(student, target))
    torch.testing.assert_close(terms.logits, 3 * ofa_loss(student, teacher, target, 2.0, 2.0))
    first, second = (ofa_loss(h, teacher, target, g, 2.0) for h, g in zip(branches, (1.0, 1.5), strict=True))
    torch.testing.assert_close(terms.branches, 0.25 * (first + second))
    torch.testing.assert_close(terms.total, terms.label + terms.logits + terms.branches)


def test_one_gamma_serves_all_and_no_branches_are_no_part() -> None:
    student, teacher, target = draw(3)
    one = ofakd_loss(student, [teacher], teacher, target, 1.5)
    assert one == ofakd_loss(student, [teacher], teacher, target, [1.5])
    assert one == ofakd_loss(student, [teacher], teacher, target, (1.5, 1.5))
    assert ofakd_loss(student, [], teacher, target).branches == 0


def test_the_teacher_gets_no_gradient_and_every_exit_its_own() -> None:
    student, teacher, target = draw(4)
    teacher.requires_grad_()
    branch = teacher.detach().clone().requires_grad_()
    ofakd_loss(student, [branch], teacher, target, 1.5).total.backward()
    assert teacher.grad is None
    for tensor in (student, branch):
        assert tensor.grad is not None
        assert tensor.grad.abs().max() > 0


@pytest.mark.parametrize("gamma", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("soft", [False, True], ids=["ids", "distributions"])
def test_finite_at_extremes_and_in_a_batch_of_one(gamma: float, soft: bool) -> None:
    logits = torch.tensor([[1e4, -1e4, 0.0, 5.0], [-1e4, 1e4, 1e4, 0.0]])
    target: Tensor = torch.tensor([1, 0])
    if soft:
        target = soft_label(target, 4).float()
    for rows in (slice(0, 2), slice(0, 1)):
        student = logits[rows].clone().requires_grad_()
        branch = logits[rows].flip(1).clone().requires_grad_()
        total = ofakd_loss(student, [branch], -logits[rows], target[rows], gamma).total
        total.backward()
        assert total.isfinite()
        for tensor in (student, branch):
            assert tensor.grad is not None
            assert tensor.grad.isfinite().all()


def test_an_empty_batch_is_zero_with_a_gradient() -> None:
    student = torch.zeros(0, 4, requires_grad=True)
    terms = ofakd_loss(student, [student], student, torch.zeros(0, dtype=torch.int64))
    terms.total.backward()
    assert terms.total == 0
    assert student.grad is not None


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32_and_float64_stays(dtype: torch.dtype) -> None:
    student, teacher, target = draw(5)
    assert ofakd_loss(student, [teacher], teacher, target).total.dtype == torch.float64
    z, t = student.detach().to(dtype), teacher.to(dtype)
    terms = ofakd_loss(z, [t], t, target)
    assert terms.total.dtype == torch.float32
    assert terms == ofakd_loss(z.float(), [t.float()], t.float(), target)


def test_bad_input() -> None:
    student, teacher, target = draw(6)
    for gamma in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match=r"gamma must be finite and above 0"):
            ofa_loss(student, teacher, target, gamma)
    with pytest.raises(ValueError, match=r"temperature must be finite and above 0; got 0"):
        ofa_loss(student, teacher, target, temperature=0)
    with pytest.raises(ValueError, match=r"form must be 'code' or 'paper'; got 'book'"):
        unwrap(ofa_loss)(student, teacher, target, form="book")
    with pytest.raises(ValueError, match=r"shapes must agree; got logits \[5, 7\], teacher_logits \[4, 7\]"):
        unwrap(ofa_loss)(student, teacher[:4], target)
    with pytest.raises(ValueError, match=r"branch_logits\[1\] \[5, 6\]"):
        unwrap(ofakd_loss)(student, [teacher, teacher[:, 1:]], teacher, target)
    for count in (0, 2, 4):
        with pytest.raises(ValueError, match=rf"gamma must be one number, or 3: .*got {count}"):
            ofakd_loss(student, [teacher, teacher], teacher, target, [1.0] * count)
    for value in (7, -1):
        with pytest.raises(IndexError, match=rf"target {value} names none of the 7 classes"):
            ofakd_loss(student, [], teacher, torch.tensor([0, 1, 2, 3, value]))


def test_patches_are_merged_in_the_authors_order() -> None:
    grid = torch.arange(24.0).view(1, 24, 1)  # 4 rows of 6
    merged = patch_merge(grid, 4, 6)
    assert merged.shape == (1, 6, 4)
    assert merged[0, 0].tolist() == [0, 6, 1, 7]
    assert merged[0, 2].tolist() == [4, 10, 5, 11]
    assert merged[0, 3].tolist() == [12, 18, 13, 19]


def test_merging_keeps_every_channel_together() -> None:
    tokens = torch.randn(2, 16, 3, requires_grad=True)
    merged = patch_merge(tokens, 4, 4)
    torch.testing.assert_close(merged[1, 3, 3:6], tokens[1, 14])  # odd row, even column of the last square
    merged.sum().backward()
    assert tokens.grad is not None
    assert (tokens.grad == 1).all()


@pytest.mark.parametrize(
    ("height", "width", "match"),
    [(3, 4, "3x4 must be even"), (4, 3, "4x3 must be even"), (4, 4, "16 patches; got 12")],
)
def test_a_grid_that_cannot_be_merged(height: int, width: int, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        patch_merge(torch.zeros(1, 12, 2), height, width)
