"""hcl_loss: official values and gradients, the formula, odd inputs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tutelage.functional import hcl_loss

GOLDEN = Path(__file__).parent.parent / "golden" / "baselines"


def pair(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    student, teacher = torch.randn(2, *shape, generator=generator, dtype=dtype)
    return student, teacher


def by_hand(student: Tensor, teacher: Tensor, levels: tuple[int, ...] = (4, 2, 1)) -> Tensor:
    loss, total, weight = F.mse_loss(student, teacher), 1.0, 1.0
    for level in levels:
        if level >= student.shape[2]:
            continue
        weight /= 2
        ours, theirs = (F.adaptive_avg_pool2d(each, (level, level)) for each in (student, teacher))
        loss, total = loss + weight * F.mse_loss(ours, theirs), total + weight
    return loss / total


def test_golden_with_gradients() -> None:
    with np.load(GOLDEN / "reviewkd_hcl.npz") as data:
        arrays = {name: torch.from_numpy(np.asarray(data[name])) for name in data}
    student = [arrays[f"in_feat_student_{i}"].requires_grad_() for i in range(3)]
    loss = hcl_loss(student, [arrays[f"in_feat_teacher_{i}"] for i in range(3)])
    loss.backward()
    torch.testing.assert_close(loss, arrays["out_loss"], rtol=1e-10, atol=0)
    for i, features in enumerate(student):
        torch.testing.assert_close(features.grad, arrays[f"grad_feat_student_{i}"], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("size", [(1, 1), (2, 2), (3, 5), (4, 4), (5, 3), (6, 6), (8, 8), (8, 6), (9, 7)])
@pytest.mark.parametrize("levels", [(4, 2, 1), (3, 2), (1, 2, 4), ()])
def test_formula(size: tuple[int, int], levels: tuple[int, ...]) -> None:
    student, teacher = pair(2, 3, *size)
    wanted = by_hand(student, teacher, levels)
    torch.testing.assert_close(hcl_loss(student, teacher, levels), wanted, rtol=1e-12, atol=1e-14)


def test_maps_are_summed() -> None:
    stages = [pair(2, 3, 8, 8), pair(2, 5, 4, 4, seed=1), pair(2, 5, 1, 1, seed=2)]
    student, teacher = zip(*stages, strict=True)
    wanted = sum(by_hand(*stage) for stage in stages)
    torch.testing.assert_close(hcl_loss(student, teacher), wanted)


def test_it_is_zero_with_a_zero_gradient_where_both_agree() -> None:
    student, _ = pair(2, 3, 8, 8)
    loss = hcl_loss(student.requires_grad_(), student.detach().clone())
    loss.backward()
    assert loss == 0
    assert student.grad is not None
    assert (student.grad == 0).all()


def test_an_empty_batch_is_zero_with_a_gradient() -> None:
    student = torch.zeros(0, 3, 8, 8, requires_grad=True)
    loss = hcl_loss(student, torch.zeros(0, 3, 8, 8))
    loss.backward()
    assert loss == 0
    assert student.grad is not None


def test_gradients_and_a_constant_teacher() -> None:
    student, teacher = pair(2, 2, 5, 5)
    assert torch.autograd.gradcheck(lambda s: hcl_loss(s, teacher), student.requires_grad_())
    hcl_loss(student, teacher.requires_grad_()).backward()
    assert teacher.grad is None


def test_halves_are_computed_in_float32() -> None:
    student, teacher = (each.half() for each in pair(2, 3, 8, 8))
    loss = hcl_loss(student * 300, teacher)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, hcl_loss((student * 300).float(), teacher.float()))
    assert hcl_loss(*pair(2, 3, 8, 8)).dtype == torch.float64


def test_what_is_refused() -> None:
    student, teacher = pair(2, 3, 8, 8)
    with pytest.raises(ValueError, match=r"the student gives 1 \(\[2, 3, 8, 8\]\), the teacher 2 \(\[2"):
        hcl_loss([student], [teacher, teacher])
    with pytest.raises(ValueError, match="gives 0"):
        hcl_loss([], [])
    with pytest.raises(ValueError, match=r"\[2, 3, 8, 6\], teacher_features \[2, 3, 8, 8\]"):
        hcl_loss(student[..., :6], teacher)
    with pytest.raises(ValueError, match=r"compares maps .* got \[2, 3\]"):
        hcl_loss(student[..., 0, 0], teacher[..., 0, 0])
    with pytest.raises(ValueError, match=r"levels must be at least 1; got \(4, 0\)"):
        hcl_loss(student, teacher, (4, 0))
