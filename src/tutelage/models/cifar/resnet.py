"""Residual nets, from the description in He et al., arXiv 1512.03385, section 4.2.

A depth of 6n + 2: a 3 × 3 convolution, and three stages of n blocks at 32, 16 and 8 pixels. Where a block changes the
shape, its shortcut is a 1 × 1 convolution with BatchNorm (option B). The ``x4`` nets have four times the channels, in
the stem twice.
"""

from __future__ import annotations

from collections import OrderedDict

from torch import Tensor, nn

from tutelage.models.cifar.parts import Parts, blocks_per_stage, classifier, conv


class BasicBlock(nn.Module):
    """Two 3 × 3 convolutions, a shortcut: ``[rows, inputs, h, w]`` to ``[rows, outputs, h/stride, w/stride]``."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = conv(inputs, outputs, 3, stride)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.relu1 = nn.ReLU()
        self.conv2 = conv(outputs, outputs, 3)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(conv(inputs, outputs, 1, stride), nn.BatchNorm2d(outputs))
        self.relu2 = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        inner = self.bn2(self.conv2(self.relu1(self.bn1(self.conv1(x)))))
        out: Tensor = self.relu2(inner + self.shortcut(x))
        return out


def resnet(depth: int, outputs: int, channels: int, *, wide: bool) -> nn.Sequential:
    """``conv1, bn1, relu, layer1, layer2, layer3, pool, flatten, head``; ``wide``: the ``x4`` net.

    Raises:
        ModelError: a depth that is not 6n + 2.
    """
    blocks = blocks_per_stage(f"resnet{depth}{'x4' if wide else ''}", depth, 2)
    width, widths = (32, (64, 128, 256)) if wide else (16, (16, 32, 64))
    parts: Parts = OrderedDict(conv1=conv(channels, width, 3), bn1=nn.BatchNorm2d(width), relu=nn.ReLU())
    for number, wider in enumerate(widths, start=1):
        first = BasicBlock(width, wider, stride=1 if number == 1 else 2)
        rest = (BasicBlock(wider, wider, stride=1) for _ in range(blocks - 1))
        parts[f"layer{number}"] = nn.Sequential(first, *rest)
        width = wider
    return classifier(parts, width, outputs)
