"""Exit branches: from a stage of the student to logits. They are trained with it and left behind."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from tutelage.methods.ofakd.functional import patch_merge

GOAL = 7 * 7
"""Patches that merging does not go below."""


class SepConv(nn.Sequential):
    """Halves a map: two depthwise 3x3 convolutions (stride 2, then 1), each with a 1x1 one, BatchNorm and ReLU."""

    def __init__(self, channels: int, out_channels: int) -> None:
        super().__init__(
            *_separable(channels, channels, stride=2), *_separable(channels, out_channels, stride=1)
        )


class ConvBranch(nn.Module):
    """Exit of a convolutional stage: its map is halved once for each stage that is still to come, pooled, classified.

    Channels double with each halving, the last of which goes to ``out_dim``; the last stage has one 1x1 convolution.

    Args:
        channels: of the stage's map.
        stage_from_end: stages after this one.
        out_dim: width of the pooled feature.
        classes: of the logits.

    Source: arXiv 2310.19444, section 3.2; the authors' code.
    """

    def __init__(self, channels: int, stage_from_end: int, out_dim: int, classes: int) -> None:
        super().__init__()
        widths = [channels * 2**halved for halved in range(stage_from_end)] + [out_dim]
        self.body: nn.Module = nn.Conv2d(channels, out_dim, kernel_size=1)
        if stage_from_end:
            self.body = nn.Sequential(*map(SepConv, widths[:-1], widths[1:]))
        self.head = nn.Linear(out_dim, classes)
        self.apply(_draw)

    def forward(self, features: Tensor) -> Tensor:
        """``[batch, channels, height, width]`` to ``[batch, classes]``.

        Raises:
            ValueError: BatchNorm has one value a channel to train on: one row, and a 1x1 map.
        """
        try:
            return self.head(self.body(features).mean((2, 3)))  # type: ignore[no-any-return]
        except ValueError as error:
            raise ValueError(
                f"an exit branch's BatchNorm cannot train on {len(features)} row(s): it halves the stage's "
                f"{features.shape[2]}x{features.shape[3]} map to 1x1; use at least 2 rows a micro-batch, or leave the "
                "stage out (method.stages)"
            ) from error


class PatchMerging(nn.Module):
    """Four neighbouring patches become one: LayerNorm, linear map, activation."""

    def __init__(self, grid: tuple[int, int], dim: int, out_dim: int, *, activation: bool) -> None:
        super().__init__()
        self.grid = grid
        self.norm = nn.LayerNorm(4 * dim)
        self.reduction = nn.Linear(4 * dim, out_dim, bias=False)
        self.activation = nn.GELU() if activation else nn.Identity()

    def forward(self, patches: Tensor) -> Tensor:
        return self.activation(self.reduction(self.norm(patch_merge(patches, *self.grid))))  # type: ignore[no-any-return]


class TokenBranch(nn.Module):
    """Exit of a stage of tokens: patches are merged towards 7x7, transformer blocks follow, and the class tokens (else
    the mean token) are classified.

    A grid that is odd, or would have fewer than 7x7 patches, is merged no further. Tokens that no merging brings to
    ``out_dim`` go through a linear map where they are of another width.

    Args:
        tokens: patches, or height and width of their grid; a number alone is a square.
        class_tokens: tokens before the patches.
        dim: width of the stage's tokens.
        out_dim: width of the branch; ``heads`` divides it.
        depth: transformer blocks.
        classes: of the logits.
        heads: attention heads of a block.

    Raises:
        ValueError: patches that fill no square, or a width that the heads do not divide.

    Source: arXiv 2310.19444, section 3.2; the authors' code.
    """

    def __init__(
        self,
        tokens: int | tuple[int, int],
        class_tokens: int,
        dim: int,
        out_dim: int,
        depth: int,
        classes: int,
        heads: int = 4,
    ) -> None:
        super().__init__()
        from timm.models.vision_transformer import Block

        if out_dim % heads:
            raise ValueError(
                f"{heads} attention heads do not divide the branch's width {out_dim}; set method.heads"
            )
        self.class_tokens = class_tokens
        grids = _grids(_square(tokens) if isinstance(tokens, int) else tokens)
        self.merges = nn.Sequential(
            *(
                PatchMerging(grid, out_dim if i else dim, out_dim, activation=i == 0 or i + 1 < len(grids))
                for i, grid in enumerate(grids)
            )
        )
        widened = dim != out_dim and (class_tokens > 0 or not grids)
        self.widen = nn.Linear(dim, out_dim) if widened else nn.Identity()
        self.blocks = nn.Sequential(*(Block(out_dim, heads, norm_layer=nn.LayerNorm) for _ in range(depth)))
        self.head = nn.Linear(max(class_tokens, 1) * out_dim, classes)
        self.apply(_draw)

    def forward(self, features: Tensor) -> Tensor:
        """``[batch, class_tokens + patches, dim]`` to ``[batch, classes]``."""
        first, patches = features[:, : self.class_tokens], features[:, self.class_tokens :]
        patches = self.merges(patches) if len(self.merges) else self.widen(patches)
        if not self.class_tokens:
            return self.head(self.blocks(patches).mean(1))  # type: ignore[no-any-return]
        tokens = self.blocks(torch.cat([self.widen(first), patches], dim=1))
        return self.head(tokens[:, : self.class_tokens].flatten(1))  # type: ignore[no-any-return]


def _separable(channels: int, out_channels: int, *, stride: int) -> list[nn.Module]:
    return [
        nn.Conv2d(channels, channels, 3, stride=stride, padding=1, groups=channels, bias=False),
        nn.Conv2d(channels, out_channels, 1, bias=False),
        nn.BatchNorm2d(out_channels),
        nn.ReLU(),
    ]


def _square(patches: int) -> tuple[int, int]:
    side = math.isqrt(patches)
    if side**2 != patches:
        raise ValueError(f"{patches} patches fill no square; give height and width of their grid")
    return side, side


def _grids(grid: tuple[int, int]) -> list[tuple[int, int]]:
    """The grids that are merged, in turn."""
    height, width = grid
    if height % 2 or width % 2 or height * width < 4 * GOAL:
        return []
    return [grid, *_grids((height // 2, width // 2))]


def _draw(module: nn.Module) -> None:
    if isinstance(module, nn.Conv2d):
        nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    elif isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
