"""TGeo-KD's tensor math: the authors' values, the geometry, the outer gradient, extremes, bad input."""

from __future__ import annotations

from collections.abc import Mapping
from inspect import unwrap
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tutelage.functional import (
    class_mean_prediction,
    tgeo_alpha_gradient,
    tgeo_fusion_ratio,
    tgeo_kd_loss,
    tgeo_state,
)
from tutelage.methods.tgeo_kd.bilevel import Derivative, directional_derivative

GOLDEN = Path(__file__).parent.parent / "golden" / "tgeo_kd"
quick = settings(max_examples=25, deadline=None)
seeds = st.integers(0, 2**31 - 1)


def arrays(case: str) -> dict[str, Tensor]:
    with np.load(GOLDEN / f"{case}.npz") as data:
        return {name: torch.from_numpy(data[name]) for name in data}


def layers(data: dict[str, Tensor], prefix: str = "in_controller") -> list[tuple[Tensor, Tensor]]:
    return [(data[f"{prefix}.fc{i}.weight"], data[f"{prefix}.fc{i}.bias"]) for i in (1, 2, 3)]


def draw(seed: int, rows: int = 5, classes: int = 4) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    student, teacher = 3 * torch.randn(2, rows, classes, generator=generator, dtype=torch.float64)
    return student, teacher, torch.randint(classes, (rows,), generator=generator)


@pytest.mark.parametrize("case", ["state_c3", "state_c5"])
def test_golden_states_and_ratios(case: str) -> None:
    data = arrays(case)
    mean = class_mean_prediction(data["in_teacher_prob"], data["in_labels"])
    torch.testing.assert_close(mean.double(), data["out_class_mean_teacher"], rtol=1e-5, atol=1e-6)
    state = tgeo_state(
        data["in_student_prob"], data["in_teacher_prob"], data["in_labels"], mean, edges="squared"
    )
    torch.testing.assert_close(state.double(), data["out_state"], rtol=1e-5, atol=1e-6)
    ratio = tgeo_fusion_ratio(state, layers(data))
    torch.testing.assert_close(ratio, data["out_alpha"], rtol=1e-5, atol=1e-6)


def test_golden_student_step() -> None:
    """The gradients of the authors' student, through its own layers."""
    data = arrays("lower_step_T15")
    weights = [(w.requires_grad_(), b.requires_grad_()) for w, b in layers(data, "in_student")]
    hidden = data["in_x"]
    for position, (weight, bias) in enumerate(weights):
        hidden = F.linear(F.leaky_relu(hidden, 0.01) if position else hidden, weight, bias)
    torch.testing.assert_close(hidden, data["in_student_logits"], rtol=1e-4, atol=1e-5)
    ratio = tgeo_fusion_ratio(data["out_state"].float(), layers(data))
    found = tgeo_kd_loss(
        hidden, data["in_teacher_logits"], data["in_labels"], ratio, temperature=1.5, ce_on="probabilities"
    )
    found.total.backward()
    torch.testing.assert_close(found.total, data["out_total"], rtol=2e-5, atol=2e-6)
    for i, (weight, bias) in enumerate(weights, start=1):
        torch.testing.assert_close(weight.grad, data[f"grad_student.fc{i}.weight"], rtol=2e-4, atol=2e-6)
        torch.testing.assert_close(bias.grad, data[f"grad_student.fc{i}.bias"], rtol=2e-4, atol=2e-6)


def test_signed_edges_stand_in_the_papers_order() -> None:
    student, teacher = torch.tensor([[0.2, 0.8]]), torch.tensor([[0.6, 0.4]])
    state = tgeo_state(student, teacher, torch.tensor([0]), torch.tensor([[0.5, 0.5]]))
    wanted = [[0.8, -0.8], [0.4, -0.4], [0.4, -0.4], [0.5, -0.5], [0.3, -0.3]]
    torch.testing.assert_close(state, torch.tensor(wanted).view(1, 10))


@quick
@given(seed=seeds)
def test_one_hot_targets_are_class_ids(seed: int) -> None:
    student, teacher, target = draw(seed)
    soft = F.one_hot(target, student.shape[1]).double()
    mean = class_mean_prediction(teacher.softmax(1), target)
    torch.testing.assert_close(class_mean_prediction(teacher.softmax(1), soft), mean)
    states = [tgeo_state(student.softmax(1), teacher.softmax(1), t, mean) for t in (target, soft)]
    torch.testing.assert_close(*states)
    totals = [tgeo_kd_loss(student, teacher, t, 0.3).total for t in (target, soft)]
    torch.testing.assert_close(*totals)


@quick
@given(seed=seeds)
def test_class_means(seed: int) -> None:
    _, teacher, target = draw(seed, rows=9)
    table = class_mean_prediction(teacher.softmax(1), target, spread=False)
    for label in range(4):
        rows = teacher.softmax(1)[target == label]
        wanted = rows.mean(0) if len(rows) else torch.zeros(4, dtype=torch.float64)
        torch.testing.assert_close(table[label], wanted)
    alone = class_mean_prediction(teacher[:1].softmax(1), target[:1])
    torch.testing.assert_close(alone, teacher[:1].softmax(1))


