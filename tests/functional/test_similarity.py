"""Linear CKA: by hand, what it does not see, extremes, bad input."""

from __future__ import annotations

from inspect import unwrap

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tutelage.functional import linear_cka

quick = settings(max_examples=25, deadline=None)
seeds = st.integers(0, 2**31 - 1)


def draw(seed: int, rows: int = 12, left: int = 5, right: int = 7) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shared = torch.randn(rows, 3, generator=generator, dtype=torch.float64)
    mixed = [
        shared @ torch.randn(3, width, generator=generator, dtype=torch.float64)
        + 0.3 * torch.randn(rows, width, generator=generator, dtype=torch.float64)
        for width in (left, right)
    ]
    return mixed[0], mixed[1]


@quick
@given(seeds, st.sampled_from([(12, 5, 7), (6, 20, 3), (6, 3, 20), (8, 8, 8)]))
def test_it_is_the_formula(seed: int, sizes: tuple[int, int, int]) -> None:
    x, y = draw(seed, *sizes)
    a, b = x - x.mean(0), y - y.mean(0)
    wanted = (b.T @ a).norm() ** 2 / ((a.T @ a).norm() * (b.T @ b).norm())
    torch.testing.assert_close(linear_cka(x, y), wanted)
    torch.testing.assert_close(linear_cka(y, x), wanted)
    assert 0 <= wanted <= 1


@quick
@given(seeds)
def test_rotation_scale_shift_and_row_order_change_nothing(seed: int) -> None:
    x, y = draw(seed)
    generator = torch.Generator().manual_seed(seed)
    rotation = torch.linalg.qr(torch.randn(5, 5, generator=generator, dtype=torch.float64))[0]
    order = torch.randperm(12, generator=generator)
    cka = linear_cka(x, y)
    torch.testing.assert_close(linear_cka(3 * x @ rotation + 100, y), cka)
    torch.testing.assert_close(linear_cka(x[order], y[order]), cka)
    torch.testing.assert_close(linear_cka(x, 2 * x @ rotation - 1), torch.ones_like(cka))


def test_another_order_of_rows_on_one_side_alone_is_less_alike() -> None:
    x, y = draw(0, rows=100)
    assert linear_cka(x, y.roll(1, 0)) < 0.2 < linear_cka(x, y)


@pytest.mark.parametrize("width", [3, 40], ids=["by features", "by rows"])
def test_it_is_differentiable(width: int) -> None:
    x, y = draw(1, 6, width, 4)
    assert torch.autograd.gradcheck(linear_cka, (x.requires_grad_(), y.requires_grad_()))


@pytest.mark.parametrize("size", [1e-30, 1e-4, 1e18])
def test_the_size_of_values_does_not_matter(size: float) -> None:
    x, y = (side.float() for side in draw(2))
    torch.testing.assert_close(linear_cka(size * x, y), linear_cka(x, y), rtol=1e-4, atol=1e-5)


def test_a_side_that_is_the_same_for_all_rows_is_like_nothing() -> None:
    x, _ = draw(3)
    assert linear_cka(x, torch.ones(12, 4, dtype=torch.float64)) == 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(dtype: torch.dtype) -> None:
    x, y = (side.to(dtype) for side in draw(4))
    assert linear_cka(x, y).dtype == torch.float32
    assert linear_cka(x, y) == linear_cka(x.float(), y.float())


def test_bad_input() -> None:
    x, y = draw(5)
    with pytest.raises(ValueError, match=r"got 12 and 11 rows"):
        unwrap(linear_cka)(x, y[:11])
    with pytest.raises(ValueError, match=r"got 1 and 1 rows"):
        linear_cka(x[:1], y[:1])
