"""Masks, patches, reconstruction and alignment: the authors' values, identities, extremes, bad input."""

from __future__ import annotations

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

from tutelage.functional import (
    dmae_align_loss,
    dmae_loss,
    gather_tokens,
    mask_indices,
    masked_reconstruction_loss,
    patchify,
    unpatchify,
)

GOLDEN = Path(__file__).parent.parent / "golden" / "dmae"
seeds = st.integers(0, 2**31 - 1)
quick = settings(max_examples=25, deadline=None)


def arrays(case: str) -> dict[str, Tensor]:
    with np.load(GOLDEN / f"{case}.npz") as data:
        return {name: torch.from_numpy(np.asarray(data[name])) for name in data}


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# --- the authors' values


@pytest.mark.parametrize(("case", "norm_pix"), [("mask_recon_plain", False), ("mask_recon_normpix", True)])
def test_golden_masks_and_reconstruction(case: str, norm_pix: bool) -> None:
    data = arrays(case)
    patches = patchify(data["in_images"], 4)
    torch.testing.assert_close(patches, data["out_patches"], rtol=0, atol=0)
    chosen = mask_indices(data["in_noise"], 0.75)
    assert torch.equal(chosen.ids_keep, data["out_ids_keep"])
    assert torch.equal(chosen.ids_restore, data["out_ids_restore"])
    assert torch.equal(chosen.mask, data["out_mask"].bool())
    torch.testing.assert_close(gather_tokens(data["in_tokens"], chosen.ids_keep), data["out_tokens_kept"])
    prediction = data["in_pred"].requires_grad_()
    loss = masked_reconstruction_loss(prediction, patches, chosen.mask, norm_pix=norm_pix)
    loss.backward()
    torch.testing.assert_close(loss, data["out_loss"], rtol=1e-9, atol=0)
    torch.testing.assert_close(prediction.grad, data["grad_pred"], rtol=1e-9, atol=1e-12)
    as_float = masked_reconstruction_loss(prediction, patches, data["out_mask"], norm_pix=norm_pix)
    torch.testing.assert_close(as_float, loss)


@pytest.mark.parametrize(
    ("case", "kind", "blocks"), [("align_l1", "l1", 1), ("align_l2_two_blocks", "l2", 2)]
)
def test_golden_alignment(case: str, kind: str, blocks: int) -> None:
    data = arrays(case)
    losses = []
    for i in range(blocks):
        student, weight, bias = (
            data[f"in_{name}_{i}"].requires_grad_() for name in ("student", "proj_weight", "proj_bias")
        )
        loss = dmae_align_loss(student, data[f"in_teacher_{i}"], weight=weight, bias=bias, kind=kind)
        loss.backward()
        torch.testing.assert_close(loss, data[f"out_loss_{i}"], rtol=1e-9, atol=0)
        for name, leaf in (("student", student), ("proj_weight", weight), ("proj_bias", bias)):
            torch.testing.assert_close(leaf.grad, data[f"grad_{name}_{i}"], rtol=1e-9, atol=1e-11)
        losses.append(loss.detach())
    found = dmae_loss(torch.zeros((), dtype=torch.float64), losses)
    torch.testing.assert_close(found.total, data["out_total"])
    torch.testing.assert_close(found.alignment, data["out_total"])


# --- patches and masks


@pytest.mark.parametrize(("channels", "rows", "columns", "side"), [(3, 2, 4, 2), (1, 3, 1, 5), (2, 2, 2, 1)])
def test_patches_go_back_to_images(channels: int, rows: int, columns: int, side: int) -> None:
    images = draw(0, 2, channels, rows * side, columns * side)
    patches = patchify(images, side)
    assert patches.shape == (2, rows * columns, side * side * channels)
    back = unpatchify(patches, side, channels=channels, grid=(rows, columns))
    assert torch.equal(back, images)
    # (row in patch, column in patch, channel), of the patch right of the first
    if columns > 1:
        assert torch.equal(patches[0, 1], images[0, :, :side, side : 2 * side].permute(1, 2, 0).flatten())


def test_a_square_of_patches_needs_no_grid() -> None:
    images = torch.arange(64).reshape(1, 1, 8, 8)
    assert torch.equal(unpatchify(patchify(images, 2), 2, channels=1), images)


@quick
@given(seeds, st.integers(1, 40), st.floats(0, 0.99))
def test_masks(seed: int, patches: int, ratio: float) -> None:
    kept = int(patches * (1 - ratio))
    noise = torch.rand(3, patches, generator=torch.Generator().manual_seed(seed))
    if kept == 0:
        with pytest.raises(ValueError, match=rf"= 0 of {patches} patches visible"):
            mask_indices(noise, ratio)
        return
    ids_keep, ids_restore, mask = mask_indices(noise, ratio)
    assert ids_keep.shape == (3, kept)
    assert mask.dtype == torch.bool
    assert (mask.sum(1) == patches - kept).all()
    assert not mask.gather(1, ids_keep).any()
    drawn = noise.gather(1, ids_keep)
    assert (drawn.diff(dim=1) >= 0).all()  # in order of rising noise
    assert (~mask | (noise >= drawn[:, -1:])).all()
    tokens = torch.arange(patches).expand(3, -1)[..., None]
    rest = noise.argsort(1)[:, kept:]
    shuffled = torch.cat([gather_tokens(tokens, ids_keep), gather_tokens(tokens, rest)], dim=1)
    assert torch.equal(gather_tokens(shuffled, ids_restore), tokens)


