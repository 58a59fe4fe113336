"""Class means and the ND loss: the authors' values, the card's identities, extremes, bad input."""

from __future__ import annotations

from inspect import unwrap
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tutelage.functional import ClassMeanAccumulator, class_means, kd_loss, nd_loss
from tutelage.functional.checks import TargetError

GOLDEN = Path(__file__).parent.parent / "golden" / "nd"
seeds = st.integers(0, 2**31 - 1)
quick = settings(max_examples=25, deadline=None)
FORMS = ("norm_direction", "direction")


def arrays(case: str) -> dict[str, Tensor]:
    with np.load(GOLDEN / f"{case}.npz") as data:
        return {name: torch.from_numpy(data[name]) for name in data if data[name].dtype.kind in "fiu"}


def draw(seed: int, rows: int = 6, width: int = 5, classes: int = 4) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    student, teacher = torch.randn(2, rows, width, generator=generator, dtype=torch.float64)
    means = torch.randn(classes, width, generator=generator, dtype=torch.float64)
    return student.requires_grad_(), teacher, means, torch.randint(classes, (rows,), generator=generator)


def by_hand(student: Tensor, teacher: Tensor, means: Tensor, target: Tensor) -> Tensor:
    terms = []
    for s, t, y in zip(student, teacher, target.tolist(), strict=True):
        terms.append(1 - s @ (means[y] / means[y].norm()) / max(s.norm(), t.norm()))
    return torch.stack(terms).mean()


# --- the authors' values


@pytest.mark.parametrize(
    ("case", "weight"), [("nd_default", 1.0), ("nd_student_small_norm", 2.0), ("nd_student_large_norm", 2.0)]
)
def test_golden(case: str, weight: float) -> None:
    data = arrays(case)
    student = data["in_feature_student"].requires_grad_()
    loss = nd_loss(
        student, data["in_feature_teacher"], data["in_class_means"], data["in_labels"], weight=weight
    )
    loss.backward()
    torch.testing.assert_close(loss, data["out_loss"], rtol=1e-10, atol=0)
    torch.testing.assert_close(student.grad, data["grad_feature_student"], rtol=1e-9, atol=1e-12)


def test_golden_class_means_up_to_their_rounding() -> None:
    """The authors round features and means to four decimals."""
    data = arrays("class_means")
    found = class_means(data["in_embeddings"], data["in_labels"], 4)
    torch.testing.assert_close(found, data["out_class_means"], rtol=0, atol=1.1e-4)


def test_golden_kd_term() -> None:
    data = arrays("kd_term_t4")
    loss = kd_loss(data["in_logits_student"], data["in_logits_teacher"], 4.0, weight=2.5)
    torch.testing.assert_close(loss, data["out_loss"], rtol=1e-9, atol=0)


# --- identities


@quick
@given(seeds)
def test_it_is_the_row_by_row_equation_between_0_and_2(seed: int) -> None:
    student, teacher, means, target = draw(seed)
    loss = nd_loss(student, teacher, means, target)
    torch.testing.assert_close(loss, by_hand(student, teacher, means, target))
    torch.testing.assert_close(nd_loss(student, teacher, means, target, weight=2.5), 2.5 * loss)
    assert 0 <= loss <= 2


@quick
@given(seeds, st.floats(1.0, 1e3))
def test_a_feature_longer_than_the_teachers_may_grow_without_a_change(seed: int, factor: float) -> None:
    student, teacher, means, target = draw(seed)
    longer = 1.01 * student * (teacher.norm(dim=1) / student.norm(dim=1))[:, None]
    torch.testing.assert_close(
        nd_loss(factor * longer, teacher, means, target),
        nd_loss(longer, teacher, means, target),
        rtol=1e-12,
        atol=1e-12,
    )
    torch.testing.assert_close(
        nd_loss(longer, teacher, means, target), nd_loss(student, teacher, means, target, form="direction")
    )


@quick
@given(seeds)
def test_a_shorter_one_is_pulled_along_the_mean_by_the_teachers_length(seed: int) -> None:
    student, teacher, means, target = draw(seed)
    student = (0.9 * student * (teacher.norm(dim=1) / student.norm(dim=1))[:, None]).detach().requires_grad_()
    nd_loss(student, teacher, means, target).backward()
    direction = means[target] / means[target].norm(dim=1, keepdim=True)
    wanted = -direction / teacher.norm(dim=1, keepdim=True) / len(student)
    torch.testing.assert_close(student.grad, wanted, rtol=1e-10, atol=1e-12)


