"""ShuffleNets: v1 with three groups from Zhang et al., arXiv 1707.01083, table 1; v2 from Ma et al., arXiv 1807.11164,
table 5, at width 1.

In the form of the distillation literature: a 1 × 1 stem that keeps 32 pixels, no max pooling, stages at 16, 8 and 4; v1
activates after its depthwise convolutions too.
"""

from __future__ import annotations

from collections import OrderedDict

import torch
from torch import Tensor, nn

from tutelage.models.cifar.parts import Parts, classifier, conv, depthwise

STEM = 24
BLOCKS = (4, 8, 4)
"""Of each stage; the first halves the size."""
GROUPS = 3
V1_WIDTHS = (240, 480, 960)
V2_WIDTHS = (116, 232, 464)
V2_LAST = 1024


class GroupedUnit(nn.Module):
    """v1: a bottleneck of grouped 1 × 1 convolutions around a depthwise one. With stride 2 the pooled input is set
    beside its result, else the input is added."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        made = outputs - inputs if stride == 2 else outputs
        narrow = made // 4
        # The stem has too few channels to be grouped.
        groups = 1 if inputs == STEM else GROUPS
        self.conv1 = conv(inputs, narrow, 1, groups=groups)
        self.bn1, self.relu1 = nn.BatchNorm2d(narrow), nn.ReLU()
        self.shuffle = nn.ChannelShuffle(groups)
        self.conv2, self.bn2, self.relu2 = depthwise(narrow, stride), nn.BatchNorm2d(narrow), nn.ReLU()
        self.conv3, self.bn3 = conv(narrow, made, 1, groups=GROUPS), nn.BatchNorm2d(made)
        self.pool = nn.AvgPool2d(3, stride=2, padding=1) if stride == 2 else None
        self.relu3 = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        inner = self.shuffle(self.relu1(self.bn1(self.conv1(x))))
        inner = self.bn3(self.conv3(self.relu2(self.bn2(self.conv2(inner)))))
        out: Tensor = self.relu3(inner + x if self.pool is None else torch.cat([inner, self.pool(x)], 1))
        return out


class SplitUnit(nn.Module):
    """v2: half of the channels go through three convolutions; the other half stays, or with stride 2 (where both halves
    are the whole input) goes through two.

    The last activation is taken over both halves at once. The half that stays is not negative, so this changes nothing
    in it, and the whole map before the activation can be tapped.
    """

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        half = outputs // 2
        taken = inputs if stride == 2 else half
        self.conv1, self.bn1, self.relu1 = conv(taken, half, 1), nn.BatchNorm2d(half), nn.ReLU()
        self.conv2, self.bn2 = depthwise(half, stride), nn.BatchNorm2d(half)
        self.conv3, self.bn3 = conv(half, half, 1), nn.BatchNorm2d(half)
        self.aside: nn.Module | None = None
        if stride == 2:
            self.aside = nn.Sequential(
                depthwise(inputs, stride), nn.BatchNorm2d(inputs), conv(inputs, half, 1), nn.BatchNorm2d(half)
            )
        self.relu2 = nn.ReLU()
        self.shuffle = nn.ChannelShuffle(2)

    def forward(self, x: Tensor) -> Tensor:
        stays, taken = x.chunk(2, 1) if self.aside is None else (self.aside(x), x)
        inner = self.bn2(self.conv2(self.relu1(self.bn1(self.conv1(taken)))))
        inner = self.bn3(self.conv3(inner))
        out: Tensor = self.shuffle(self.relu2(torch.cat([stays, inner], 1)))
        return out


def shufflenet_v1(outputs: int, channels: int) -> nn.Sequential:
    """``conv1, bn1, relu, layer1, layer2, layer3, pool, flatten, head``."""
    return classifier(_trunk(GroupedUnit, V1_WIDTHS, channels), V1_WIDTHS[-1], outputs)


def shufflenet_v2(outputs: int, channels: int) -> nn.Sequential:
    """``conv1, bn1, relu, layer1, layer2, layer3, conv2, bn2, relu2, pool, flatten, head``."""
    parts = _trunk(SplitUnit, V2_WIDTHS, channels)
    parts |= OrderedDict(conv2=conv(V2_WIDTHS[-1], V2_LAST, 1), bn2=nn.BatchNorm2d(V2_LAST), relu2=nn.ReLU())
    return classifier(parts, V2_LAST, outputs)


def _trunk(unit: type[GroupedUnit | SplitUnit], widths: tuple[int, ...], channels: int) -> Parts:
    parts: Parts = OrderedDict(conv1=conv(channels, STEM, 1), bn1=nn.BatchNorm2d(STEM), relu=nn.ReLU())
    width = STEM
    for number, (wider, count) in enumerate(zip(widths, BLOCKS, strict=True), start=1):
        rest = (unit(wider, wider, stride=1) for _ in range(count - 1))
        parts[f"layer{number}"] = nn.Sequential(unit(width, wider, stride=2), *rest)
        width = wider
    return parts
