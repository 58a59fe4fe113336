"""Wide residual nets, from the description in Zagoruyko and Komodakis, arXiv 1605.07146, section 3.

A depth of 6n + 4 and a factor k: three stages of n blocks with 16k, 32k and 64k channels, each block normalised and
activated before its convolutions. So a stage gives what no activation has touched yet; its normalised form is the input
of the next stage's first activation (``layer2.0.relu1:in``), after the last stage that of ``relu``.
"""

from __future__ import annotations

from collections import OrderedDict

from torch import Tensor, nn

from tutelage.models.cifar.parts import Parts, blocks_per_stage, classifier, conv


class PreActivationBlock(nn.Module):
    """BatchNorm, ReLU and a 3 × 3 convolution, twice. Where the width changes, the shortcut is a 1 × 1 convolution of
    the activated input; elsewhere the input itself."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(inputs)
        self.relu1 = nn.ReLU()
        self.conv1 = conv(inputs, outputs, 3, stride)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.relu2 = nn.ReLU()
        self.conv2 = conv(outputs, outputs, 3)
        self.shortcut = None if inputs == outputs else conv(inputs, outputs, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        active = self.relu1(self.bn1(x))
        inner: Tensor = self.conv2(self.relu2(self.bn2(self.conv1(active))))
        return inner + (x if self.shortcut is None else self.shortcut(active))


def wide_resnet(depth: int, factor: int, outputs: int, channels: int) -> nn.Sequential:
    """``conv1, layer1, layer2, layer3, bn, relu, pool, flatten, head``.

    Raises:
        ModelError: a depth that is not 6n + 4.
    """
    blocks = blocks_per_stage(f"wrn-{depth}-{factor}", depth, 4)
    width = 16
    parts: Parts = OrderedDict(conv1=conv(channels, width, 3))
    for number, base in enumerate((16, 32, 64), start=1):
        wider = base * factor
        first = PreActivationBlock(width, wider, stride=1 if number == 1 else 2)
        rest = (PreActivationBlock(wider, wider, stride=1) for _ in range(blocks - 1))
        parts[f"layer{number}"] = nn.Sequential(first, *rest)
        width = wider
    parts |= OrderedDict(bn=nn.BatchNorm2d(width), relu=nn.ReLU())
    return classifier(parts, width, outputs)
