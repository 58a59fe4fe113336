"""Residual networks for 32 × 32 images, from the description in He et al., arXiv 1512.03385, section 4.2.

A depth of 6n + 2: one 3 × 3 convolution, three stages of n basic blocks at 32, 16 and 8 pixels, global average pooling
and a linear classifier. Where a block changes the shape, its shortcut is a 1 × 1 convolution with BatchNorm (option B).
The ``x4`` nets of the distillation literature (Tian et al., arXiv 1910.10699) have four times the channels, but a stem
of twice.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn


class _Shape(NamedTuple):
    depth: int
    stem: int
    widths: tuple[int, int, int]


SHAPES = {
    "resnet20": _Shape(20, 16, (16, 32, 64)),
    "resnet56": _Shape(56, 16, (16, 32, 64)),
    "resnet8x4": _Shape(8, 32, (64, 128, 256)),
    "resnet32x4": _Shape(32, 32, (64, 128, 256)),
}


class BasicBlock(nn.Module):
    """Two 3 × 3 convolutions, a shortcut: ``[rows, inputs, h, w]`` to ``[rows, outputs, h/stride, w/stride]``."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride, bias=False),
                nn.BatchNorm2d(outputs),
            )

    def forward(self, x: Tensor) -> Tensor:
        inner = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(inner + self.shortcut(x))


def cifar_resnet(name: str, outputs: int, channels: int = 3) -> nn.Sequential:
    """``conv1, bn1, relu, layer1, layer2, layer3, pool, flatten, head``: a plain sequence, so that it can be split."""
    shape = SHAPES[name]
    blocks = (shape.depth - 2) // 6
    parts: OrderedDict[str, nn.Module] = OrderedDict(
        conv1=nn.Conv2d(channels, shape.stem, 3, padding=1, bias=False),
        bn1=nn.BatchNorm2d(shape.stem),
        relu=nn.ReLU(),
    )
    width = shape.stem
    for number, wider in enumerate(shape.widths, start=1):
        first = BasicBlock(width, wider, stride=1 if number == 1 else 2)
        parts[f"layer{number}"] = nn.Sequential(
            first, *(BasicBlock(wider, wider, 1) for _ in range(blocks - 1))
        )
        width = wider
    parts |= OrderedDict(pool=nn.AdaptiveAvgPool2d(1), flatten=nn.Flatten(), head=nn.Linear(width, outputs))
    model = nn.Sequential(parts)
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    return model