def test_at_equal_length_the_students_own_counts() -> None:
    """The gradient then is that of the cosine: none along the feature."""
    student = torch.tensor([[3.0, 4.0]], dtype=torch.float64, requires_grad=True)
    target = torch.tensor([0])
    nd_loss(
        student, torch.tensor([[0.0, 5.0]], dtype=torch.float64), torch.eye(2).double(), target
    ).backward()
    assert student.grad is not None
    assert abs((student.grad * student.detach()).sum().item()) < 1e-15
    assert student.grad.abs().sum() > 0


@quick
@given(seeds, st.floats(0.1, 100.0))
def test_the_length_of_the_means_and_the_order_of_rows_do_not_matter(seed: int, factor: float) -> None:
    student, teacher, means, target = draw(seed)
    rows = torch.randperm(6, generator=torch.Generator().manual_seed(seed))
    loss = nd_loss(student, teacher, means, target)
    moved = nd_loss(student[rows], teacher[rows], factor * means, target[rows])
    torch.testing.assert_close(moved, loss, rtol=1e-10, atol=1e-12)


def test_along_the_mean_at_the_teachers_length_it_is_0() -> None:
    _, teacher, means, target = draw(0)
    along = means[target] * (teacher.norm(dim=1) / means[target].norm(dim=1))[:, None] * 1.5
    along.requires_grad_()
    loss = nd_loss(along, teacher, means, target)
    loss.backward()
    assert abs(loss.item()) < 1e-12
    assert along.grad is not None
    assert along.grad.abs().max() < 1e-12


@pytest.mark.parametrize("form", FORMS)
def test_gradcheck(form: str) -> None:
    student, teacher, means, target = draw(3, rows=4)
    assert torch.autograd.gradcheck(lambda s: nd_loss(s, teacher, means, target, 1.5, form), student)


