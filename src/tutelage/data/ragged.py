"""Rows of unequal length that lie one after the other in an array."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Ints = NDArray[np.int64]


def ranges(starts: Ints, lengths: Ints) -> Ints:
    """``start, start + 1, …`` of each length, one range after the other."""
    skipped = np.cumsum(lengths) - lengths
    return np.repeat(starts - skipped, lengths) + np.arange(lengths.sum())


def spread(values: NDArray[np.integer], places: NDArray[np.bool_], filler: int) -> Tensor:
    """``values`` in the True ``places`` ``[rows, width]``, row by row, and ``filler`` elsewhere; int64."""
    whole = np.full(places.shape, filler, dtype=np.int64)
    whole[places] = values
    return torch.from_numpy(whole)