@quick
@given(seed=seeds, ratio=st.floats(0, 1), shift=st.floats(-50, 50))
def test_the_loss(seed: int, ratio: float, shift: float) -> None:
    student, teacher, target = draw(seed)
    found = tgeo_kd_loss(student, teacher, target, ratio, temperature=2.0)
    kd = F.kl_div((student / 2).log_softmax(1), (teacher / 2).softmax(1), reduction="none").sum(1)
    cls = F.cross_entropy(student, target, reduction="none")
    torch.testing.assert_close(found.kd, kd)
    torch.testing.assert_close(found.cls, cls)
    torch.testing.assert_close(found.total, (ratio * 4 * kd + (1 - ratio) * cls).mean())
    shifted = tgeo_kd_loss(student + shift, teacher - shift, target, ratio, temperature=2.0).total
    torch.testing.assert_close(shifted, found.total, rtol=1e-7, atol=1e-9)
    order = torch.randperm(len(target))
    torch.testing.assert_close(
        tgeo_kd_loss(student[order], teacher[order], target[order], ratio, temperature=2.0).total, found.total
    )
    torch.testing.assert_close(
        tgeo_kd_loss(teacher, teacher, target, 1.0).total.item(), 0.0, atol=1e-12, rtol=0
    )


def test_gradients() -> None:
    student, teacher, target = draw(1)
    alpha = torch.rand(5, dtype=torch.float64).requires_grad_()
    unwrapped = unwrap(tgeo_kd_loss)
    assert torch.autograd.gradcheck(
        lambda s, a: unwrapped(s, teacher, target, a).total, (student.requires_grad_(), alpha)
    )
    teacher.requires_grad_()
    tgeo_kd_loss(student, teacher, target, alpha).total.backward()
    assert teacher.grad is None
    state = tgeo_state(student.softmax(1), teacher.softmax(1), target, teacher.softmax(1))
    assert not state.requires_grad


@pytest.mark.parametrize("sign", [-1.0, 1.0])
def test_extremes_and_no_rows(sign: float) -> None:
    student = (sign * 1e4 * torch.eye(3)).requires_grad_()
    loss = tgeo_kd_loss(student, -student.detach(), torch.arange(3), 0.5).total
    loss.backward()
    assert torch.isfinite(loss)
    assert student.grad is not None
    assert torch.isfinite(student.grad).all()
    empty = torch.zeros(0, 3, requires_grad=True)
    nothing = torch.zeros(0, dtype=torch.int64)
    loss = tgeo_kd_loss(empty, torch.zeros(0, 3), nothing, torch.zeros(0)).total
    loss.backward()
    assert loss.item() == 0
    assert empty.grad is not None
    assert class_mean_prediction(torch.zeros(0, 3), nothing, spread=False).tolist() == [[0.0] * 3] * 3


def test_half_precision_is_worked_on_in_single() -> None:
    student, teacher, target = draw(2)
    found = tgeo_kd_loss(student.bfloat16(), teacher.bfloat16(), target, 0.5)
    assert found.total.dtype == torch.float32
    state = tgeo_state(
        *(x.bfloat16().softmax(1) for x in (student, teacher)), target, teacher.softmax(1).bfloat16()
    )
    assert state.dtype == torch.float32
    weights = [(torch.randn(1, 20), torch.zeros(1))]
    with torch.autocast("cpu", torch.bfloat16):
        ratio = tgeo_fusion_ratio(state, weights)
    torch.testing.assert_close(ratio, tgeo_fusion_ratio(state, weights))


# --- the outer gradient, exactly


def problem() -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    data = {"x": normal(7, 6), "teacher": normal(7, 4), "held": normal(9, 6)}
    data |= {"y": torch.arange(7) % 4, "held_y": torch.arange(9) % 4}
    weights = {"a": normal(5, 6), "b": normal(4, 5)}
    return data, {name: value.requires_grad_() for name, value in weights.items()}


def logits(weights: Mapping[str, Tensor], x: Tensor) -> Tensor:
    hidden = torch.tanh(x @ weights["a"].T)
    given: Tensor = hidden @ weights["b"].T
    return given


def outer_loss(data: dict[str, Tensor], weights: dict[str, Tensor], alpha: Tensor, lr: float) -> Tensor:
    """The held-out loss after the virtual step, differentiable in the ratios."""
    inner = tgeo_kd_loss(logits(weights, data["x"]), data["teacher"], data["y"], alpha, temperature=2.0).total
    step = torch.autograd.grad(inner, list(weights.values()), create_graph=True)
    moved = {name: value - lr * part for (name, value), part in zip(weights.items(), step, strict=True)}
    return F.cross_entropy(logits(moved, data["held"]), data["held_y"])


