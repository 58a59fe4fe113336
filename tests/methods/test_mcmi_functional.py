"""MCMI's tensor math: the authors' values, what information is, the gradient by hand, extremes, bad input."""

from __future__ import annotations

import math
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
    class_centroids,
    conditional_mutual_information,
    eigen_cam,
    mcmi_loss,
    update_class_centroids,
)
from tutelage.methods.mcmi.figures import Figures

GOLDEN = Path(__file__).parent.parent / "golden" / "mcmi"
quick = settings(max_examples=25, deadline=None)
seeds = st.integers(0, 2**31 - 1)


def arrays(case: str) -> dict[str, Tensor]:
    with np.load(GOLDEN / f"{case}.npz") as data:
        return {name: torch.from_numpy(data[name]) for name in data}


def draw(seed: int, rows: int = 12, classes: int = 4) -> tuple[Tensor, Tensor, Tensor]:
    """Logits, class ids, and centroids of other rows."""
    generator = torch.Generator().manual_seed(seed)
    logits, others = 3 * torch.randn(2, rows, classes, generator=generator, dtype=torch.float64)
    target = torch.randint(classes, (rows,), generator=generator)
    return logits, target, class_centroids(others, target)


def test_golden_loss() -> None:
    data = arrays("ce_cmi_loss")
    logits = data["in_logits"].requires_grad_()
    found = mcmi_loss(logits, data["in_labels"], data["in_centroids"])
    found.loss.backward()
    for value, name in ((found.loss, "loss"), (found.cross_entropy, "ce"), (found.cmi, "cmi")):
        torch.testing.assert_close(value, data[f"out_{name}"], rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(logits.grad, data["grad_logits"], rtol=1e-9, atol=1e-12)


def test_golden_centroids() -> None:
    data = arrays("centroids_epoch")
    found = class_centroids(data["in_logits"], data["in_labels"])
    torch.testing.assert_close(found, data["out_centroids"], rtol=1e-5, atol=1e-6)


def test_golden_moving_average() -> None:
    """Three steps, one after the other; the same samples of every class in each."""
    data = arrays("centroids_ema")
    centroids = data["in_centroids0"]
    for index in data["in_sample_idx"]:
        centroids = update_class_centroids(
            centroids, data["in_logits"][:, index], decay=data["in_decay"].item()
        )
    torch.testing.assert_close(centroids, data["out_centroids"], rtol=1e-5, atol=1e-6)


@quick
@given(seed=seeds, shift=st.floats(-100, 100))
def test_information(seed: int, shift: float) -> None:
    logits, target, others = draw(seed)
    cmi = conditional_mutual_information(logits, target)
    probabilities, share = logits.softmax(1), target.bincount(minlength=4).double() / len(target)
    means = class_centroids(logits, target)
    given_class = share @ torch.special.entr(means).sum(1)
    entropy = torch.special.entr(probabilities).sum(1).mean()
    torch.testing.assert_close(cmi, given_class - entropy)
    assert 0 <= cmi <= min(math.log(4), given_class.item()) + 1e-12
    assert conditional_mutual_information(logits, target, others) >= cmi - 1e-12
    order = torch.randperm(len(target))
    moved = conditional_mutual_information(logits[order] + shift, target[order])
    torch.testing.assert_close(moved, cmi, rtol=1e-7, atol=1e-9)
    whole = Figures.of(logits, target).values()
    assert whole["cmi"] == pytest.approx(cmi.item(), abs=1e-12)
    parts = Figures.of(logits[:5], target[:5]).plus(Figures.of(logits[5:], target[5:])).values()
    assert parts == pytest.approx(whole)
    assert whole["loss"] == pytest.approx(F.cross_entropy(logits, target).item())


@quick
@given(seed=seeds)
def test_one_answer_a_class_has_no_information(seed: int) -> None:
    logits, target, _ = draw(seed)
    same = logits[:4][target]
    assert conditional_mutual_information(same, target).item() == pytest.approx(0, abs=1e-12)
    assert conditional_mutual_information(logits[:1], target[:1]).item() == pytest.approx(0, abs=1e-12)
    assert Figures.of(same, target).values()["cmi"] == pytest.approx(0, abs=1e-12)


@quick
@given(seed=seeds, weight=st.floats(0, 2))
def test_the_gradient_is_the_cards(seed: int, weight: float) -> None:
    logits, target, centroids = draw(seed)
    logits.requires_grad_()
    known = centroids.clone().requires_grad_()
    (found,) = torch.autograd.grad(mcmi_loss(logits, target, known, cmi_weight=weight).loss, logits)
    p, ratio = logits.softmax(1), logits.log_softmax(1) - centroids.log()[target]
    of_cmi = p * (ratio - (p * ratio).sum(1, keepdim=True)) / len(target)
    of_label = (p - F.one_hot(target, 4)) / len(target)
    torch.testing.assert_close(found, (of_label - weight * of_cmi).detach())
    assert known.grad is None


def test_gradcheck() -> None:
    logits, target, centroids = draw(0)
    plain = unwrap(mcmi_loss)
    assert torch.autograd.gradcheck(lambda z: plain(z, target, centroids).loss, logits.requires_grad_())


def test_extremes() -> None:
    hot = (1e4 * torch.eye(3)).requires_grad_()
    target = torch.tensor([1, 2, 0])
    found = mcmi_loss(hot, target, torch.eye(3))  # zeros in the centroids
    found.loss.backward()
    assert torch.isfinite(found.loss)
    assert hot.grad is not None
    assert torch.isfinite(hot.grad).all()
    empty, nothing = torch.zeros(0, 3, requires_grad=True), torch.zeros(0, dtype=torch.int64)
    loss = mcmi_loss(empty, nothing, torch.eye(3)).loss
    loss.backward()
    assert loss.item() == 0
    assert empty.grad is not None
    assert conditional_mutual_information(torch.zeros(0, 3), nothing).item() == 0
    half = mcmi_loss(hot.bfloat16(), target, torch.full((3, 3), 1 / 3))
    assert half.loss.dtype == torch.float32


def test_centroids_of_absent_classes_are_uniform() -> None:
    logits = torch.tensor([[2.0, 0.0, 1.0]])
    found = class_centroids(logits, torch.tensor([1]), num_classes=3)
    torch.testing.assert_close(
        found, torch.stack([torch.full((3,), 1 / 3), logits[0].softmax(0), torch.full((3,), 1 / 3)])
    )


@quick
@given(seed=seeds, decay=st.floats(0, 1))
def test_a_moving_average_stays_between(seed: int, decay: float) -> None:
    _, _, centroids = draw(seed)
    samples = torch.randn(4, 3, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    found = update_class_centroids(centroids, samples, decay=decay)
    torch.testing.assert_close(found, decay * centroids + (1 - decay) * samples.softmax(2).mean(1))


def test_bad_input() -> None:
    logits, target, centroids = draw(1)
    with pytest.raises(ValueError, match="target 4 names none of the 4 classes"):
        mcmi_loss(logits, torch.full((12,), 4), centroids)
    with pytest.raises(ValueError, match="target -1 names none"):
        class_centroids(logits, torch.full((12,), -1))
    for bad in (
        2 * centroids,
        -centroids,
        centroids + 1e-3,
        torch.full((4, 4), math.nan, dtype=torch.float64),
    ):
        for call in (mcmi_loss, conditional_mutual_information):
            with pytest.raises(ValueError, match="every centroid is a distribution"):
                call(logits, target, bad)
    for weight in (-0.1, math.nan):
        with pytest.raises(ValueError, match="cmi_weight must be 0 or above"):
            mcmi_loss(logits, target, centroids, cmi_weight=weight)
    with pytest.raises(ValueError, match=r"centroids must be \[4, 4\]"):
        unwrap(mcmi_loss)(logits, target, torch.eye(3))
    with pytest.raises(ValueError, match="num_classes is 7, but the logits have 4"):
        class_centroids(logits, target, num_classes=7)
    with pytest.raises(ValueError, match="with a sample or more"):
        update_class_centroids(centroids, torch.zeros(4, 0, 4, dtype=torch.float64))
    with pytest.raises(ValueError, match="decay must lie in"):
        update_class_centroids(centroids, torch.zeros(4, 1, 4, dtype=torch.float64), decay=1.5)


# --- Eigen-CAM


def test_the_map_is_the_first_principal_direction() -> None:
    """Features that are one pattern over space times one direction over channels give that pattern."""
    pattern = torch.tensor([[0.0, 1.0, 2.0], [0.0, 0.0, 4.0]])
    for sign in (1.0, -1.0):
        features = sign * torch.tensor([1.0, 2.0, 0.5])[:, None, None] * pattern
        torch.testing.assert_close(eigen_cam(features[None])[0], pattern / 4)
    assert eigen_cam(torch.zeros(2, 3, 2, 2)).tolist() == torch.zeros(2, 2, 2).tolist()
    assert eigen_cam(torch.zeros(0, 3, 2, 2)).shape == (0, 2, 2)


@quick
@given(seed=seeds, scale=st.floats(1e-3, 1e3))
def test_maps_do_not_depend_on_scale_or_on_each_other(seed: int, scale: float) -> None:
    features = torch.rand(3, 5, 4, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    maps = eigen_cam(features)
    assert maps.min() >= 0
    torch.testing.assert_close(maps.amax((1, 2)), torch.ones(3, dtype=torch.float64))
    torch.testing.assert_close(eigen_cam(scale * features[1:2]), maps[1:2])
    torch.testing.assert_close(eigen_cam(features[:, torch.randperm(5)]), maps)
    with pytest.raises(ValueError, match="features must be maps"):
        unwrap(eigen_cam)(features[0])
