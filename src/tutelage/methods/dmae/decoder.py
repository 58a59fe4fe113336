"""The decoder of a masked autoencoder: from the visible patches' tokens to the pixels of all."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn

_norm = partial(nn.LayerNorm, eps=1e-6)


class Decoder(nn.Module):
    """Norm, linear layer to the decoder's width, mask tokens in the masked places, positions, blocks, norm, pixels.

    Args:
        encoder_width: of the tokens that come in.
        grid: patches down and across.
        values: of a patch that goes out: side · side · channels.
        width, depth, heads, mlp_ratio: of the decoder's blocks.

    Raises:
        ValueError: a width that is no multiple of 4 or of the heads.
    """

    positions: Tensor

    def __init__(
        self,
        encoder_width: int,
        grid: tuple[int, int],
        values: int,
        *,
        width: int = 512,
        depth: int = 8,
        heads: int = 16,
        mlp_ratio: float = 4.0,
    ) -> None:
        super().__init__()
        from timm.models.vision_transformer import Block

        if width % heads:
            raise ValueError(f"decoder_width {width} is no multiple of decoder_heads {heads}")
        self.encoder_norm = _norm(encoder_width)
        self.embed = nn.Linear(encoder_width, width)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, width))
        self.register_buffer("positions", sincos_positions(grid, width), persistent=False)
        self.blocks = nn.Sequential(
            *[Block(width, heads, mlp_ratio=mlp_ratio, qkv_bias=True, norm_layer=_norm) for _ in range(depth)]
        )
        self.norm = _norm(width)
        self.predict = nn.Linear(width, values)
        self.apply(initialise_linear)
        nn.init.normal_(self.mask_token, std=0.02)

    def forward(self, tokens: Tensor, ids_restore: Tensor) -> Tensor:
        """Pixels ``[rows, patches, values]`` from the encoder's tokens ``[rows, 1 + kept, width]`` and the order
        ``[rows, patches]`` that puts visible and masked patches back in their places."""
        tokens = self.embed(self.encoder_norm(tokens))
        visible = tokens[:, 1:]
        masked = self.mask_token.to(tokens).expand(len(tokens), ids_restore.shape[1] - visible.shape[1], -1)
        order = ids_restore[..., None].expand(-1, -1, tokens.shape[2])
        patches = torch.cat([visible, masked], dim=1).gather(1, order)
        tokens = torch.cat([tokens[:, :1], patches], dim=1) + self.positions
        pixels: Tensor = self.predict(self.norm(self.blocks(tokens)))
        return pixels[:, 1:]


def sincos_positions(grid: tuple[int, int], width: int) -> Tensor:
    """Fixed position embeddings ``[1, 1 + patches, width]``: the first half of the width holds sines and cosines of the
    column, the second of the row; the class token's are 0.

    Raises:
        ValueError: the width is no multiple of 4.
    """
    if width % 4:
        raise ValueError(f"sine-cosine positions need a width that is a multiple of 4; got {width}")
    rates = 10000.0 ** (-torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    rows, columns = (torch.arange(size, dtype=torch.float64) for size in grid)
    row, column = torch.meshgrid(rows, columns, indexing="ij")
    angles = [place.reshape(-1, 1) * rates for place in (column, row)]
    patches = torch.cat([part for angle in angles for part in (angle.sin(), angle.cos())], dim=1)
    return torch.cat([torch.zeros(1, width, dtype=torch.float64), patches])[None].float()


def initialise_linear(module: nn.Module) -> None:
    """Weights of a linear layer, or of a patch embedding taken as one, by Glorot's rule; its bias 0. As the authors
    start encoder and decoder: with timm's small weights, narrow transformers take hundreds of steps to begin."""
    if isinstance(module, (nn.Linear, nn.Conv2d)):
        nn.init.xavier_uniform_(module.weight.flatten(1))
        if module.bias is not None:
            nn.init.zeros_(module.bias)
