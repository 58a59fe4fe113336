"""A NaN stops the run with the weights of the step before: at once, or behind a flag on the device."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tutelage.engine import finite
from tutelage.engine.finite import FiniteGuard, NonFiniteError, check_terms
from tutelage.engine.gradients import grad_norm

CPU = torch.device("cpu")
FUSED: list[tuple[Any, dict[str, Any]]] = [
    (torch.optim.SGD, {"momentum": 0.9}),
    (torch.optim.Adam, {}),
    (torch.optim.AdamW, {"weight_decay": 0.1}),
]


def one_step(guard: FiniteGuard, optimizer: torch.optim.Optimizer, step: int, kd: float = 1.0) -> None:
    (parameter,) = optimizer.param_groups[0]["params"]
    draw = torch.Generator().manual_seed(step)
    loss = (parameter * torch.randn(5, generator=draw)).sum()
    optimizer.zero_grad()
    (loss * kd).backward()
    guard.inspect(step, {"label": loss, "kd": loss * kd}, grad_norm([parameter]))
    optimizer.step()


def held(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """Copies of the weights and of all optimiser state."""
    (parameter,) = optimizer.param_groups[0]["params"]
    return [
        parameter.detach().clone(),
        *[copy.deepcopy(value) for value in optimizer.state[parameter].values()],
    ]


def test_check_terms_names_step_term_value_and_context() -> None:
    terms = {"label": torch.tensor(1.0), "kd": torch.tensor(-math.inf), "later": torch.tensor(math.nan)}
    with pytest.raises(NonFiniteError, match=r"step 12: the term 'kd' is -inf; .*\(rows 3, 4\)") as caught:
        check_terms(terms, 12, lambda: "rows 3, 4")
    assert (caught.value.step, caught.value.term) == (12, "kd")
    check_terms({"label": torch.tensor(1e38), "none": torch.zeros(0)}, 12, pytest.fail)


def test_on_the_cpu_it_raises_before_the_update() -> None:
    parameter = nn.Parameter(torch.ones(5))
    optimizer = torch.optim.SGD([parameter], lr=0.1, momentum=0.9)
    guard = FiniteGuard(CPU, [optimizer])
    one_step(guard, optimizer, 0)
    before = held(optimizer)
    with pytest.raises(NonFiniteError, match=r"step 1: the term 'kd' is nan"):
        one_step(guard, optimizer, 1, kd=math.nan)
    assert all(torch.equal(old, new) for old, new in zip(before, held(optimizer), strict=True))


def test_a_gradient_that_is_not_finite_is_named_as_such() -> None:
    guard = FiniteGuard(CPU, [])
    with pytest.raises(NonFiniteError, match=r"step 3: the gradient is inf; .*train\.clip") as caught:
        guard.inspect(3, {"label": torch.tensor(1.0)}, torch.tensor(math.inf))
    assert caught.value.term == finite.GRADIENT


@pytest.mark.parametrize(("kind", "options"), FUSED)
def test_a_flag_masks_all_later_updates(kind: Any, options: dict[str, Any]) -> None:
    parameter = nn.Parameter(torch.ones(5))
    optimizer = kind([parameter], lr=0.1, fused=True, **options)
    guard = FiniteGuard(CPU, [optimizer], immediate=False)
    readings: list[bool] = []
    guard.poll = lambda *, wait=False: readings.append(wait)  # type: ignore[method-assign]
    one_step(guard, optimizer, 0)
    start = held(optimizer)
    one_step(guard, optimizer, 1)
    before = held(optimizer)
    assert not torch.equal(start[0], before[0]), "finite steps move the weights"
    for step, factor in [(2, math.nan), (3, 1.0), (4, math.inf)]:
        one_step(guard, optimizer, step, kd=factor)
        assert all(torch.equal(old, new) for old, new in zip(before, held(optimizer), strict=True)), step
    assert readings == [False] * 5, "nothing waits for the device"
    del guard.poll
    with pytest.raises(NonFiniteError, match="step 2: the term 'kd' is not finite") as caught:
        guard.poll()
    assert caught.value.step == 2


def test_masked_and_unmasked_runs_are_the_same_while_all_is_finite() -> None:
    ends = []
    for immediate in (True, False):
        parameter = nn.Parameter(torch.ones(5))
        optimizer = torch.optim.AdamW([parameter], lr=0.1, fused=True)
        guard = FiniteGuard(CPU, [optimizer], immediate=immediate)
        for step in range(4):
            one_step(guard, optimizer, step)
        guard.poll(wait=True)
        ends.append(held(optimizer))
    assert all(torch.equal(old, new) for old, new in zip(*ends, strict=True))


def test_flags_are_read_when_they_have_arrived(monkeypatch: pytest.MonkeyPatch) -> None:
    arrived: set[int] = set()
    waited: list[int] = []

    def later(step: int, names: tuple[str, ...], bad: Tensor) -> Any:
        return finite._Reading(step, names, bad, lambda: step in arrived, lambda: waited.append(step))

    monkeypatch.setattr(finite, "_read_later", later)
    guard = FiniteGuard(CPU, [], immediate=False)
    nan = torch.tensor(math.nan)
    for step in range(3):
        flag = guard.inspect(step, {"kd": nan if step == 1 else torch.tensor(0.0)}, torch.tensor(1.0))
        assert flag.item() == float(step >= 1), "set on the device at once, and it stays"
    arrived.add(1)
    guard.poll()  # step 0 has not arrived, and flags are read in order
    assert waited == []
    arrived.add(0)
    with pytest.raises(NonFiniteError, match="step 1: the term 'kd'"):
        guard.poll()
    assert waited == [0, 1]


def test_waiting_reads_every_flag(monkeypatch: pytest.MonkeyPatch) -> None:
    real = finite._read_later
    monkeypatch.setattr(finite, "_read_later", lambda *given: real(*given)._replace(ready=lambda: False))
    guard = FiniteGuard(CPU, [], immediate=False)
    guard.inspect(0, {"kd": torch.tensor(math.nan)}, torch.tensor(1.0))
    guard.poll()
    with pytest.raises(NonFiniteError, match="step 0"):
        guard.poll(wait=True)


def test_an_optimiser_that_cannot_be_masked_has_its_flag_read_at_once() -> None:
    parameter = nn.Parameter(torch.ones(5))
    optimizer = torch.optim.RMSprop([parameter], lr=0.1)
    guard = FiniteGuard(CPU, [optimizer, torch.optim.SGD([parameter], fused=True)], immediate=False)
    one_step(guard, optimizer, 0)
    before = held(optimizer)
    with pytest.raises(NonFiniteError, match="step 1: the term 'kd'"):
        one_step(guard, optimizer, 1, kd=math.nan)
    assert all(torch.equal(old, new) for old, new in zip(before, held(optimizer), strict=True))


def test_a_loss_scalers_own_flag_still_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    real = finite._read_later
    monkeypatch.setattr(finite, "_read_later", lambda *given: real(*given)._replace(ready=lambda: False))
    parameter = nn.Parameter(torch.ones(5))
    optimizer: Any = torch.optim.SGD([parameter], lr=0.1, fused=True)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    guard = FiniteGuard(CPU, [optimizer], immediate=False)
    moved = []
    for gradient, term in [(1.0, 1.0), (math.inf, 1.0), (1.0, 1.0), (1.0, math.nan), (1.0, 1.0)]:
        before = parameter.detach().clone()
        optimizer.zero_grad()
        scaler.scale((parameter * gradient).sum()).backward()
        scaler.unscale_(optimizer)
        guard.inspect(0, {"kd": torch.tensor(term)}, torch.zeros(()))
        scaler.step(optimizer)
        scaler.update()
        moved.append(not torch.equal(before, parameter))
    assert moved == [True, False, True, False, False], "the scaler skips one step, the guard all that follow"
