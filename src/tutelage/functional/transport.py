"""Entropy-regularised optimal transport between two small sets of points, in log space."""

from __future__ import annotations

import torch
from jaxtyping import Float, Real
from torch import Tensor

from tutelage.functional.checks import check_positive
from tutelage.functional.reductions import upcast

__all__ = ["sinkhorn_plan"]


def sinkhorn_plan(
    cost: Float[Tensor, "rows columns"],
    *,
    epsilon: float | int = 0.1,
    n_iters: int = 20,
    row_mass: Real[Tensor, " rows"] | None = None,
    column_mass: Real[Tensor, " columns"] | None = None,
) -> Float[Tensor, "rows columns"]:
    """Sinkhorn's plan for a cost: ``exp(-cost / epsilon)``, its rows and then its columns scaled to their masses,
    ``n_iters`` times over.

    Columns come last: they hold their masses to rounding, rows nearly. The gradient flows through all iterations.

    Args:
        cost: ``[rows, columns]``.
        epsilon: weight of the entropy, above 0; the smaller, the sharper the plan.
        n_iters: at least 1.
        row_mass: ``[rows]``, above 0; 1 each unless given, or an equal part of the columns' total where only that is.
        column_mass: ``[columns]``, above 0, with the total of the rows; equal parts of it unless given.

    Returns:
        ``[rows, columns]``, at least float32.

    Raises:
        ValueError: shapes do not fit, masses are not above 0 or have unlike totals, or an option is out of range.

    Source: Cuturi, "Sinkhorn Distances: Lightspeed Computation of Optimal Transport" (arXiv 1306.0895), algorithm 1.
    """
    check_positive("epsilon", epsilon)
    if n_iters < 1:
        raise ValueError(f"n_iters must be at least 1; got {n_iters}")
    if cost.dim() != 2:
        raise ValueError(f"cost must be [rows, columns]; got {list(cost.shape)}")
    cost = upcast(cost)
    rows, columns = _log_masses(cost, row_mass, column_mass)
    log_plan = -cost / epsilon
    for _ in range(n_iters):
        log_plan = log_plan - (log_plan.logsumexp(1) - rows)[:, None]
        log_plan = log_plan - (log_plan.logsumexp(0) - columns)
    return log_plan.exp()


def _log_masses(cost: Tensor, row_mass: Tensor | None, column_mass: Tensor | None) -> tuple[Tensor, Tensor]:
    sizes = cost.shape
    for name, mass, size in (("row_mass", row_mass, sizes[0]), ("column_mass", column_mass, sizes[1])):
        if mass is not None and mass.shape != (size,):
            raise ValueError(f"{name} must be [{size}] for a cost of {list(sizes)}; got {list(mass.shape)}")
        if mass is not None and not bool(((mass > 0) & mass.isfinite()).all()):
            raise ValueError(f"{name} must be finite and above 0; got {mass.tolist()}")
    # In the cost's type first: of integers a comparison would cut the other side's fractions.
    row_mass, column_mass = (None if mass is None else mass.to(cost) for mass in (row_mass, column_mass))
    if row_mass is None:
        total = cost.new_tensor(sizes[0]) if column_mass is None else column_mass.sum()
        row_mass = total.expand(sizes[0]) / max(sizes[0], 1)
    if column_mass is None:
        column_mass = row_mass.sum().expand(sizes[1]) / max(sizes[1], 1)
    elif not torch.isclose(row_mass.sum(), column_mass.sum(), rtol=1e-4):
        raise ValueError(
            f"row_mass and column_mass must have one total; got {float(row_mass.sum())} and {float(column_mass.sum())}"
        )
    return row_mass.log(), column_mass.log()
