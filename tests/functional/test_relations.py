"""rkd_loss, pkt_loss and sp_loss: reference values, definitions, invariances, degenerate rows, and bounded memory."""

from __future__ import annotations

from collections.abc import Callable
from inspect import unwrap
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tutelage.functional import pkt_loss, relations, rkd_loss, sp_loss

GOLDEN = Path(__file__).parent.parent / "golden" / "baselines"
Loss = Callable[..., Tensor]
LOSSES: dict[str, Loss] = {"rkd": rkd_loss, "pkt": pkt_loss, "sp": sp_loss}
seeds = st.integers(0, 2**31 - 1)
quick = settings(max_examples=15, deadline=None)
every = pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)


def pair(seed: int, rows: int = 6, ours: int = 4, theirs: int = 7) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    student, teacher = (
        torch.randn(rows, width, generator=generator, dtype=torch.float64) for width in (ours, theirs)
    )
    return student.requires_grad_(), teacher


def gradient(loss: Tensor, student: Tensor) -> Tensor:
    return torch.autograd.grad(loss, student)[0]


def plain_rkd(student: Tensor, teacher: Tensor, squared: bool) -> tuple[Tensor, Tensor]:
    """Distances and angles, pair by pair and triple by triple."""
    sides = []
    for features in (student, teacher):
        rows = range(len(features))
        distances = torch.stack([(a - b).square().sum() for a in features for b in features])
        distances = distances if squared else distances.sqrt()
        angles = torch.stack(
            [
                F.normalize(features[j] - features[i], dim=0) @ F.normalize(features[k] - features[i], dim=0)
                for i in rows
                for j in rows
                for k in rows
            ]
        )
        sides.append((distances / distances[distances > 0].mean(), angles))
    (d_s, a_s), (d_t, a_t) = sides
    return F.smooth_l1_loss(d_s, d_t), F.smooth_l1_loss(a_s, a_t)


def plain_pkt(student: Tensor, teacher: Tensor, eps: float = 1e-7) -> Tensor:
    # eps in the norms too: between nearly opposite rows it is what is left of the similarity.
    units = [f / (f.norm(dim=1, keepdim=True) + eps) for f in (student, teacher)]
    p_s, p_t = (((u[:, None] * u[None]).sum(2) + 1) / 2 for u in units)
    p_s, p_t = (p / p.sum(1, keepdim=True) for p in (p_s, p_t))
    return (p_t * ((p_t + eps) / (p_s + eps)).log()).mean()


def plain_sp(student: Tensor, teacher: Tensor) -> Tensor:
    sides = []
    for features in (student.flatten(1), teacher.flatten(1)):
        gram = torch.stack([torch.stack([a @ b for b in features]) for a in features])
        sides.append(gram / gram.norm(dim=1, keepdim=True))
    loss: Tensor = (sides[1] - sides[0]).square().sum() / len(student) ** 2
    return loss


@pytest.mark.parametrize("name", LOSSES)
def test_golden_value_and_gradient(name: str) -> None:
    with np.load(GOLDEN / f"{name}_default.npz") as data:
        arrays = {key: torch.from_numpy(np.asarray(data[key])) for key in data}
    student = arrays["in_feat_student"].requires_grad_()
    loss = LOSSES[name](student, arrays["in_feat_teacher"])
    torch.testing.assert_close(loss, arrays["out_loss"], rtol=1e-10, atol=1e-13)
    torch.testing.assert_close(gradient(loss, student), arrays["grad_feat_student"], rtol=1e-8, atol=1e-11)


@quick
@given(seeds, st.booleans())
def test_rkd_is_the_definition(seed: int, squared: bool) -> None:
    student, teacher = pair(seed, rows=5)
    distance, angle = plain_rkd(student.detach(), teacher, squared)
    torch.testing.assert_close(
        rkd_loss(student, teacher, 2.0, 3.0, squared), 2 * distance + 3 * angle, rtol=1e-9, atol=1e-12
    )
    torch.testing.assert_close(rkd_loss(student, teacher, 0.0, 1.0, squared), angle, rtol=1e-9, atol=1e-12)


@quick
@given(seeds)
def test_pkt_and_sp_are_their_definitions(seed: int) -> None:
    student, teacher = pair(seed)
    torch.testing.assert_close(pkt_loss(student, teacher), plain_pkt(student, teacher), rtol=1e-8, atol=1e-12)
    torch.testing.assert_close(sp_loss(student, teacher), plain_sp(student, teacher), rtol=1e-9, atol=1e-12)


