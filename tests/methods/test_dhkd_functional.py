"""Binary divergences, gradient alignment and neural collapse: the authors' values, the card's identities, bad input."""

from __future__ import annotations

import math
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
from torch.nn import functional as F

from tutelage.functional import (
    align_gradients,
    binary_kl_loss,
    binary_kl_norm_loss,
    gradient_dot,
    neural_collapse,
)
from tutelage.functional.checks import TargetError
from tutelage.methods.dhkd.model import NonlinearHead

GOLDEN = Path(__file__).parent.parent / "golden" / "dhkd"
seeds = st.integers(0, 2**31 - 1)
quick = settings(max_examples=25, deadline=None)
Loss = Callable[..., Tensor]
LOSSES: list[Loss] = [binary_kl_loss, binary_kl_norm_loss]


def arrays(case: str) -> dict[str, Tensor]:
    with np.load(GOLDEN / f"{case}.npz") as data:
        return {name: torch.from_numpy(data[name]) for name in data if data[name].dtype.kind in "fiu"}


def draw(seed: int, rows: int = 5, classes: int = 7, scale: float = 3.0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    student, teacher = scale * torch.randn(2, rows, classes, generator=generator, dtype=torch.float64)
    return student.requires_grad_(), teacher


def gradients(seed: int) -> tuple[list[Tensor | None], list[Tensor | None]]:
    """Of four parameters: two shared, one of each side alone."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [(3, 2), (4,), (2, 2), (5,)]
    first, second = (
        [torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes] for _ in range(2)
    )
    return [*first[:3], None], [*second[:2], None, second[3]]


def flat(grads: list[Tensor | None]) -> Tensor:
    sizes = (6, 4, 4, 5)
    parts = [torch.zeros(n).double() if g is None else g.flatten() for g, n in zip(grads, sizes, strict=True)]
    return torch.cat(parts)


# --- the authors' values


@pytest.mark.parametrize(
    ("case", "loss", "temperature"),
    [
        ("binarykl_t2", binary_kl_loss, 2.0),
        ("binarykl_norm_t2", binary_kl_norm_loss, 2.0),
        ("binarykl_norm_t4", binary_kl_norm_loss, 4.0),
    ],
)
def test_golden(case: str, loss: Loss, temperature: float) -> None:
    data = arrays(case)
    student = data["in_logits_student"].requires_grad_()
    value: Any = loss(student, data["in_logits_teacher"], temperature)
    value.backward()
    torch.testing.assert_close(value, data["out_loss"], rtol=1e-9, atol=0)
    torch.testing.assert_close(student.grad, data["grad_logits_student"], rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("case", ["grad_align_conflict", "grad_align_no_conflict"])
def test_golden_alignment_from_the_toy_net_on(case: str) -> None:
    """Both losses' gradients of the net, and the merged one."""
    data = arrays(case)
    names = ["body", "fc", "fc2"]
    parameters = [data[f"in_{name}_{part}"].requires_grad_() for name in names for part in ("weight", "bias")]
    weights, biases = parameters[::2], parameters[1::2]
    hidden = F.linear(data["in_x"], weights[0], biases[0]).relu()
    label = F.cross_entropy(F.linear(hidden, weights[1], biases[1]), data["in_labels"])
    torch.testing.assert_close(label, data["out_loss_ce"])
    first = torch.autograd.grad(label, parameters, retain_graph=True, allow_unused=True)
    kd = binary_kl_norm_loss(F.linear(hidden, weights[2], biases[2]), data["in_logits_teacher"])
    second = torch.autograd.grad(kd, parameters, allow_unused=True)
    factor = data["out_loss_kd"] / kd.detach()  # the authors' is weighed
    second = tuple(None if g is None else factor * g for g in second)
    torch.testing.assert_close(gradient_dot(first, second), data["out_dot"], rtol=1e-8, atol=1e-10)
    keys = [f"out_merged_grad_{name}_{part}" for name in names for part in ("weight", "bias")]
    for merged, key in zip(align_gradients(first, second), keys, strict=True):
        assert merged is not None
        torch.testing.assert_close(merged, data[key], rtol=1e-8, atol=1e-10)


def test_golden_nonlinear_head() -> None:
    data = arrays("nonlinear_head")
    head = NonlinearHead(10, 4, dropout=0.0).double()
    loaded = {
        f"{place}.{part}": data[f"in_net_{place}_{part}"]
        for place in (0, 2, 4)
        for part in ("weight", "bias")
    }
    assert not head.load_state_dict(loaded, strict=False).unexpected_keys
    features = data["in_features"].requires_grad_()
    logits = head(features)
    logits.square().sum().backward()
    torch.testing.assert_close(logits, data["out_logits"], rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(features.grad, data["grad_features"], rtol=1e-8, atol=1e-9)


def test_the_heads_layers_and_defaults() -> None:
    layers = [type(layer).__name__ for layer in NonlinearHead(10, 4)]
    assert layers == ["Linear", "Dropout", "BatchNorm1d", "ReLU", "Linear"]
    head: Any = NonlinearHead(10, 4)
    assert (head[0].out_features, head[1].p) == (200, 0.1)


# --- the losses


@quick
@given(seeds, st.floats(0.5, 8.0))
def test_they_are_the_cards_sums(seed: int, tau: float) -> None:
    student, teacher = draw(seed)

    def binary(target: Tensor, found: Tensor) -> Tensor:
        target, found = (probability.clamp(1e-8, 1 - 1e-8) for probability in (target, found))
        terms = target * (target / found).log() + (1 - target) * ((1 - target) / (1 - found)).log()
        return tau**2 * terms.sum(1).mean()

    wanted = binary((teacher / tau).sigmoid(), (student / tau).sigmoid())
    torch.testing.assert_close(binary_kl_loss(student, teacher, tau), wanted, rtol=1e-8, atol=1e-10)
    half = torch.full_like(teacher, 0.5)
    wanted = binary(half, ((student - teacher) / tau).sigmoid())
    torch.testing.assert_close(binary_kl_norm_loss(student, teacher, tau), wanted, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_zero_with_a_zero_gradient_where_the_logits_agree(loss: Loss, dtype: torch.dtype) -> None:
    student = draw(0)[0].detach().to(dtype).requires_grad_()
    value: Any = loss(student, student.detach())
    value.backward()
    assert value == 0
    assert student.grad is not None
    assert student.grad.abs().max() < 1e-7 if loss is binary_kl_loss else (student.grad == 0).all()


@quick
@given(seeds, st.floats(-50.0, 50.0))
def test_what_a_shift_by_class_and_the_order_change(seed: int, shift: float) -> None:
    """The normalised form sees the difference alone; the other one sees a shift."""
    student, teacher = draw(seed)
    by_class = shift * torch.arange(7, dtype=torch.float64)
    norm = binary_kl_norm_loss(student, teacher)
    torch.testing.assert_close(
        binary_kl_norm_loss(student + by_class, teacher + by_class), norm, rtol=1e-9, atol=1e-10
    )
    rows, classes = (torch.randperm(n, generator=torch.Generator().manual_seed(seed)) for n in (5, 7))
    for loss in LOSSES:
        moved = loss(student[rows][:, classes], teacher[rows][:, classes])
        torch.testing.assert_close(moved, loss(student, teacher), rtol=1e-9, atol=1e-10)


def test_near_and_far() -> None:
    """A square near 0, a line further out, and no gradient where probabilities are clipped."""
    zeros = torch.zeros(1, 1, dtype=torch.float64)
    small = torch.full((1, 1), 1e-4, dtype=torch.float64)
    assert binary_kl_norm_loss(small, zeros).item() == pytest.approx(1e-8 / 8, rel=1e-6)
    far = torch.full((1, 1), 30.0, dtype=torch.float64, requires_grad=True)
    value = binary_kl_norm_loss(far, zeros)
    value.backward()
    assert value.item() == pytest.approx(2 * 30 / 2 - 4 * math.log(2), rel=1e-6)
    assert far.grad is not None
    assert far.grad.item() == pytest.approx(2 * (1 / (1 + math.exp(-15)) - 0.5))
    beyond = torch.full((1, 1), 40.0, dtype=torch.float64, requires_grad=True)
    binary_kl_norm_loss(beyond, zeros).backward()
    assert beyond.grad is not None
    assert beyond.grad.item() == 0


def test_the_sum_is_over_classes_and_the_mean_over_rows() -> None:
    student, teacher = draw(2)
    for loss in LOSSES:
        whole = loss(student, teacher)
        torch.testing.assert_close(loss(student.repeat(2, 1), teacher.repeat(2, 1)), whole)
        torch.testing.assert_close(loss(student.repeat(1, 2), teacher.repeat(1, 2)), 2 * whole)
        torch.testing.assert_close(loss(student.view(5, 1, 7), teacher.view(5, 1, 7)), whole)


@pytest.mark.parametrize("loss", LOSSES)
def test_gradcheck(loss: Loss) -> None:
    student, teacher = draw(3, rows=2, classes=3)
    assert torch.autograd.gradcheck(lambda s: loss(s, teacher, 3.0), student)
    loss(student, teacher.requires_grad_()).backward()
    assert teacher.grad is None


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_large_logits_one_row_and_no_row_are_finite(loss: Loss, dtype: torch.dtype) -> None:
    student = torch.tensor([[1e4, -1e4, 0.0]], dtype=dtype, requires_grad=True)
    value: Any = loss(student, torch.tensor([[-1e4, 1e4, 3.0]], dtype=dtype))
    value.backward()
    assert value.isfinite()
    assert value.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert student.grad is not None
    assert student.grad.isfinite().all()
    empty = torch.zeros(0, 3, dtype=dtype, requires_grad=True)
    nothing: Any = loss(empty, torch.zeros(0, 3, dtype=dtype))
    nothing.backward()
    assert nothing == 0
    assert empty.grad is not None


@pytest.mark.parametrize("loss", LOSSES)
def test_bad_losses_input(loss: Loss) -> None:
    student, teacher = draw(0)
    with pytest.raises(ValueError, match=r"student_logits \[5, 7\], teacher_logits \[5, 6\]"):
        unwrap(loss)(student, teacher[:, :6])
    for tau in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match="temperature must be finite and above 0"):
            loss(student, teacher, tau)
    for eps in (0.0, 0.5, -1e-8, math.nan):
        with pytest.raises(ValueError, match=r"eps must lie in \(0, 0\.5\)"):
            loss(student, teacher, eps=eps)


# --- gradient alignment


@quick
@given(seeds)
def test_after_alignment_nothing_opposes_the_primary(seed: int) -> None:
    first, second = gradients(seed)
    whole, other = flat(first), flat(second)
    dot = gradient_dot(first, second)
    torch.testing.assert_close(dot, whole @ other)
    merged = flat(align_gradients(first, second))
    if dot >= 0:
        assert torch.equal(merged, whole + other)
    else:
        torch.testing.assert_close(merged, whole + other - dot / (whole @ whole) * whole)
    assert (merged - whole) @ whole >= -1e-12


def test_the_primarys_own_parameters_grow_in_a_conflict() -> None:
    """The projection is over all parameters, so that a head which one loss alone reaches is scaled too."""
    first = [torch.tensor([1.0, 0.0]), torch.tensor([2.0])]
    merged = align_gradients(first, [torch.tensor([-5.0, 1.0]), None])
    assert [g.tolist() for g in merged if g is not None] == [[-3.0, 1.0], [4.0]]


def test_parameters_without_a_gradient_and_one_of_zeros() -> None:
    one = torch.ones(2)
    nothing, kept = align_gradients([None, one], [None, None])
    assert nothing is None
    assert torch.equal(kept, one)
    merged = align_gradients([torch.zeros(2)], [one])
    assert torch.equal(merged[0], one)
    assert gradient_dot([None], [one]) == 0
    assert gradient_dot([], []) == 0
    assert align_gradients([], []) == []


def test_half_precision_gradients_are_multiplied_in_float32() -> None:
    big = [torch.full((4,), 300.0, dtype=torch.float16)]
    assert gradient_dot(big, big) == 360_000
    merged = align_gradients(big, [-b for b in big])[0]
    assert merged is not None
    assert merged.dtype == torch.float16
    assert torch.equal(merged, big[0])


def test_lists_that_do_not_fit_are_refused() -> None:
    one = torch.ones(2)
    with pytest.raises(ValueError, match="over the same parameters; got 1 and 2 entries"):
        gradient_dot([one], [one, one])
    with pytest.raises(ValueError, match=r"primary \[2\], secondary \[3\]"):
        align_gradients([one], [torch.ones(3)])


# --- neural collapse


def simplex(classes: int) -> Tensor:
    return torch.eye(classes, dtype=torch.float64) - 1 / classes


def test_a_full_collapse_is_0_in_every_measure() -> None:
    target = torch.arange(20) % 4
    found = neural_collapse(simplex(4)[target] + 3.0, target, 4, 0.7 * simplex(4))
    assert all(value.item() == pytest.approx(0, abs=1e-12) for value in found if value is not None)
    assert len([value for value in found if value is not None]) == 6


@quick
@given(seeds, st.floats(0.1, 10.0))
def test_scale_and_place_of_the_features_do_not_matter(seed: int, factor: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    features, weight = torch.randn(40, 6, generator=generator), torch.randn(4, 6, generator=generator)
    target = torch.arange(40) % 4
    first = neural_collapse(features, target, 4, weight)
    second = neural_collapse(factor * features.double() + 1, target, 4, 2 * weight)
    for one, other in zip(first, second, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)


def test_each_measure_by_hand() -> None:
    """Two classes on a line, one as wide again, and a classifier against them."""
    features = torch.tensor([[-1.5], [-0.5], [1.0], [1.0]], dtype=torch.float64)
    target = torch.tensor([0, 0, 1, 1])
    weight = torch.tensor([[1.0], [-3.0]], dtype=torch.float64)
    found = neural_collapse(features, target, 2, weight)
    assert found.within.item() == pytest.approx(0.125 / 1.0 / 2)
    assert found.mean_norms.item() == pytest.approx(0)
    assert found.mean_angles.item() == pytest.approx(0)
    assert found.weight_norms is not None
    assert found.weight_norms.item() == pytest.approx(0.5)  # lengths 1 and 3
    rows = np.array([1, -3]) / math.sqrt(10) - np.array([-1, 1]) / math.sqrt(2)
    assert found.duality is not None
    assert found.duality.item() == pytest.approx(float((rows**2).sum()))
    assert neural_collapse(features, target, 2)[3:] == (None, None, None)


def test_wider_classes_collapse_less() -> None:
    target = torch.arange(40) % 4
    noise = torch.randn(40, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    within = [neural_collapse(simplex(4)[target] + s * noise, target, 4).within for s in (0.1, 0.5)]
    assert within[0] < within[1]


def test_bad_collapse_input() -> None:
    features = torch.zeros(3, 2)
    with pytest.raises(ValueError, match="num_classes must be at least 2; got 1"):
        neural_collapse(features, torch.zeros(3, dtype=torch.int64), 1)
    with pytest.raises(ValueError, match=r"needs rows of every class; there are none of \[1, 3\]"):
        neural_collapse(features, torch.tensor([0, 2, 0]), 4)
    with pytest.raises(TargetError, match="target 4 names none of the 4 classes"):
        neural_collapse(features, torch.tensor([0, 4, 0]), 4)
    with pytest.raises(
        ValueError, match=r"classifier must be \[2, 2\] for features \[3, 2\]; got shape \[2, 3\]"
    ):
        unwrap(neural_collapse)(features, torch.tensor([0, 1, 0]), 2, torch.zeros(2, 3))