@pytest.mark.parametrize(("how", "tolerance"), [("forward", 1e-9), ("difference", 1e-4)])
def test_the_outer_gradient(how: Derivative, tolerance: float) -> None:
    """One directional derivative gives what autograd gives through the virtual step, and what moving a ratio gives."""
    data, weights = problem()
    lr = 0.3
    alpha = torch.linspace(0.1, 0.9, 7, dtype=torch.float64).requires_grad_()
    (exact,) = torch.autograd.grad(outer_loss(data, weights, alpha, lr), alpha)
    for i in range(7):
        nudge = 1e-4 * F.one_hot(torch.tensor(i), 7)
        both = [outer_loss(data, weights, (alpha + s * nudge).detach().requires_grad_(), lr) for s in (1, -1)]
        torch.testing.assert_close(((both[0] - both[1]) / 2e-4).detach(), exact[i], rtol=1e-4, atol=1e-9)

    def gap(params: Mapping[str, Tensor]) -> Tensor:
        found = tgeo_kd_loss(logits(params, data["x"]), data["teacher"], data["y"], 0.5, temperature=2.0)
        gaps: Tensor = 4 * found.kd - found.cls
        return gaps

    inner = tgeo_kd_loss(logits(weights, data["x"]), data["teacher"], data["y"], alpha, temperature=2.0).total
    step = torch.autograd.grad(inner, list(weights.values()))
    moved = {
        n: (w - lr * g).detach().requires_grad_() for (n, w), g in zip(weights.items(), step, strict=True)
    }
    held = F.cross_entropy(logits(moved, data["held"]), data["held_y"])
    direction = dict(zip(moved, torch.autograd.grad(held, list(moved.values())), strict=True))
    slope = directional_derivative(gap, weights, direction, how)
    torch.testing.assert_close(tgeo_alpha_gradient(slope, lr), exact, rtol=tolerance, atol=1e-12)


def test_a_direction_of_zeros_gives_zeros() -> None:
    data, weights = problem()
    nowhere = {name: torch.zeros_like(value) for name, value in weights.items()}
    ways: tuple[Derivative, ...] = ("forward", "difference")
    for how in ways:
        found = directional_derivative(lambda p: logits(p, data["x"])[:, 0], weights, nowhere, how)
        assert found.tolist() == [0.0] * 7
    found = directional_derivative(lambda p: data["x"][:, 0], weights, nowhere, "forward")
    assert found.tolist() == [0.0] * 7


# --- bad input


def test_bad_input() -> None:
    student, teacher, target = draw(3)
    said = teacher.softmax(1)
    with pytest.raises(ValueError, match="target 9 names none of the 4 classes"):
        class_mean_prediction(said, torch.full((5,), 9))
    with pytest.raises(ValueError, match="shapes must agree"):
        unwrap(tgeo_state)(said, said, target, said[:3])
    with pytest.raises(ValueError, match="target -1 names none"):
        tgeo_state(said, said, torch.full((5,), -1), said)
    with pytest.raises(ValueError, match="edges is 'round'"):
        unwrap(tgeo_state)(said, said, target, said, edges="round")
    for ratio in (1.5, -0.1, float("nan"), torch.full((5,), 2.0), torch.full((5,), float("nan"))):
        with pytest.raises(ValueError, match=r"alpha must lie in \[0, 1\]"):
            tgeo_kd_loss(student, teacher, target, ratio)
    with pytest.raises(ValueError, match="shapes must agree"):
        unwrap(tgeo_kd_loss)(student, teacher, target, torch.ones(3))
    with pytest.raises(ValueError, match="ce_on is 'x'"):
        unwrap(tgeo_kd_loss)(student, teacher, target, 0.5, ce_on="x")
    with pytest.raises(ValueError, match="temperature must be"):
        tgeo_kd_loss(student, teacher, target, 0.5, temperature=0)
    with pytest.raises(ValueError, match="lr must be"):
        tgeo_alpha_gradient(torch.ones(3), 0.0)


def test_a_ratio_network_that_does_not_fit() -> None:
    state = torch.zeros(2, 6)
    with pytest.raises(ValueError, match="has no layers"):
        tgeo_fusion_ratio(state, [])
    with pytest.raises(ValueError, match="layer 0 of the ratio network takes 6 values"):
        tgeo_fusion_ratio(state, [(torch.zeros(1, 5), torch.zeros(1))])
    with pytest.raises(ValueError, match="layer 1 of the ratio network takes 3 values"):
        tgeo_fusion_ratio(state, [(torch.zeros(3, 6), torch.zeros(3)), (torch.zeros(1, 4), torch.zeros(1))])
    with pytest.raises(ValueError, match="this one gives 3"):
        tgeo_fusion_ratio(state, [(torch.zeros(3, 6), torch.zeros(3))])
