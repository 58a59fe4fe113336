"""The network that reads a row's state and says how far to follow the teacher there."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from torch import Tensor, nn

from tutelage.methods.tgeo_kd.functional import tgeo_fusion_ratio


class FusionRatio(nn.Module):
    """Linear layers with leaky rectifiers, and a sigmoid: ``[batch, inputs]`` to a ratio a row, ``[batch]``."""

    def __init__(self, inputs: int, hidden: Sequence[int]) -> None:
        super().__init__()
        widths = [inputs, *hidden, 1]
        self.layers = nn.ModuleList(nn.Linear(narrow, wide) for narrow, wide in pairwise(widths))

    def forward(self, state: Tensor) -> Tensor:
        layers = [(layer.get_parameter("weight"), layer.get_parameter("bias")) for layer in self.layers]
        return tgeo_fusion_ratio(state, layers)