# --- extremes


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("size", [1e-6, 1e4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_large_and_small_features_are_finite(size: float, dtype: torch.dtype, form: str) -> None:
    student, teacher, means, target = draw(1)
    ours = (size * student.detach()).to(dtype).requires_grad_()
    loss = nd_loss(ours, (size * teacher).to(dtype), (size * means).to(dtype), target, form=form)
    loss.backward()
    assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert loss.isfinite()
    assert ours.grad is not None
    assert ours.grad.isfinite().all()


@pytest.mark.parametrize("form", FORMS)
def test_features_of_0(form: str) -> None:
    """Both 0: the term is 1 without a gradient. The student's alone: a gradient along the mean, by the teacher's
    length; with the direction alone none."""
    student = torch.zeros(2, 2, dtype=torch.float64, requires_grad=True)
    teacher = torch.tensor([[0.0, 0.0], [0.0, 4.0]], dtype=torch.float64)
    means = torch.tensor([[2.0, 0.0]], dtype=torch.float64)
    loss = nd_loss(student, teacher, means, torch.zeros(2, dtype=torch.int64), form=form)
    loss.backward()
    assert loss == 1
    pulled = -0.25 / 2 if form == "norm_direction" else 0.0
    assert student.grad is not None
    assert student.grad.tolist() == [[0.0, 0.0], [pulled, 0.0]]


def test_one_row_and_no_row() -> None:
    student, teacher, means, target = draw(2, rows=1)
    torch.testing.assert_close(
        nd_loss(student, teacher, means, target), by_hand(student, teacher, means, target)
    )
    empty = torch.zeros(0, 5, requires_grad=True)
    loss = nd_loss(empty, torch.zeros(0, 5), torch.ones(4, 5), torch.zeros(0, dtype=torch.int64))
    loss.backward()
    assert loss == 0
    assert empty.grad is not None


def test_the_teachers_side_gets_no_gradient() -> None:
    student, teacher, means, target = draw(4)
    nd_loss(student, teacher.requires_grad_(), means.requires_grad_(), target).backward()
    assert teacher.grad is None
    assert means.grad is None


# --- class means


@quick
@given(seeds, st.integers(1, 6))
def test_means_do_not_depend_on_the_cut_into_batches(seed: int, size: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    features, target = torch.randn(24, 3, generator=generator), torch.arange(24) % 4
    found = ClassMeanAccumulator(4)
    for start in range(0, 24, size):
        found.update(features[start : start + size], target[start : start + size])
    by_class = torch.stack([features[target == k].mean(0) for k in range(4)])
    torch.testing.assert_close(found.result(), by_class)
    torch.testing.assert_close(class_means(features, target, 4), found.result(), rtol=0, atol=0)


def test_sums_keep_what_float32_loses() -> None:
    features = torch.cat([torch.full((1, 1), 1e8), torch.ones(1000, 1), torch.full((1, 1), -1e8)])
    found = class_means(features, torch.zeros(1002, dtype=torch.int64), 1)
    assert float(found) == pytest.approx(1000 / 1002)
    half = class_means(torch.ones(3, 2).half(), torch.zeros(3, dtype=torch.int64), 1)
    assert half.dtype == torch.float32


def test_classes_without_rows_are_named() -> None:
    with pytest.raises(ValueError, match=r"2 of 4 classes have no rows: 1, 3; every class needs one"):
        class_means(torch.ones(2, 3), torch.tensor([0, 2]), 4)
    with pytest.raises(ValueError, match="no rows: there are no class means"):
        ClassMeanAccumulator(2).result()
    with pytest.raises(ValueError, match="not finite in rows of class 1"):
        class_means(torch.tensor([[1.0], [torch.inf]]), torch.tensor([0, 1]), 2)


def test_bad_class_means_input() -> None:
    with pytest.raises(ValueError, match="num_classes must be at least 1; got 0"):
        ClassMeanAccumulator(0)
    with pytest.raises(TargetError, match="target 4 names none of the 4 classes"):
        class_means(torch.ones(2, 3), torch.tensor([0, 4]), 4)
    found = ClassMeanAccumulator(2)
    found.update(torch.ones(1, 3), torch.tensor([0]))
    with pytest.raises(ValueError, match=r"features were 3 wide before; got shape \[1, 4\]"):
        unwrap(ClassMeanAccumulator.update)(found, torch.ones(1, 4), torch.tensor([0]))
    with pytest.raises(ValueError, match=r"features must be \[rows, features\]; got shape \[1, 4, 1\]"):
        unwrap(ClassMeanAccumulator.update)(found, torch.ones(1, 4, 1), torch.tensor([0]))


# --- bad input


def test_distributions_are_refused_by_name() -> None:
    student, teacher, means, _ = draw(0)
    with pytest.raises(TypeError, match=r"one class a row; got distributions \[6, 4\]: switch mixup off"):
        unwrap(nd_loss)(student, teacher, means, torch.ones(6, 4) / 4)


def test_class_means_without_a_direction_are_named() -> None:
    student, teacher, means, _ = draw(0)
    for value in (0.0, torch.nan, torch.inf):
        means[2] = value
        nd_loss(student, teacher, means, torch.tensor([0, 1, 3, 0, 1, 3]))
        with pytest.raises(ValueError, match="mean of class 2 is 0 or not finite: it has no direction"):
            nd_loss(student, teacher, means, torch.tensor([0, 1, 2, 0, 1, 2]))


def test_shapes_ids_and_forms() -> None:
    student, teacher, means, target = draw(0)
    loss = unwrap(nd_loss)
    with pytest.raises(ValueError, match=r"student_features \[6, 5\], teacher_features \[6, 4\]"):
        loss(student, teacher[:, :4], means, target)
    with pytest.raises(ValueError, match=r"got shapes \[6, 5\] and \[4, 4\]"):
        loss(student, teacher, means[:, :4], target)
    with pytest.raises(TargetError, match="target -1 names none of the 4 classes"):
        loss(student, teacher, means, target.clone().fill_(-1))
    with pytest.raises(ValueError, match="class ids must be integers"):
        loss(student, teacher, means, target.double())
    with pytest.raises(ValueError, match=r"target must be class ids \[6\]; got shape \[5\]"):
        loss(student, teacher, means, target[:5])
    with pytest.raises(ValueError, match="form must be one of norm_direction, direction; got 'norm'"):
        loss(student, teacher, means, target, form="norm")
