"""vid_loss and vid_linear_loss: official values, the likelihood itself, gradients, odd inputs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tutelage.functional import vid_linear_loss, vid_loss

GOLDEN = Path(__file__).parent.parent / "golden" / "baselines"
EPS = 1e-5


def tensors(*shapes: tuple[int, ...], seed: int = 0, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(*shape, generator=generator, dtype=dtype) for shape in shapes]


def test_golden_with_all_gradients() -> None:
    with np.load(GOLDEN / "vid_same_size.npz") as data:
        arrays = {name: torch.from_numpy(np.asarray(data[name])) for name in data}
    student, scale = arrays["in_feat_student"].requires_grad_(), arrays["in_log_scale"].requires_grad_()
    weights = [arrays[f"in_regressor_w{i}"].requires_grad_() for i in range(3)]
    loss = vid_linear_loss(student, arrays["in_feat_teacher"], weights, scale, EPS)
    loss.backward()
    torch.testing.assert_close(loss, arrays["out_loss"], rtol=1e-10, atol=0)
    torch.testing.assert_close(student.grad, arrays["grad_feat_student"], rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(scale.grad, arrays["grad_log_scale"], rtol=1e-9, atol=1e-12)
    for i, weight in enumerate(weights):
        torch.testing.assert_close(weight.grad, arrays[f"grad_regressor_w{i}"], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("shape", [(3, 4, 5, 2), (3, 4), (3, 4, 7), (1, 4, 1, 1)])
def test_it_is_the_gaussian_likelihood_without_its_constant(shape: tuple[int, ...]) -> None:
    mean, teacher = tensors(shape, shape)
    (scale,) = tensors((4,), seed=1)
    variance = (F.softplus(scale) + EPS).view(1, 4, *[1] * (len(shape) - 2)).expand(shape)
    wanted = F.gaussian_nll_loss(mean, teacher, variance, eps=0.0)
    torch.testing.assert_close(vid_loss(mean, teacher, scale, EPS), wanted, rtol=1e-12, atol=1e-14)


def test_gradients() -> None:
    mean, teacher = tensors((3, 2, 2, 3), (3, 2, 2, 3))
    (scale,) = tensors((2,), seed=1)
    assert torch.autograd.gradcheck(
        lambda m, s: vid_loss(m, teacher, s), (mean.requires_grad_(), scale.requires_grad_())
    )


def test_a_learned_variance_is_the_mean_squared_error() -> None:
    """Where the gradient of log_scale is 0, the variance is that of the errors."""
    mean, teacher = tensors((6, 1, 4, 4), (6, 1, 4, 4))
    variance = (mean - teacher).square().mean()
    scale = torch.log(torch.expm1(variance - EPS)).view(1).requires_grad_()
    vid_loss(mean, teacher, scale, EPS).backward()
    assert scale.grad is not None
    assert scale.grad.abs() < 1e-12


@pytest.mark.parametrize(
    ("student", "teacher", "size"),
    [((8, 8), (4, 4), (4, 4)), ((4, 4), (8, 6), (4, 4)), ((8, 2), (4, 4), (4, 2)), ((5, 7), (5, 7), (5, 7))],
)
def test_the_larger_map_is_pooled_first(
    student: tuple[int, int], teacher: tuple[int, int], size: tuple[int, int]
) -> None:
    ours, theirs = tensors((2, 3, *student), (2, 5, *teacher))
    weights = tensors((5, 3), (5, 5), (5, 5), seed=1)
    (scale,) = tensors((5,), seed=2)
    mean = F.adaptive_avg_pool2d(ours, size).movedim(1, -1)
    for i, weight in enumerate(weights):
        mean = (mean.relu() if i else mean) @ weight.T
    wanted = vid_loss(mean.movedim(-1, 1), F.adaptive_avg_pool2d(theirs, size), scale)
    torch.testing.assert_close(vid_linear_loss(ours, theirs, weights, scale), wanted)


def test_vectors_are_maps_of_one_position() -> None:
    ours, theirs = tensors((4, 3), (4, 5))
    weights, (scale,) = tensors((5, 3), seed=1), tensors((5,), seed=2)
    wanted = vid_loss(ours @ weights[0].T, theirs, scale)
    torch.testing.assert_close(vid_linear_loss(ours, theirs, weights, scale), wanted)


def test_no_gradient_reaches_the_teacher() -> None:
    mean, teacher = (t.requires_grad_() for t in tensors((3, 2), (3, 2)))
    vid_loss(mean, teacher, torch.zeros(2, dtype=torch.float64)).backward()
    assert teacher.grad is None
    assert mean.grad is not None


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_halves_are_computed_in_float32(dtype: torch.dtype) -> None:
    mean, teacher = (t.to(dtype) for t in tensors((3, 2, 4, 4), (3, 2, 4, 4)))
    scale = torch.zeros(2, dtype=dtype)
    loss = vid_loss(300 * mean, teacher, scale)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, vid_loss((300 * mean).float(), teacher.float(), scale.float()))
    assert vid_loss(mean.double(), teacher.double(), scale.double()).dtype == torch.float64


@pytest.mark.parametrize("log_scale", [-1e4, 1e4])
def test_extreme_scales_stay_finite(log_scale: float) -> None:
    mean, teacher = (t.float() for t in tensors((3, 2), (3, 2)))
    scale = torch.full((2,), log_scale, requires_grad=True)
    loss = vid_loss(mean.requires_grad_(), teacher, scale)
    loss.backward()
    assert torch.isfinite(loss)
    assert mean.grad is not None
    assert scale.grad is not None
    assert torch.isfinite(mean.grad).all()
    assert torch.isfinite(scale.grad).all()


def test_an_empty_batch_is_zero_with_a_gradient() -> None:
    mean, scale = torch.zeros(0, 2, 3, 3, requires_grad=True), torch.zeros(2, requires_grad=True)
    loss = vid_loss(mean, torch.zeros(0, 2, 3, 3), scale)
    loss.backward()
    assert loss == 0
    assert scale.grad is not None
    assert (scale.grad == 0).all()


def test_what_is_refused() -> None:
    mean, teacher = tensors((3, 2, 4, 4), (3, 2, 4, 4))
    scale = torch.zeros(2, dtype=torch.float64)
    with pytest.raises(ValueError, match="eps must be finite and above 0; got 0"):
        vid_loss(mean, teacher, scale, 0.0)
    with pytest.raises(ValueError, match="at least one weight matrix"):
        vid_linear_loss(mean, teacher, [], scale)
    with pytest.raises(ValueError, match=r"must be maps .* got shape \[3, 2, 4\]"):
        vid_linear_loss(mean[..., 0], teacher, tensors((2, 2)), scale)