def test_maps_are_flattened() -> None:
    student, teacher = pair(1, ours=12, theirs=12)
    for loss in LOSSES.values():
        torch.testing.assert_close(
            loss(student.reshape(6, 3, 2, 2), teacher.reshape(6, 12, 1, 1)), loss(student, teacher)
        )


@every
def test_gradcheck(loss: Loss) -> None:
    student, teacher = pair(2, rows=4)
    assert torch.autograd.gradcheck(lambda s: loss(s, teacher), student)


def test_gradcheck_of_the_rest_of_rkd() -> None:
    student, teacher = pair(3, rows=4)
    assert torch.autograd.gradcheck(lambda s: rkd_loss(s, teacher, 1.0, 0.0, squared=True), student)
    assert torch.autograd.gradcheck(lambda s: rkd_loss(s, teacher, 0.0, 7.0), student)


@pytest.mark.parametrize("loss", [pkt_loss, sp_loss])
def test_second_derivatives(loss: Loss) -> None:
    student, teacher = pair(4, rows=3)
    assert torch.autograd.gradgradcheck(lambda s: loss(s, teacher), student)


def test_rkd_refuses_second_derivatives() -> None:
    student, teacher = pair(4)
    with pytest.raises(RuntimeError, match="first derivatives only"):
        torch.autograd.grad(rkd_loss(student, teacher), student, create_graph=True)


@every
@quick
@given(seed=seeds)
def test_zero_with_zero_gradient_at_equality_and_positive_elsewhere(loss: Loss, seed: int) -> None:
    student, teacher = pair(seed)
    assert loss(student, teacher) > 0
    same = loss(student, student.detach())
    assert same.abs() < 1e-12
    assert gradient(same, student).abs().max() < 1e-6  # eps over the shortest row


@every
@quick
@given(seed=seeds)
def test_scale_and_order_do_not_matter(loss: Loss, seed: int) -> None:
    student, teacher = pair(seed)
    order = torch.randperm(len(student), generator=torch.Generator().manual_seed(seed))
    for moved in (
        loss(3 * student, teacher),
        loss(student, 3 * teacher),
        loss(student[order], teacher[order]),
    ):
        torch.testing.assert_close(moved, loss(student, teacher), rtol=1e-4, atol=1e-6)


def test_rkd_does_not_see_where_the_features_lie() -> None:
    student, teacher = pair(5)
    torch.testing.assert_close(rkd_loss(student + 1e3, teacher - 1e3), rkd_loss(student, teacher))


@every
def test_one_row_gives_zero_with_a_zero_gradient(loss: Loss) -> None:
    student, teacher = pair(6, rows=1)
    value = loss(student, teacher)
    assert value == 0
    assert gradient(value, student).abs().max() == 0


def test_one_row_of_zeros_gives_zero_too() -> None:
    student, teacher = torch.zeros(1, 4, requires_grad=True), torch.ones(1, 4)
    assert [loss(student, teacher).item() for loss in LOSSES.values()] == [0, 0, 0]


@every
def test_no_rows_give_zero_with_a_gradient(loss: Loss) -> None:
    student = torch.zeros(0, 4, requires_grad=True)
    value = loss(student, torch.zeros(0, 5))
    assert value == 0
    assert gradient(value, student).shape == (0, 4)


def test_rkd_of_two_rows() -> None:
    student, teacher = pair(7, rows=2)
    value = rkd_loss(student, teacher)
    assert value.abs() < 1e-12  # one distance, which is its own mean, and no angle
    assert gradient(value, student).abs().max() < 1e-12


@every
def test_equal_rows_are_legal(loss: Loss) -> None:
    teacher = pair(8)[1]
    student = torch.ones(6, 4, dtype=torch.float64, requires_grad=True)
    value = loss(student, teacher)
    assert value.isfinite()
    assert gradient(value, student).isfinite().all()


def test_rkd_distances_of_equal_rows_are_one() -> None:
    teacher = pair(8)[1]
    flat = torch.full((6, 6), 1.0, dtype=torch.float64).fill_diagonal_(0)
    wanted = torch.cdist(teacher, teacher)
    wanted = wanted / (wanted.sum() / 30)
    value = rkd_loss(torch.ones(6, 4, dtype=torch.float64), teacher, 1.0, 0.0)
    torch.testing.assert_close(value, F.smooth_l1_loss(flat, wanted))


