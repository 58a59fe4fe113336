"""MobileNetV2 at half width, from the description in Sandler et al., arXiv 1801.04381, table 2.

In the form of the distillation literature: ReLU in place of ReLU6, a stem at 16 pixels, stages at 16, 8, 4 and 2, and
an expansion convolution in the first block too.
"""

from __future__ import annotations

from collections import OrderedDict

from torch import Tensor, nn

from tutelage.models.cifar.parts import Parts, classifier, conv, depthwise

WIDTH = 0.5
STEM, LAST = 32, 1280
STAGES: tuple[tuple[tuple[int, int, int, int], ...], ...] = (
    ((1, 16, 1, 1), (6, 24, 2, 1)),
    ((6, 32, 3, 2),),
    ((6, 64, 4, 2), (6, 96, 3, 1)),
    ((6, 160, 3, 2), (6, 320, 1, 1)),
)
"""By resolution: (expansion, channels at full width, blocks, stride of the first)."""


class InvertedResidual(nn.Module):
    """Expand, a depthwise 3 × 3 convolution, and a linear projection; a skip where the shape stays."""

    def __init__(self, inputs: int, outputs: int, stride: int, expansion: int) -> None:
        super().__init__()
        hidden = inputs * expansion
        self.conv1, self.bn1, self.relu1 = conv(inputs, hidden, 1), nn.BatchNorm2d(hidden), nn.ReLU()
        self.conv2, self.bn2, self.relu2 = depthwise(hidden, stride), nn.BatchNorm2d(hidden), nn.ReLU()
        self.conv3, self.bn3 = conv(hidden, outputs, 1), nn.BatchNorm2d(outputs)
        self.skips = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        inner = self.relu1(self.bn1(self.conv1(x)))
        inner = self.relu2(self.bn2(self.conv2(inner)))
        out: Tensor = self.bn3(self.conv3(inner))
        return x + out if self.skips else out


def mobilenet_v2(outputs: int, channels: int) -> nn.Sequential:
    """``conv1, bn1, relu1, layer1 … layer4, conv2, bn2, relu2, pool, flatten, head``. Stages end without activation."""
    width = int(STEM * WIDTH)
    parts: Parts = OrderedDict(
        conv1=conv(channels, width, 3, stride=2), bn1=nn.BatchNorm2d(width), relu1=nn.ReLU()
    )
    for number, settings in enumerate(STAGES, start=1):
        blocks = []
        for expansion, full, count, stride in settings:
            wider = int(full * WIDTH)
            for position in range(count):
                blocks.append(InvertedResidual(width, wider, stride if position == 0 else 1, expansion))
                width = wider
        parts[f"layer{number}"] = nn.Sequential(*blocks)
    parts |= OrderedDict(conv2=conv(width, LAST, 1), bn2=nn.BatchNorm2d(LAST), relu2=nn.ReLU())
    return classifier(parts, LAST, outputs)
