"""TAID: the authors' values, the moving target, the schedule's limits, what is refused."""

from __future__ import annotations

import math
from functools import partial
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
    TaidState,
    forward_kl_loss,
    fused_linear_taid_loss,
    taid_loss,
    taid_schedule,
    taid_target,
    taid_update,
)
from tutelage.methods.taid.functional import TaidStep, taid_step

GOLDEN = Path(__file__).parent.parent / "golden" / "taid"
START = TaidState(0.4, 0.0, None, math.nan)
seeds = st.integers(0, 2**31 - 1)
weights = st.floats(0.0, 1.0)
quick = settings(max_examples=25, deadline=None)
close = partial(torch.testing.assert_close, rtol=1e-9, atol=1e-12)


def arrays(case: str) -> dict[str, Tensor]:
    with np.load(GOLDEN / f"{case}.npz") as data:
        return {name: torch.from_numpy(data[name]) for name in data}


def pair(seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    student, teacher = 3 * torch.randn(2, 2, 4, 6, generator=generator, dtype=torch.float64)
    return student.requires_grad_(), teacher


def test_golden_losses() -> None:
    data = arrays("loss_t_sweep")
    for t, value, gradient in zip(data["in_t"], data["out_loss"], data["grad_student"], strict=True):
        for weight in (t.double(), float(t)):
            student = data["in_student"].clone().requires_grad_()
            loss = taid_loss(student, data["in_teacher"], data["in_mask"], t=weight)
            loss.backward()
            torch.testing.assert_close(loss, value, rtol=1e-5, atol=1e-6)
            torch.testing.assert_close(student.grad, gradient, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("case", "steps", "options"),
    [
        ("schedule_adaptive", 60, {}),
        ("schedule_adaptive_fast", 400, {"t_start": 0.2, "alpha": 0.1, "beta": 0.5}),
    ],
)
def test_golden_schedules(case: str, steps: int, options: dict[str, float]) -> None:
    data = arrays(case)
    path = taid_schedule(data["in_losses"], data["in_global_step"], steps, **options)
    for field, name in (("t", "t_after"), ("momentum", "momentum"), ("delta_t", "delta_t")):
        found, wanted = getattr(path, field), data[f"out_{name}"].double()
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6, equal_nan=True)


@quick
@given(seeds, weights)
def test_target_and_gradient_by_definition(seed: int, t: float) -> None:
    student, teacher = pair(seed)
    target = taid_target(student, teacher, t)
    assert not target.requires_grad
    close(target, ((1 - t) * student + t * teacher).detach().softmax(-1))
    mask = torch.tensor([[1, 1, 0, 1], [0, 1, 1, 0]])
    loss = taid_loss(student, teacher, mask, t=t)
    loss.backward()
    wanted = (student.softmax(-1) - target) * mask[..., None] / 5
    close(student.grad, wanted.detach())
    by_token = -(target * student.log_softmax(-1)).sum(-1)
    close(loss, (by_token * mask).sum() / 5)
    entropy = -(target * target.log()).sum(-1)
    without = taid_loss(student, teacher, mask, t=t, subtract_entropy=True)
    close(without, ((by_token - entropy) * mask).sum() / 5)


def test_the_ends_are_the_student_and_the_teacher() -> None:
    student, teacher = pair(0)
    close(taid_loss(student, teacher, t=1.0, subtract_entropy=True), forward_kl_loss(student, teacher))
    still = taid_loss(student, teacher, t=0)
    still.backward()
    assert still > 0  # the student's entropy
    assert student.grad is not None
    assert student.grad.abs().max() < 1e-15


@quick
@given(seeds, weights, st.floats(-100, 100))
def test_a_constant_a_row_changes_nothing(seed: int, t: float, shift: float) -> None:
    student, teacher = pair(seed)
    torch.testing.assert_close(
        taid_loss(student + shift, teacher - shift, t=t),
        taid_loss(student, teacher, t=t),
        rtol=1e-8,
        atol=1e-10,
    )


@pytest.mark.parametrize("t", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_extreme_and_infinite_logits_are_finite(t: float, dtype: torch.dtype) -> None:
    student, teacher = (1e4 * logits.detach().sign().to(dtype) for logits in pair(1))
    student[..., 0] = teacher[..., 0] = student[:, 1:3, 1] = teacher[0, ..., 2] = -torch.inf
    student.requires_grad_()
    loss = taid_loss(student, teacher, t=t)
    loss.backward()
    assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert loss.isfinite()
    assert student.grad is not None
    assert student.grad.isfinite().all()
    target = taid_target(student, teacher, t)
    torch.testing.assert_close(target.sum(-1), torch.ones_like(target[..., 0]))
    assert (target[..., 0] == 0).all()


def test_an_empty_mask_is_zero_with_a_gradient_and_the_teacher_has_none() -> None:
    student, teacher = pair(2)
    teacher.requires_grad_()
    loss = taid_loss(student, teacher, torch.zeros(2, 4), t=0.5)
    (loss + 0 * taid_loss(student, teacher, t=0.5)).backward()
    assert loss == 0
    assert student.grad is not None
    assert teacher.grad is None


@pytest.mark.parametrize("t", [0.0, 0.3, 1.0, torch.tensor(0.7, dtype=torch.float64)])
@pytest.mark.parametrize("subtract_entropy", [False, True])
def test_fused_is_the_plain_loss(t: float | Tensor, subtract_entropy: bool) -> None:
    generator = torch.Generator().manual_seed(4)
    shapes = ((2, 5, 3), (11, 3), (2, 5, 4), (11, 4))
    values = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
    hidden, weight = (value.requires_grad_() for value in values[:2])
    mask = torch.tensor([[1, 1, 0, 1, 1], [0, 0, 1, 1, 1]])
    options: dict[str, Any] = {"t": t, "subtract_entropy": subtract_entropy}
    plain = taid_loss(hidden @ weight.T, values[2] @ values[3].T, mask, **options)
    wanted = torch.autograd.grad(plain, (hidden, weight))
    for chunk_size in (None, 3):
        fused = fused_linear_taid_loss(*values, mask, chunk_size=chunk_size, **options)
        torch.testing.assert_close(fused, plain, rtol=1e-6, atol=1e-9)
        found = torch.autograd.grad(fused, (hidden, weight))
        torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-9)