@every
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_two_equal_rows_have_a_moderate_gradient(loss: Loss, dtype: torch.dtype) -> None:
    student, teacher = (features.detach().to(dtype) for features in pair(9))
    student[1] = student[0]
    found = gradient(loss(student.requires_grad_(), teacher), student)
    assert found.isfinite().all()
    assert 0 < found.abs().max() < 1e3


def test_a_row_of_zeros() -> None:
    student, teacher = pair(10)
    student = student.detach().clone()
    student[2] = 0
    student.requires_grad_()
    for loss in LOSSES.values():
        value = loss(student, teacher)
        assert value.isfinite()
        assert gradient(value, student).isfinite().all()
    assert gradient(sp_loss(student, teacher), student)[2].abs().max() < 1e3
    unit = F.normalize(student.detach(), dim=1)
    affinities = (unit @ unit.T + 1) / 2
    torch.testing.assert_close(
        relations._affinities(student, 1e-7), affinities / affinities.sum(1, keepdim=True)
    )


@every
@pytest.mark.parametrize("scale", [1e4, 1e-4])
def test_finite_at_extremes(loss: Loss, scale: float) -> None:
    student, teacher = (scale * features.detach().float() for features in pair(11))
    value = loss(student.requires_grad_(), teacher)
    assert value.isfinite()
    assert gradient(value, student).isfinite().all()


@every
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(loss: Loss, dtype: torch.dtype) -> None:
    student, teacher = (features.detach().to(dtype) for features in pair(12))
    value = loss(student, teacher)
    assert value.dtype == torch.float32
    assert value == loss(student.float(), teacher.float())


@every
def test_autocast_changes_nothing(loss: Loss) -> None:
    student, teacher = (features.detach().float().requires_grad_() for features in pair(13))
    plain = loss(student, teacher)
    with torch.autocast("cpu", torch.bfloat16):
        value = loss(student, teacher)
        found = gradient(value, student)
    assert value == plain
    torch.testing.assert_close(found, gradient(plain, student), rtol=0, atol=0)


@every
def test_the_teacher_gets_no_gradient(loss: Loss) -> None:
    student, teacher = pair(14)
    teacher.requires_grad_()
    with pytest.raises(RuntimeError, match="not have been used in the graph"):
        gradient(loss(student, teacher), teacher)


def test_rkd_without_a_gradient() -> None:
    student, teacher = pair(15)
    with torch.no_grad():
        value = rkd_loss(student, teacher)
    assert not value.requires_grad
    assert value == rkd_loss(student, teacher)


class Largest(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Entries of the largest tensor that any operation gives."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.entries = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = func(*args, **(kwargs or {}))
        for value in given if isinstance(given, (tuple, list)) else (given,):
            if isinstance(value, Tensor):
                self.entries = max(self.entries, value.numel())
        return given


def test_rkd_in_chunks_is_the_same_and_holds_no_more_than_a_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    rows, width = 23, 9
    student, teacher = pair(16, rows=rows, ours=width, theirs=5)
    whole = rkd_loss(student, teacher)
    monkeypatch.setattr(relations, "_CHUNK", 3 * rows**2)
    with Largest() as largest:
        chunked = rkd_loss(student, teacher)
        found = gradient(chunked, student)
    assert largest.entries == 3 * rows**2
    torch.testing.assert_close(chunked, whole)
    torch.testing.assert_close(found, gradient(whole, student))


@every
def test_bad_input(loss: Loss) -> None:
    student, teacher = pair(17)
    plain = unwrap(loss)
    with pytest.raises(ValueError, match=r"equally many rows; got student_features \[6, 4\], .* \[5, 7\]"):
        plain(student, teacher[:5])
    with pytest.raises(ValueError, match=r"features must be \[batch, ...\]"):
        plain(student[:, 0], teacher)


@pytest.mark.parametrize("loss", [rkd_loss, pkt_loss])
def test_eps_must_be_above_zero(loss: Loss) -> None:
    with pytest.raises(ValueError, match="eps must be finite and above 0"):
        unwrap(loss)(*pair(18), eps=0.0)