@pytest.mark.parametrize(
    ("patches", "ratio", "kept"), [(64, 0.95, 3), (16, 0.9, 1), (196, 0.98, 3), (196, 0.95, 9), (5, 0, 5)]
)
def test_the_count_is_that_of_floating_point(patches: int, ratio: float, kept: int) -> None:
    assert mask_indices(torch.rand(1, patches), ratio).ids_keep.shape == (1, kept)


def test_ties_keep_the_order_of_the_patches() -> None:
    found = mask_indices(torch.zeros(2, 6), 0.5)
    assert found.ids_keep.tolist() == [[0, 1, 2]] * 2
    assert found.ids_restore.tolist() == [list(range(6))] * 2


# --- reconstruction


@quick
@given(seeds, st.booleans())
def test_only_masked_patches_count(seed: int, norm_pix: bool) -> None:
    prediction, target = draw(seed, 2, 6, 5), draw(seed + 1, 2, 6, 5)
    mask = draw(seed + 2, 2, 6) > 0
    mask[0, 0] = True
    wanted = target
    if norm_pix:
        wanted = (target - target.mean(2, keepdim=True)) / (target.var(2, keepdim=True) + 1e-6).sqrt()
    by_hand = ((prediction - wanted) ** 2).mean(2)[mask].mean()
    torch.testing.assert_close(
        masked_reconstruction_loss(prediction, target, mask, norm_pix=norm_pix), by_hand
    )
    assert masked_reconstruction_loss(wanted, target, mask, norm_pix=norm_pix) < 1e-20


def test_nothing_masked_is_zero_with_a_gradient() -> None:
    prediction: Any = draw(0, 2, 4, 3).requires_grad_()
    loss = masked_reconstruction_loss(prediction, draw(1, 2, 4, 3), torch.zeros(2, 4))
    loss.backward()
    assert loss.item() == 0
    assert torch.equal(prediction.grad, torch.zeros(2, 4, 3))


def test_a_constant_patch_becomes_zero() -> None:
    target = torch.full((1, 2, 4), 7.0)
    prediction: Any = torch.zeros(1, 2, 4, requires_grad=True)
    loss = masked_reconstruction_loss(prediction, target, torch.ones(1, 2), norm_pix=True)
    loss.backward()
    assert loss.item() == 0
    assert torch.isfinite(prediction.grad).all()


def test_half_precision_counts_in_float32() -> None:
    prediction, target = draw(0, 2, 4, 3).half(), draw(1, 2, 4, 3).half()
    loss = masked_reconstruction_loss(prediction, target, torch.ones(2, 4), norm_pix=True)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(
        loss, masked_reconstruction_loss(prediction.float(), target.float(), torch.ones(2, 4), norm_pix=True)
    )


# --- alignment


@quick
@given(seeds, st.sampled_from(["l1", "l2"]), st.booleans())
def test_alignment_is_the_cards_formula(seed: int, kind: str, normalize: bool) -> None:
    student, teacher, weight, bias = (
        draw(seed, 2, 3, 4), draw(seed + 1, 2, 3, 6), draw(seed + 2, 6, 4), draw(seed + 3, 6)
    )  # fmt: skip
    projected = student @ weight.T + bias
    u, v = (F.normalize(x, dim=2) if normalize else x for x in (projected, teacher))
    by_hand = (u - v).abs().mean() if kind == "l1" else ((u - v) ** 2).mean()
    options = {"kind": kind, "normalize": normalize}
    torch.testing.assert_close(
        dmae_align_loss(student, teacher, weight=weight, bias=bias, **options),
        by_hand,
    )
    torch.testing.assert_close(dmae_align_loss(projected, teacher, **options), by_hand)


@quick
@given(seeds, st.floats(0.1, 100))
def test_alignment_of_directions(seed: int, scale: float) -> None:
    student, teacher = draw(seed, 2, 3, 4), draw(seed + 1, 2, 3, 4)
    loss = dmae_align_loss(student, teacher)
    torch.testing.assert_close(dmae_align_loss(scale * student, teacher), loss)
    assert dmae_align_loss(scale * teacher, teacher) < 1e-12
    order = torch.tensor([2, 0, 1])
    torch.testing.assert_close(dmae_align_loss(student[:, order], teacher[:, order]), loss)