def test_update_by_hand() -> None:
    first = taid_update(START, 2.0, 0.0)
    assert first._replace(delta_t=0.0) == TaidState(0.4, 0.0, 2.0, 0.0)
    assert math.isnan(first.delta_t)
    second = taid_update(first, 1.0, 0.0, alpha=0.5, beta=0.9)
    momentum = 0.1 * (2 - 1) / 2
    delta = 0.5 / (1 + math.exp(-momentum)) * 0.6
    assert second == pytest.approx((0.4 + delta, momentum, 1.0, delta))
    assert taid_update(second, 1.0, 0.9, alpha=0.0).t == pytest.approx(0.4 + 0.6 * 0.9)  # the line is a floor
    assert taid_update(second, 1.0, 0.5, t_end=0.6, alpha=1.0).t == 0.6
    line = taid_update(second, 0.5, 0.25, alpha=1.0, adaptive=False)
    assert line.t == pytest.approx(0.4 + 0.6 * 0.25)
    assert line.delta_t > 0  # still there to be seen


def test_a_loss_of_zero_stays_finite() -> None:
    state = taid_update(taid_update(START, 0.0, 0.1), 0.0, 0.2)
    state = taid_update(state, 3.0, 0.3)
    assert all(math.isfinite(value) for value in state if value is not None)


@quick
@given(
    st.lists(st.floats(0, 20), min_size=1, max_size=30),
    st.floats(0, 0.9),
    st.floats(0, 1),
    st.floats(0, 1),
)
def test_t_never_falls_and_is_no_further_than_its_end(
    losses: list[float], t_start: float, alpha: float, beta: float
) -> None:
    values, steps = torch.tensor(losses, dtype=torch.float64), torch.arange(len(losses))
    path = taid_schedule(values, steps, len(losses), t_start=t_start, alpha=alpha, beta=beta)
    assert (path.t.diff() >= 0).all()
    assert path.t[-1] <= 1
    line = t_start + (1 - t_start) * steps.double() / len(losses)
    assert (path.t >= line - 1e-12)[1:].all()
    close(taid_schedule(values, steps, len(losses), t_start=t_start, adaptive=False).t[1:], line[1:])


def test_steps_on_tensors_are_the_updates() -> None:
    scalar = partial(torch.tensor, dtype=torch.float64)
    state, step = START, TaidStep(scalar(0.4), scalar(0.0), scalar(math.nan), scalar(math.nan))
    for loss, progress in ((3.0, 0.1), (2.5, 0.2), (2.6, 0.3)):
        state = taid_update(state, loss, progress, alpha=0.1)
        step = taid_step(step, scalar(loss).requires_grad_(), scalar(progress), alpha=0.1)
        assert not any(value.requires_grad for value in step)
        assert [value.item() for value in step] == pytest.approx(list(state), nan_ok=True)


def test_bad_input() -> None:
    student, teacher = pair(3)
    for t in (-0.1, 1.1, float("nan")):
        for weight in (t, torch.tensor(t)):
            with pytest.raises(ValueError, match=r"t must lie in \[0, 1\]; got"):
                taid_loss(student, teacher, t=weight)
    with pytest.raises(ValueError, match=r"vocabularies of 6 and 5"):
        unwrap(taid_target)(student, teacher[..., :5], 0.5)
    with pytest.raises(ValueError, match=r"mask must hold one value a token, \[2, 4\]; got \[4\]"):
        unwrap(taid_loss)(student, teacher, torch.ones(4), t=0.5)
    for loss in (math.nan, math.inf):
        with pytest.raises(ValueError, match=r"loss must be finite"):
            taid_update(START, loss, 0.0)
    with pytest.raises(ValueError, match=r"progress must lie in \[0, 1\]; got 1.5"):
        taid_update(START, 1.0, 1.5)


@pytest.mark.parametrize(
    "options",
    [{"t_start": 1.0}, {"t_start": -0.1}, {"t_end": 0.0, "t_start": 0.0}, {"t_end": 1.1}, {"t_end": 0.3}],
)
def test_the_schedules_ends_are_held_to_their_ranges(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"t_start and t_end must hold"):
        taid_update(START, 1.0, 0.0, **options)
    with pytest.raises(ValueError, match=r"t_start and t_end must hold"):
        taid_schedule(torch.ones(0), torch.zeros(0, dtype=torch.int64), 1, **options)


def test_the_schedules_options_are_held_to_their_ranges() -> None:
    losses, steps = torch.ones(3), torch.arange(3)
    for option in ("alpha", "beta"):
        with pytest.raises(ValueError, match=rf"{option} must lie in \[0, 1\]; got 2"):
            taid_schedule(losses, steps, 3, **{option: 2})
    with pytest.raises(ValueError, match=r"num_train_steps must be finite and above 0; got 0"):
        taid_schedule(losses, steps, 0)
    with pytest.raises(ValueError, match=r"losses \[3\], global_step \[2\]"):
        unwrap(taid_schedule)(losses, steps[:2], 3)
    with pytest.raises(ValueError, match=r"progress must lie in \[0, 1\]"):
        taid_schedule(losses, steps, 1)
