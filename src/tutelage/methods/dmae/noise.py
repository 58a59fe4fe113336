"""Noise of patches that is a pure function of (seed, view, row), made on the rows' own device."""

from __future__ import annotations

import torch
from torch import Tensor

_GAMMA = -7046029254386353131
"""0x9E3779B97F4A7C15 as a signed integer."""


def patch_noise(index: Tensor, view: Tensor, seed: int, patches: int) -> Tensor:
    """Numbers ``[rows, patches]`` in [0, 1), of 24 random bits each, from ids of rows and numbers of views, ``[rows]``
    int64 both.

    SplitMix64's finaliser (Steele, Lea, Flood: "Fast splittable pseudorandom number generators", OOPSLA 2014) over one
    id after the other: integer arithmetic, so every device gives the same numbers, and none is waited for, as the
    Philox of the views, which runs on the CPU, would.
    """
    places = torch.arange(patches, device=index.device)
    key = _mixed(_mixed(torch.full_like(index, seed)) ^ index)
    words = _mixed(_mixed(key ^ view)[:, None] ^ places)
    return _shifted(words, 40).to(torch.float32) * 2.0**-24


def _mixed(words: Tensor) -> Tensor:
    words = words + _GAMMA
    words = (words ^ _shifted(words, 30)) * -4658895280553007687
    words = (words ^ _shifted(words, 27)) * -7723592293110705685
    return words ^ _shifted(words, 31)


def _shifted(words: Tensor, bits: int) -> Tensor:
    """Shift to the right with zeros from the left; torch's own keeps the sign."""
    return (words >> bits) & ((1 << (64 - bits)) - 1)