@pytest.mark.parametrize("kind", ["l1", "l2"])
def test_gradients(kind: str) -> None:
    student, weight, bias = (
        draw(i, *shape).requires_grad_() for i, shape in enumerate([(2, 3, 4), (5, 4), (5,)])
    )
    teacher = draw(9, 2, 3, 5)
    assert torch.autograd.gradcheck(
        lambda s, w, b: dmae_align_loss(s, teacher, weight=w, bias=b, kind=kind),
        (student, weight, bias),
    )
    mask, target = draw(3, 2, 3) > 0, draw(4, 2, 3, 4)
    assert torch.autograd.gradcheck(
        lambda p: masked_reconstruction_loss(p, target, mask, norm_pix=True), (student,)
    )


@pytest.mark.parametrize("kind", ["l1", "l2"])
def test_zero_and_huge_tokens_stay_finite(kind: str) -> None:
    student: Any = draw(0, 2, 3, 4).mul(1e4)
    teacher = draw(1, 2, 3, 4).mul(1e4)
    student[0, 0], teacher[0, 0], teacher[1, 1] = 0, 0, 0
    student.requires_grad_()
    loss = dmae_align_loss(student, teacher, kind=kind)
    loss.backward()
    assert torch.isfinite(loss)
    assert torch.isfinite(student.grad).all()
    assert float(student.grad.abs().max()) < 1


def test_the_teachers_side_is_detached() -> None:
    student, teacher = draw(0, 1, 1, 4).requires_grad_(), draw(1, 1, 1, 4).requires_grad_()
    dmae_align_loss(student, teacher).backward()
    assert teacher.grad is None
    target = draw(2, 1, 1, 4).requires_grad_()
    masked_reconstruction_loss(student, target, torch.ones(1, 1)).backward()
    assert target.grad is None


def test_no_rows_is_zero_with_a_gradient() -> None:
    student = draw(0, 0, 3, 4).requires_grad_()
    loss = dmae_align_loss(student, draw(1, 0, 3, 4))
    loss.backward()
    assert loss.item() == 0


def test_the_total() -> None:
    parts = [torch.tensor(0.5), torch.tensor(0.25)]
    found = dmae_loss(torch.tensor(2.0), parts, beta=4)
    assert (float(found.total), float(found.reconstruction), float(found.alignment)) == (5.0, 2.0, 0.75)
    alone = dmae_loss(torch.tensor(2.0), [])
    assert (float(alone.total), float(alone.alignment)) == (2.0, 0.0)


# --- bad input


def test_bad_images_and_ratios() -> None:
    with pytest.raises(ValueError, match="6×8 pixels do not divide into patches of side 4"):
        patchify(torch.zeros(1, 3, 6, 8), 4)
    with pytest.raises(ValueError, match="side 0"):
        patchify(torch.zeros(1, 3, 8, 8), 0)
    with pytest.raises(ValueError, match="6 patches do not fill a square"):
        unpatchify(torch.zeros(1, 6, 12), 2)
    with pytest.raises(ValueError, match="a grid of 2×2"):
        unpatchify(torch.zeros(1, 6, 12), 2, grid=(2, 2))
    with pytest.raises(ValueError, match="has 12 values; got 4"):
        unpatchify(torch.zeros(1, 4, 4), 2)
    for ratio in (-0.1, 1.0, float("nan")):
        with pytest.raises(ValueError, match=r"mask_ratio must lie in \[0, 1\)"):
            mask_indices(torch.zeros(1, 4), ratio)
    with pytest.raises(ValueError, match="0 of 16 patches visible"):
        mask_indices(torch.zeros(1, 16), 0.98)
    with pytest.raises(ValueError, match="0 of 10 patches visible"):  # 10 · (1 − 0.9) is just below 1
        mask_indices(torch.zeros(1, 10), 0.9)


def test_bad_losses() -> None:
    tokens = torch.zeros(2, 3, 4)
    with pytest.raises(ValueError, match="shapes must agree"):
        masked_reconstruction_loss(tokens, torch.zeros(2, 3, 5), torch.ones(2, 3))
    with pytest.raises(ValueError, match=r"mask \[batch, patches\]"):
        masked_reconstruction_loss(tokens, tokens, torch.ones(2, 4))
    with pytest.raises(ValueError, match="at least 2 values"):
        masked_reconstruction_loss(tokens[..., :1], tokens[..., :1], torch.ones(2, 3), norm_pix=True)
    with pytest.raises(ValueError, match="the same tokens on both sides"):
        dmae_align_loss(tokens, torch.zeros(2, 5, 4))
    with pytest.raises(ValueError, match="the student's features have width 4, the teacher's 6"):
        dmae_align_loss(tokens, torch.zeros(2, 3, 6))
    with pytest.raises(ValueError, match="takes features of width 5"):
        dmae_align_loss(tokens, torch.zeros(2, 3, 6), weight=torch.zeros(6, 5))
    with pytest.raises(ValueError, match="a bias is given without a weight"):
        dmae_align_loss(tokens, tokens, bias=torch.zeros(4))
    with pytest.raises(ValueError, match="kind must be 'l1' or 'l2'; got 'l3'"):
        unwrap(dmae_align_loss)(tokens, tokens, kind="l3")
    with pytest.raises(ValueError, match="beta"):
        dmae_loss(torch.zeros(()), [], beta=-1)
