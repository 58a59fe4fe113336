"""Exit branches: the authors' outputs and gradients with the authors' weights, shapes, counts, refusals."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tutelage.functional import ofakd_loss
from tutelage.methods.ofakd.branches import ConvBranch, PatchMerging, TokenBranch

GOLDEN = Path(__file__).parent.parent / "golden" / "ofakd"


def with_weights(branch: nn.Module, arrays: dict[str, Tensor], stage: int) -> nn.Module:
    """The branch with the case's weights, which lie in its own order."""
    given = [value for name, value in arrays.items() if name.startswith(f"in_proj_{stage}_")]
    branch = branch.double().train()
    with torch.no_grad():
        for parameter, value in zip(branch.parameters(), given, strict=True):
            assert parameter.shape == value.shape
            parameter.copy_(value)
    return branch


@pytest.mark.parametrize(
    ("case", "stages", "gamma"), [("full_cnn_student", (1, 2, 3, 4), 1.5), ("full_vit_student", (2, 4), 1.0)]
)
def test_the_whole_step_golden(case: str, stages: tuple[int, ...], gamma: float) -> None:
    with np.load(GOLDEN / f"{case}.npz") as data:
        arrays = {name: torch.from_numpy(np.asarray(data[name])) for name in data}
    student = arrays["in_logits_student"].requires_grad_()
    features = {stage: arrays[f"in_feat_stage{stage}"].requires_grad_() for stage in stages}
    classes = student.shape[1]
    logits = []
    for stage, feature in features.items():
        branch = (
            ConvBranch(feature.shape[1], 4 - stage, 12, classes)
            if feature.dim() == 4
            else TokenBranch(196, 1, 8, 8, max(4 - stage, 1), classes)
        )
        logits.append(with_weights(branch, arrays, stage)(feature))
        torch.testing.assert_close(logits[-1], arrays[f"out_head_logits_stage{stage}"], rtol=1e-9, atol=1e-11)
    terms = ofakd_loss(student, logits, arrays["in_logits_teacher"], arrays["in_labels"], gamma)
    terms.total.backward()
    for part, name in zip(terms[1:], ("gt", "kd", "ofa"), strict=True):
        torch.testing.assert_close(part, arrays[f"out_loss_{name}"], rtol=1e-10, atol=0)
    torch.testing.assert_close(student.grad, arrays["grad_logits_student"], rtol=1e-9, atol=1e-12)
    for stage, feature in features.items():
        torch.testing.assert_close(feature.grad, arrays[f"grad_feat_stage{stage}"], rtol=1e-7, atol=1e-11)


