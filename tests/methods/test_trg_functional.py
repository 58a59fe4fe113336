"""TRG's math: the card's exact claims, its pitfalls, and what must hold for any tokens."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd import gradcheck

from tutelage.functional import (
    gather_patch_tokens,
    patch_tokens,
    sample_token_index,
    token_graph,
    trg_contextual_loss,
    trg_global_loss,
    trg_local_loss,
    trg_temperature,
)


def tokens(count: int = 12, width: int = 5, seed: int = 0) -> Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def rotation(width: int) -> Tensor:
    return torch.linalg.qr(tokens(width, width, seed=9)).Q


def test_patches_are_cut_row_by_row() -> None:
    image = torch.arange(2 * 4 * 4).float().view(1, 2, 4, 4)
    cut = patch_tokens(image, 2)
    assert cut.shape == (1, 4, 8)
    assert cut[0, 1].tolist() == [2, 3, 6, 7, 18, 19, 22, 23]
    assert torch.equal(patch_tokens(image, 1)[0], image[0].flatten(1).T)
    with pytest.raises(ValueError, match="patch=3 must be at least 1 and divide the map's 4×4"):
        patch_tokens(image, 3)


@given(st.integers(1, 5), st.integers(1, 9), st.data())
def test_positions_are_drawn_without_replacement(batch: int, count: int, data: st.DataObject) -> None:
    picked = data.draw(st.integers(1, count))
    index = sample_token_index(batch, count, picked, torch.Generator().manual_seed(1))
    assert index.shape == (batch, picked)
    assert (index.diff(dim=1) > 0).all()
    assert 0 <= index.min() <= index.max() < count
    again = sample_token_index(batch, count, picked, torch.Generator().manual_seed(1))
    assert torch.equal(index, again)


def test_every_position_is_as_likely() -> None:
    index = sample_token_index(4000, 5, 2, torch.Generator().manual_seed(0))
    shares = torch.bincount(index.flatten(), minlength=5) / index.numel()
    torch.testing.assert_close(shares, torch.full((5,), 0.2), atol=0.02, rtol=0)


def test_gathered_image_by_image() -> None:
    rows = torch.arange(12.0).view(2, 3, 2)
    picked = gather_patch_tokens(rows, torch.tensor([[0, 2], [1, 2]]))
    assert picked.tolist() == [[0, 1], [4, 5], [8, 9], [10, 11]]


@given(st.integers(2, 15), st.integers(1, 9), st.integers(0, 50))
def test_columns_hold_k_neighbours(count: int, k: int, seed: int) -> None:
    graph = token_graph(tokens(count, seed=seed), k)
    assert (graph.diagonal() == 0).all()
    assert ((graph != 0).sum(0) == min(k, count - 1)).all()
    assert 0 <= graph.min() <= graph.max() <= 1


def test_ties_go_to_the_lowest_index() -> None:
    grid = torch.tensor([[0.0], [1.0], [2.0], [3.0]], dtype=torch.float64)
    graph = token_graph(grid, k=1, normalize=False)
    assert (graph != 0).T.int().tolist() == [[0, 1, 0, 0], [1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0]]


def test_equal_tokens_have_weight_1_and_finite_gradients() -> None:
    same = torch.ones(4, 3, dtype=torch.float64, requires_grad=True)
    graph = token_graph(same, k=2)
    torch.testing.assert_close(graph[graph != 0], torch.ones(8, dtype=torch.float64))
    graph.sum().backward()
    assert same.grad is not None
    assert same.grad.abs().max() < 1e-12
    zeros = torch.zeros(4, 3, requires_grad=True)
    token_graph(zeros, k=2).sum().backward()
    assert torch.isfinite(zeros.grad).all()  # type: ignore[arg-type]


def test_zero_at_equality_with_no_gradient() -> None:
    student = tokens().requires_grad_()
    loss = trg_local_loss(student, tokens()) + trg_contextual_loss(
        student.view(3, 4, 5), tokens().view(3, 4, 5)
    )
    assert loss.abs() < 1e-12
    (gradient,) = torch.autograd.grad(loss, student)
    assert gradient.abs().max() < 1e-12


def test_rotations_change_nothing() -> None:
    student, teacher, turn = tokens(), tokens(width=7, seed=1), rotation(5)
    torch.testing.assert_close(trg_local_loss(student @ turn, teacher), trg_local_loss(student, teacher))
    images, others = student.view(3, 4, 5), teacher.view(3, 4, 7)
    torch.testing.assert_close(
        trg_contextual_loss(images @ turn, others), trg_contextual_loss(images, others)
    )
    torch.testing.assert_close(
        trg_local_loss(student, teacher @ rotation(7)), trg_local_loss(student, teacher)
    )


def test_the_contrast_of_a_large_temperature_is_log_n() -> None:
    loss = trg_global_loss(tokens(), tokens(seed=1), temperature=1e8)
    assert float(loss) == pytest.approx(math.log(12), abs=1e-7)


def test_the_order_of_tokens_does_not_matter() -> None:
    student, teacher, order = tokens(), tokens(seed=1), torch.randperm(12)
    for loss in (trg_local_loss, trg_global_loss):
        torch.testing.assert_close(loss(student[order], teacher[order]), loss(student, teacher))


@pytest.mark.parametrize("direction", ["forward", "reverse"])
def test_gradients(direction: str) -> None:
    student, teacher = tokens(6).requires_grad_(), tokens(6, seed=1)
    assert gradcheck(lambda s: trg_local_loss(s, teacher, k=2, direction=direction), student)
    assert gradcheck(lambda s: trg_global_loss(s, teacher), student)
    assert gradcheck(lambda s: trg_contextual_loss(s.view(2, 3, 5), teacher.view(2, 3, 5)), student)


def test_nothing_flows_to_the_teacher() -> None:
    student, teacher = tokens().requires_grad_(), tokens(seed=1).requires_grad_()
    whole = trg_local_loss(student, teacher) + trg_global_loss(student, teacher)
    (whole + trg_contextual_loss(student.view(3, 4, 5), teacher.view(3, 4, 5))).backward()
    assert teacher.grad is None


@pytest.mark.parametrize("scale", [1e-20, 1e4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_finite_at_any_scale(scale: float, dtype: torch.dtype) -> None:
    student = (tokens() * scale).to(dtype).requires_grad_()
    teacher = (tokens(seed=1) * scale).to(dtype)
    images = student.view(3, 4, 5)
    loss = trg_local_loss(student, teacher, k=3) + trg_global_loss(student, teacher)
    loss = loss + trg_contextual_loss(images, teacher.view(3, 4, 5))
    loss.backward()
    assert loss.dtype == torch.float32
    assert torch.isfinite(loss)
    assert student.grad is not None
    assert torch.isfinite(student.grad).all()


def test_a_single_token_and_none() -> None:
    for count in (1, 0):
        student = tokens(count).requires_grad_()
        loss = trg_local_loss(student, tokens(count, seed=1)) + trg_global_loss(
            student, tokens(count, seed=1)
        )
        loss.backward()
        assert loss == 0
        assert student.grad is not None


def test_the_temperature_falls_linearly() -> None:
    assert [trg_temperature(step, 4) for step in (0, 2, 4, 9)] == pytest.approx([0.5, 0.3, 0.1, 0.1])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: sample_token_index(2, 4, 5), "per_image=5 must lie between 1 and the 4 tokens"),
        (lambda: token_graph(tokens(), sigma=0.0), "sigma must be finite and above 0"),
        (lambda: token_graph(tokens(), k=0), "k must be at least 1"),
        (lambda: trg_local_loss(tokens(), tokens(11)), "the student has 12, the teacher 11"),
        (lambda: trg_local_loss(tokens(), tokens(), direction="both"), "'forward' or 'reverse'"),
        (
            lambda: trg_global_loss(tokens(), tokens(), temperature=0.0),
            "temperature must be finite and above 0",
        ),
        (
            lambda: trg_global_loss(tokens(), tokens(width=7)),
            "projected to the teacher's width 7; they have 5",
        ),
        (
            lambda: trg_contextual_loss(tokens().view(3, 4, 5), tokens().view(4, 3, 5)),
            "both sides need the same images and positions",
        ),
        (lambda: trg_temperature(0, 0), "total_steps must be at least 1"),
        (lambda: trg_temperature(0, 4, end=-1.0), "end must be finite and above 0"),
    ],
)
def test_bad_input(call: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()  # type: ignore[operator]
