"""Images as the report shows them: PNG files inside data URIs."""

from __future__ import annotations

import base64
import io

import torch
from torch import Tensor

LARGEST_SIDE = 96
"""Pixels; larger pictures are shrunk."""


def png_uri(image: Tensor, *, least_side: int = 1) -> str:
    """A grey or RGB image ``[1 or 3, height, width]`` in [0, 1], cut to that range, as a PNG in a data URI.

    Args:
        least_side: pixels; a smaller picture grows by whole factors, without blur.
    """
    from PIL import Image

    pixels = (image.detach().float().cpu().clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0)
    factor = -(-least_side // min(pixels.shape[:2]))
    pixels = pixels.repeat_interleave(factor, 0).repeat_interleave(factor, 1)
    picture = Image.fromarray(pixels.squeeze(-1).numpy() if pixels.shape[-1] == 1 else pixels.numpy())
    picture.thumbnail((LARGEST_SIDE, LARGEST_SIDE))
    written = io.BytesIO()
    picture.save(written, format="PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(written.getvalue()).decode("ascii")
