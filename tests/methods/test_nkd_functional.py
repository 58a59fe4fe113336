"""NKD and USKD: the authors' values, the identities of the card, extremes, bad input."""

from __future__ import annotations

from collections.abc import Callable
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
    nkd_loss,
    nkd_terms,
    uskd_linear_loss,
    uskd_loss,
    uskd_soft_target,
    zipf_labels,
)

GOLDEN = Path(__file__).parent.parent / "golden" / "nkd"
seeds = st.integers(0, 2**31 - 1)
quick = settings(max_examples=25, deadline=None)


def arrays(case: str) -> dict[str, Tensor]:
    with np.load(GOLDEN / f"{case}.npz") as data:
        return {name: torch.from_numpy(data[name]) for name in data}


def draw(seed: int, rows: int = 5, classes: int = 7, scale: float = 3.0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    student, other = scale * torch.randn(2, rows, classes, generator=generator, dtype=torch.float64)
    return student.requires_grad_(), other, torch.randint(classes, (rows,), generator=generator)


def distribution(target: Tensor, other: Tensor, classes: int, share: float = 0.7) -> Tensor:
    one_hot = torch.nn.functional.one_hot
    return share * one_hot(target, classes).double() + (1 - share) * one_hot(other, classes)


@pytest.mark.parametrize(
    ("case", "options"),
    [
        ("nkd_imagenet_default", {}),
        ("nkd_cifar_t3_g35", {"gamma": 3.5, "temperature": 3.0}),
        ("nkd_soft_labels", {"gamma": 1.0}),
    ],
)
def test_nkd_golden(case: str, options: dict[str, float]) -> None:
    data = arrays(case)
    student = data["in_logits_student"].requires_grad_()
    rest = data["in_logits_teacher"], data["in_labels"]
    loss = nkd_loss(student, *rest, **options)
    loss.backward()
    torch.testing.assert_close(loss, data["out_loss"], rtol=1e-10, atol=0)
    torch.testing.assert_close(student.grad, data["grad_logits_student"], rtol=1e-9, atol=1e-12)
    terms = nkd_terms(student, *rest, options.get("temperature", 1.0))
    torch.testing.assert_close(terms.target, data["out_loss_target"], rtol=1e-10, atol=0)


@pytest.mark.parametrize(
    ("case", "weights"),
    [
        ("uskd_imagenet_default", {}),
        ("uskd_cifar_default", {"alpha": 0.1, "beta": 0.1, "mu": 0.1}),
        ("uskd_mixup", {}),
    ],
)
def test_uskd_golden(case: str, weights: dict[str, float]) -> None:
    data = arrays(case)
    inputs = {
        name: data[f"in_{name}"].requires_grad_()
        for name in ("logits_student", "feature_mid", "fc_weight", "fc_bias")
    }
    result = uskd_linear_loss(*inputs.values(), data["in_labels"], **weights)
    result.total.backward()
    for part, name in zip(
        result, ("out_loss", "out_loss_target", "out_loss_nontarget", "out_loss_weak"), strict=True
    ):
        torch.testing.assert_close(part, data[name], rtol=1e-10, atol=0)
    for name, tensor in inputs.items():
        torch.testing.assert_close(tensor.grad, data[f"grad_{name}"], rtol=1e-9, atol=1e-12)


@quick
@given(seeds)
def test_decomposition_of_the_soft_cross_entropy(seed: int) -> None:
    """Card, section 4: the teacher's cross-entropy in NKD's terms, row by row."""
    student, teacher, target = draw(seed)
    for row in range(5):
        z, t, y = student[row : row + 1], teacher[row : row + 1], target[row : row + 1]
        terms = nkd_terms(z, t, y)
        t_share, s_share = t.softmax(1)[0, y], z.softmax(1)[0, y]
        whole = -(t.softmax(1) * z.log_softmax(1)).sum()
        parts = terms.target + (1 - t_share) * (terms.nontarget - torch.log1p(-s_share))
        torch.testing.assert_close(whole, parts[0], rtol=1e-9, atol=1e-10)


@quick
@given(seeds, st.floats(0.5, 8.0))
def test_nontarget_never_moves_the_target_logit(seed: int, temperature: float) -> None:
    student, teacher, target = draw(seed)
    nkd_terms(student, teacher, target, temperature).nontarget.backward()
    assert student.grad is not None
    assert (student.grad.gather(1, target[:, None]) == 0).all()
    assert (student.grad != 0).any()


@quick
@given(seeds, st.floats(0.5, 8.0))
def test_nontarget_is_least_where_the_logits_agree(seed: int, temperature: float) -> None:
    student, teacher, target = draw(seed)
    same = student.detach().clone().requires_grad_()
    nkd_terms(same, same.detach(), target, temperature).nontarget.backward()
    assert same.grad is not None
    assert same.grad.abs().max() < 1e-12
    least = nkd_terms(teacher, teacher, target, temperature).nontarget
    assert nkd_terms(student, teacher, target, temperature).nontarget >= least - 1e-12


@quick
@given(seeds, st.floats(-1e3, 1e3))
def test_a_constant_a_row_and_the_order_of_rows_and_classes_change_nothing(seed: int, shift: float) -> None:
    student, teacher, target = draw(seed)
    weak = teacher.flip(0)
    rows = torch.randperm(5, generator=torch.Generator().manual_seed(seed))
    classes = torch.randperm(7, generator=torch.Generator().manual_seed(seed))
    shifts = shift * torch.arange(5, dtype=torch.float64)[:, None]
    changes: list[tuple[Callable[[Tensor], Tensor], Tensor]] = [
        (lambda logits: logits + shifts, target),
        (lambda logits: logits[rows], target[rows]),
        (lambda logits: logits[:, classes], classes.argsort()[target]),
    ]
    nkd, uskd = nkd_loss(student, teacher, target, temperature=3.0), uskd_loss(student, weak, target).total
    for change, y in changes:
        moved = change(student), change(teacher), y
        torch.testing.assert_close(nkd_loss(*moved, temperature=3.0), nkd, rtol=1e-8, atol=1e-9)
        torch.testing.assert_close(
            uskd_loss(change(student), change(weak), y).total, uskd, rtol=1e-8, atol=1e-9
        )


def test_gradcheck() -> None:
    student, other, target = draw(1, rows=3, classes=4)
    soft = distribution(target, (target + 1) % 4, 4)
    weak = other.clone().requires_grad_()
    # p, the ranks and their labels are constants of a step, so the check is of the parts that are not.
    assert torch.autograd.gradcheck(lambda s: nkd_loss(s, other, target, temperature=2.0), student)
    assert torch.autograd.gradcheck(lambda s: nkd_loss(s, other, soft), student)
    assert torch.autograd.gradcheck(lambda w: uskd_loss(student.detach(), w, target).weak, weak)
    assert torch.autograd.gradcheck(lambda w: uskd_loss(student.detach(), w, soft).weak, weak)


def test_two_classes_have_no_nontarget_part() -> None:
    student, teacher, target = draw(2, classes=2)
    terms = nkd_terms(student, teacher, target, 3.0)
    own = uskd_loss(student, teacher, target)
    (terms.nontarget + own.nontarget).backward()
    assert terms.nontarget == 0
    assert own.nontarget == 0
    assert student.grad is not None
    assert (student.grad == 0).all()


def test_temperature_and_gamma_touch_the_nontarget_part_alone() -> None:
    student, teacher, target = draw(3)
    one, three = nkd_terms(student, teacher, target), nkd_terms(student, teacher, target, 3)
    assert one.target == three.target
    torch.testing.assert_close(
        nkd_loss(student, teacher, target, 2, 3), three.target + 2 * 9 * three.nontarget
    )


def test_a_soft_target_counts_with_its_largest_entry() -> None:
    student, teacher, target = draw(4)
    soft = distribution(target, (target + 1) % 7, 7)
    assert nkd_loss(student, teacher, soft) == nkd_loss(student, teacher, target)


@pytest.mark.parametrize("soft", [False, True], ids=["ids", "distributions"])
def test_finite_at_extremes_and_in_a_batch_of_one(soft: bool) -> None:
    logits = torch.tensor([[1e4, -1e4, 0.0, 5.0], [-1e4, 1e4, 1e4, 0.0]])
    target: Tensor = torch.tensor([1, 0])
    if soft:
        target = distribution(target, torch.tensor([2, 2]), 4).float()
    for rows in (slice(0, 2), slice(0, 1)):
        student, weak = logits[rows].clone().requires_grad_(), logits[rows].flip(1).clone().requires_grad_()
        loss = (
            nkd_loss(student, -logits[rows], target[rows], temperature=3.0)
            + uskd_loss(student, weak, target[rows]).total
        )
        loss.backward()
        assert loss.isfinite()
        for tensor in (student, weak):
            assert tensor.grad is not None
            assert tensor.grad.isfinite().all()


def test_an_empty_batch_is_zero_with_a_gradient() -> None:
    student = torch.zeros(0, 4, requires_grad=True)
    target = torch.zeros(0, dtype=torch.int64)
    loss = nkd_loss(student, student, target) + uskd_loss(student, student, target).total
    loss.backward()
    assert loss == 0
    assert student.grad is not None


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(dtype: torch.dtype) -> None:
    student, teacher, target = draw(5)
    student, teacher = student.detach().to(dtype), teacher.to(dtype)
    loss, own = nkd_loss(student, teacher, target), uskd_loss(student, teacher, target).total
    assert loss.dtype == own.dtype == torch.float32
    assert loss == nkd_loss(student.float(), teacher.float(), target)
    assert own == uskd_loss(student.float(), teacher.float(), target).total


def test_uskd_linear_is_float32_inside_autocast() -> None:
    student, features, target = (t.detach() for t in draw(6))
    weight, bias = torch.randn(7, 7, dtype=torch.float64), torch.randn(7, dtype=torch.float64)
    exact = uskd_linear_loss(student, features, weight, bias, target)
    with torch.autocast("cpu", torch.bfloat16):
        loss = uskd_linear_loss(student.float(), features.float(), weight.float(), bias.float(), target)
    torch.testing.assert_close(loss.weak.double(), exact.weak, rtol=1e-5, atol=1e-6)


def test_the_teacher_gets_no_gradient_and_the_weak_head_only_its_own_terms() -> None:
    student, teacher, target = draw(7)
    teacher.requires_grad_()
    nkd_loss(student, teacher, target).backward()
    assert teacher.grad is None
    weak = teacher.detach().clone().requires_grad_()
    terms = uskd_loss(student, weak, target)
    gradients = torch.autograd.grad(terms.target + terms.nontarget, (student, weak), allow_unused=True)
    assert gradients[0] is not None
    assert gradients[1] is None
    wanted = torch.nn.functional.cross_entropy(weak, target, label_smoothing=0.1)
    torch.testing.assert_close(terms.weak, wanted)


def test_soft_target_by_hand() -> None:
    logits = torch.tensor([[0.75, 0.25], [0.4, 0.6]], dtype=torch.float64).log()
    p, ids = uskd_soft_target(logits, torch.tensor([0, 1]))
    mean = (0.75**2 + 0.6**2) / 2
    torch.testing.assert_close(
        p, torch.tensor([[1 + 0.75**2 - mean], [1 + 0.6**2 - mean]], dtype=torch.float64)
    )
    assert ids.tolist() == [[0], [1]]
    assert p[0] > 1  # not clamped


def test_soft_target_of_a_distribution() -> None:
    logits = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    target = torch.tensor(
        [[0, 0.3, 0, 0.7, 0], [0, 1.0, 0, 0, 0], [0.01, 0, 0, 0, 0.99]], dtype=torch.float64
    )
    p, ids = uskd_soft_target(logits, target)
    assert ids.tolist() == [[3, 1], [1, 0], [4, 0]]  # of equal entries the lower class
    assert p[1, 1] == 0
    assert not p.requires_grad
    squared = logits.softmax(1).gather(1, ids) ** 2
    expected = squared + target.gather(1, ids) - squared.mean(0)
    torch.testing.assert_close(p[p != 0], expected.detach()[p != 0])


def test_soft_target_of_one_row_is_its_label_value() -> None:
    logits = 5 * torch.randn(1, 6)
    assert uskd_soft_target(logits, torch.tensor([4]))[0].item() == 1
    soft = torch.tensor([[0.0, 0.3, 0.0, 0.7, 0.0, 0.0]])
    assert uskd_soft_target(logits, soft)[0].tolist() == soft[:, [3, 1]].tolist()


def test_zipf_labels_by_hand() -> None:
    scores = torch.tensor([[3.0, 1.0, 2.0, 0.0], [0.0, 0.0, 0.0, 0.0]])
    labels = zipf_labels(scores, torch.tensor([[0], [3]]))
    first = torch.tensor([0, 1 / 3, 1 / 2, 1 / 4])
    second = torch.tensor([1, 1 / 2, 1 / 3, 0])  # equal scores: lower class first
    torch.testing.assert_close(labels, torch.stack([first / first.sum(), second / second.sum()]))


@quick
@given(seeds, st.integers(1, 6))
def test_zipf_labels_are_distributions_over_the_rest_in_the_order_of_scores(seed: int, excluded: int) -> None:
    scores, _, _ = draw(seed)
    exclude = torch.rand(5, 7, generator=torch.Generator().manual_seed(seed)).argsort(1)[:, :excluded]
    labels = zipf_labels(scores, exclude)
    torch.testing.assert_close(labels.sum(1), torch.ones(5, dtype=torch.float64))
    assert (labels.gather(1, exclude) == 0).all()
    ordered = labels.gather(1, scores.argsort(1, descending=True))
    for row in ordered:
        assert (row[row > 0].diff() < 0).all()


def test_rank_forms_differ_where_the_two_terms_disagree() -> None:
    # Class 1 leads by the weak head, class 2 by the student; the two forms weigh the student's lead unlike.
    student = torch.tensor([[0.90, 0.001, 0.05, 0.049]]).log()
    weak = torch.tensor([[0.1, 0.80, 0.05, 0.05]]).log()
    target = torch.tensor([0])

    def scores(form: str) -> Tensor:
        s = student if form == "code" else student.exp()
        w = weak.exp()
        return w / (1 - w[0, 0] + 1e-6) + s / (1 - s[0, 0] + 1e-6)

    code, paper = (scores(form)[0, 1:].argsort(descending=True).tolist() for form in ("code", "paper"))
    assert code != paper
    for form in ("code", "paper"):
        zipf = zipf_labels(scores(form), target[:, None])
        rest = student[:, 1:].log_softmax(1)
        wanted = -(zipf[:, 1:] * rest).sum()
        torch.testing.assert_close(uskd_loss(student, weak, target, rank_form=form).nontarget, wanted)


def test_smoothing_of_a_distribution() -> None:
    _, weak, target = draw(8)
    soft = distribution(target, (target + 1) % 7, 7)
    got = uskd_loss(weak, weak, soft, smoothing=0.25).weak
    torch.testing.assert_close(got, -((0.75 * soft + 0.25 / 7) * weak.log_softmax(1)).sum(1).mean())


def test_bad_input() -> None:
    student, teacher, target = draw(9)
    with pytest.raises(ValueError, match=r"at least 2 classes; got 1"):
        nkd_terms(student[:, :1], teacher[:, :1], torch.zeros(5, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"more than 1 classes"):
        uskd_loss(student[:, :1], teacher[:, :1], torch.zeros(5, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"more than 2 classes"):
        uskd_loss(student[:, :2], teacher[:, :2], torch.full((5, 2), 0.5, dtype=torch.float64))
    calls: list[Any] = [nkd_terms, uskd_loss]
    for call in calls:
        for value in (7, -1):
            with pytest.raises(IndexError, match=rf"target {value} names none of the 7 classes"):
                call(student, teacher, torch.tensor([0, 1, 2, 3, value]))
        with pytest.raises(ValueError, match=r"shapes must agree"):
            unwrap(call)(student, teacher[:4], target)
        with pytest.raises(ValueError, match=r"target must be class ids \[5\]"):
            unwrap(call)(student, teacher, target[:4])
    with pytest.raises(IndexError, match=r"target 7"):
        uskd_soft_target(student, torch.tensor([0, 1, 2, 3, 7]))
    with pytest.raises(ValueError, match=r"temperature"):
        nkd_loss(student, teacher, target, temperature=0)
    with pytest.raises(ValueError, match=r"smoothing must lie in \[0, 1\]; got 1.5"):
        uskd_loss(student, teacher, target, smoothing=1.5)
    with pytest.raises(ValueError, match=r"rank_form must be 'code' or 'paper'; got 'both'"):
        unwrap(uskd_loss)(student, teacher, target, rank_form="both")