@pytest.mark.parametrize(("later", "widths"), [(3, [4, 8, 16, 10]), (2, [4, 8, 10]), (1, [4, 10])])
def test_a_map_is_halved_once_a_later_stage_and_its_channels_double(later: int, widths: list[int]) -> None:
    branch: Any = ConvBranch(4, later, 10, 3)
    assert [(block[0].in_channels, block[5].out_channels) for block in branch.body] == list(pairwise(widths))
    x = torch.randn(2, 4, 16, 16)
    assert branch.body(x).shape == (2, 10, 16 // 2**later, 16 // 2**later)
    assert branch(x).shape == (2, 3)


def test_the_last_stage_has_one_convolution() -> None:
    branch = ConvBranch(4, 0, 10, 3)
    assert isinstance(branch.body, nn.Conv2d)
    assert sum(p.numel() for p in branch.parameters()) == 4 * 10 + 10 + 10 * 3 + 3
    assert branch(torch.randn(1, 4, 1, 1)).shape == (1, 3)


def test_one_row_and_one_pixel_are_refused_in_training_alone() -> None:
    branch = ConvBranch(4, 1, 6, 3)
    with pytest.raises(ValueError, match=r"cannot train on 1 row\(s\): it halves the stage's 2x2 map to 1x1"):
        branch(torch.randn(1, 4, 2, 2))
    assert branch(torch.randn(2, 4, 2, 2)).shape == (2, 3)
    assert branch(torch.randn(1, 4, 4, 4)).shape == (1, 3)
    assert branch.eval()(torch.randn(1, 4, 2, 2)).shape == (1, 3)


@pytest.mark.parametrize(
    ("tokens", "grids"),
    [
        (196, [(14, 14)]),
        (784, [(28, 28), (14, 14)]),
        (3136, [(56, 56), (28, 28), (14, 14)]),
        (256, [(16, 16)]),  # 8x8 next: a further merge would pass 7x7
        (900, [(30, 30)]),  # 15x15 next: odd
        (169, []),
        (49, []),
        (16, []),
        (1, []),
        ((8, 32), [(8, 32)]),
        ((14, 16), [(14, 16)]),
        ((7, 64), []),
    ],
    ids=str,
)
def test_patches_are_merged_towards_seven_by_seven(
    tokens: int | tuple[int, int], grids: list[tuple[int, int]]
) -> None:
    branch = TokenBranch(tokens, 0, 8, 8, 1, 3)
    merges = [merge for merge in branch.merges if isinstance(merge, PatchMerging)]
    assert [merge.grid for merge in merges] == grids
    count = tokens if isinstance(tokens, int) else tokens[0] * tokens[1]
    assert branch(torch.randn(2, count, 8)).shape == (2, 3)


@pytest.mark.parametrize(
    ("tokens", "active"), [(196, [True]), (784, [True, False]), (3136, [True, True, False])]
)
def test_only_the_last_of_several_merges_has_no_activation(tokens: int, active: list[bool]) -> None:
    merges: Any = TokenBranch(tokens, 0, 4, 8, 1, 3).merges
    assert [isinstance(merge.activation, nn.GELU) for merge in merges] == active
    assert [merge.reduction.in_features for merge in merges] == [16, 32, 32][: len(active)]


@pytest.mark.parametrize("class_tokens", [0, 1, 2])
@pytest.mark.parametrize("patches", [16, 196])
@pytest.mark.parametrize("dim", [8, 12])
def test_tokens_of_any_width_with_any_class_tokens(class_tokens: int, patches: int, dim: int) -> None:
    branch = TokenBranch(patches, class_tokens, dim, 12, 2, 3)
    features = torch.randn(2, class_tokens + patches, dim, requires_grad=True)
    branch(features).sum().backward()
    assert all(parameter.grad is not None for parameter in branch.parameters())
    assert features.grad is not None
    assert (features.grad.abs().sum((0, 2)) > 0).all()
    assert isinstance(branch.widen, nn.Linear) == (dim != 12 and (class_tokens > 0 or patches == 16))


def test_class_tokens_are_classified_and_patches_only_attended_to() -> None:
    branch = TokenBranch(16, 1, 8, 8, 1, 3).eval()
    branch.blocks = nn.Sequential()
    features = torch.randn(2, 17, 8)
    torch.testing.assert_close(branch(features), branch.head(features[:, 0]))
    pooling = TokenBranch(16, 0, 8, 8, 1, 3).eval()
    pooling.blocks = nn.Sequential()
    torch.testing.assert_close(pooling(features[:, 1:]), pooling.head(features[:, 1:].mean(1)))


def test_weights_are_drawn_as_the_card_says() -> None:
    torch.manual_seed(0)
    branch = ConvBranch(64, 1, 64, 3)
    tokens: Any = TokenBranch(16, 1, 64, 64, 1, 3)
    for module in [*branch.modules(), *tokens.modules()]:
        if isinstance(module, nn.Linear):
            assert 0.01 < module.weight.std() < 0.03
            assert module.bias is None or (module.bias == 0).all()
        elif isinstance(module, nn.BatchNorm2d):
            assert (module.weight == 1).all()
            assert (module.bias == 0).all()
        elif isinstance(module, nn.Conv2d):
            expected = (2 / nn.init._calculate_fan_in_and_fan_out(module.weight)[1]) ** 0.5
            assert module.weight.std().item() == pytest.approx(expected, rel=0.15)
        elif isinstance(module, nn.LayerNorm):
            assert module.eps == 1e-5
    assert tokens.blocks[0].attn.qkv.bias is None
    assert tokens.blocks[0].attn.num_heads == 4
    assert tokens.blocks[0].mlp.fc1.out_features == 4 * 64


def test_bad_sizes_are_refused() -> None:
    with pytest.raises(ValueError, match=r"12 patches fill no square"):
        TokenBranch(12, 0, 8, 8, 1, 3)
    with pytest.raises(
        ValueError, match=r"4 attention heads do not divide the branch's width 6; set method.heads"
    ):
        TokenBranch(16, 0, 6, 6, 1, 3)
    other: Any = TokenBranch(16, 0, 6, 6, 1, 3, heads=3)
    assert other.blocks[0].attn.num_heads == 3
