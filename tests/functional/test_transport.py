"""Sinkhorn's plan: masses, the kernel's form, sharpness, gradients, what is refused."""

from __future__ import annotations

from inspect import unwrap

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tutelage.functional import sinkhorn_plan

seeds = st.integers(0, 2**31 - 1)
quick = settings(max_examples=25, deadline=None)


def draw(seed: int, rows: int = 5, columns: int = 5) -> Tensor:
    return 2 * torch.rand(rows, columns, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@quick
@given(seeds, st.integers(1, 6), st.integers(1, 6))
def test_columns_hold_their_mass_and_rows_nearly(seed: int, rows: int, columns: int) -> None:
    plan = sinkhorn_plan(draw(seed, rows, columns), epsilon=1.0, n_iters=200)
    assert (plan > 0).all()
    one = torch.ones(rows, dtype=torch.float64)
    torch.testing.assert_close(
        plan.sum(0), torch.full((columns,), rows / columns, dtype=torch.float64), rtol=1e-12, atol=0
    )
    torch.testing.assert_close(plan.sum(1), one, rtol=1e-6, atol=0)


@quick
@given(seeds)
def test_is_the_kernel_scaled_rows_first(seed: int) -> None:
    cost = draw(seed)
    kernel = (-cost / 0.3).exp()
    for _ in range(4):
        kernel = kernel / kernel.sum(1, keepdim=True)
        kernel = kernel / kernel.sum(0, keepdim=True)
    torch.testing.assert_close(sinkhorn_plan(cost, epsilon=0.3, n_iters=4), kernel, rtol=1e-10, atol=1e-14)


def test_given_masses() -> None:
    rows = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
    columns = torch.tensor([4.0, 2.0], dtype=torch.float64)
    cost = draw(0, 3, 2)
    plan = sinkhorn_plan(cost, epsilon=1.0, n_iters=300, row_mass=rows, column_mass=columns)
    torch.testing.assert_close(plan.sum(0), columns)
    torch.testing.assert_close(plan.sum(1), rows)
    assert sinkhorn_plan(cost, row_mass=rows).sum(0).tolist() == pytest.approx([3.0, 3.0])
    assert sinkhorn_plan(cost, epsilon=1.0, n_iters=300, column_mass=columns).sum(
        1
    ).tolist() == pytest.approx([2.0] * 3)


def test_masses_of_integers_are_not_cut() -> None:
    cost, rows = draw(0, 3, 2), torch.tensor([1, 1, 1])
    columns = torch.tensor([1.5, 1.5], dtype=torch.float64)
    plan = sinkhorn_plan(cost, row_mass=rows, column_mass=columns)
    assert torch.equal(plan, sinkhorn_plan(cost, row_mass=rows.double(), column_mass=columns))
    with pytest.raises(ValueError, match=r"must have one total; got 3.0 and 3.9"):
        unwrap(sinkhorn_plan)(cost, row_mass=rows, column_mass=columns * 1.3)
    alone = unwrap(sinkhorn_plan)(cost, row_mass=torch.tensor([1, 1, 2]))
    assert alone.sum(0).tolist() == pytest.approx([2.0, 2.0])


def test_a_small_epsilon_is_a_matching() -> None:
    cost = torch.tensor([[0.0, 1.0, 2.0], [2.0, 0.1, 1.0], [1.0, 2.0, 0.2]])
    plan = sinkhorn_plan(cost, epsilon=1e-3)  # exp(-2 / 1e-3) is 0 in float32; log space is not
    torch.testing.assert_close(plan, torch.eye(3))


def test_gradient_flows_through_all_iterations() -> None:
    cost = draw(1, 3, 4).requires_grad_()
    assert torch.autograd.gradcheck(lambda c: (sinkhorn_plan(c, epsilon=0.5, n_iters=3) * c).sum(), cost)


def test_one_pair_none_and_half_precision() -> None:
    assert sinkhorn_plan(torch.tensor([[1.7]])).tolist() == [[1.0]]
    assert sinkhorn_plan(torch.zeros(0, 0)).shape == (0, 0)
    assert sinkhorn_plan(torch.rand(2, 2).half()).dtype == torch.float32


def test_bad_input() -> None:
    cost, plan = draw(2), unwrap(sinkhorn_plan)
    for epsilon in (0.0, -1.0, float("nan")):
        with pytest.raises(ValueError, match=r"epsilon must be finite and above 0"):
            plan(cost, epsilon=epsilon)
    with pytest.raises(ValueError, match=r"n_iters must be at least 1; got 0"):
        plan(cost, n_iters=0)
    with pytest.raises(ValueError, match=r"cost must be \[rows, columns\]; got \[5\]"):
        plan(cost[0])
    with pytest.raises(ValueError, match=r"row_mass must be \[5\] for a cost of \[5, 5\]; got \[4\]"):
        plan(cost, row_mass=torch.ones(4))
    with pytest.raises(ValueError, match=r"column_mass must be finite and above 0; got \[0.0"):
        plan(cost, column_mass=torch.zeros(5))
    with pytest.raises(ValueError, match=r"must have one total; got 5.0 and 10.0"):
        plan(cost, row_mass=torch.ones(5), column_mass=2 * torch.ones(5))
