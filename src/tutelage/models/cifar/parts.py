"""What the families share."""

from __future__ import annotations

from collections import OrderedDict

from torch import nn

from tutelage.models.names import ModelError

Parts = OrderedDict[str, nn.Module]


def conv(inputs: int, outputs: int, kernel: int, stride: int = 1, *, groups: int = 1) -> nn.Conv2d:
    """A convolution without bias that keeps the size, or divides it by ``stride``."""
    return nn.Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2, groups=groups, bias=False)


def depthwise(channels: int, stride: int) -> nn.Conv2d:
    """A 3 × 3 convolution of each channel alone."""
    return conv(channels, channels, 3, stride, groups=channels)


def classifier(trunk: Parts, width: int, outputs: int) -> nn.Sequential:
    """The trunk, global average pooling and a linear classifier; convolutions are drawn by He et al.'s rule."""
    ends: Parts = OrderedDict(
        pool=nn.AdaptiveAvgPool2d(1), flatten=nn.Flatten(), head=nn.Linear(width, outputs)
    )
    model = nn.Sequential(trunk | ends)
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    return model


def blocks_per_stage(name: str, depth: int, layers_around: int) -> int:
    """n of a depth of ``6n + layers_around``: two convolutions a block, three stages of n blocks.

    Raises:
        ModelError: there is no such n.
    """
    blocks, rest = divmod(depth - layers_around, 6)
    if rest or blocks < 1:
        depths = ", ".join(str(6 * n + layers_around) for n in (1, 2, 3))
        near = 6 * max(1, round((depth - layers_around) / 6)) + layers_around
        raise ModelError(
            f"cifar:{name}: a depth is 6n + {layers_around} ({depths}, …); got {depth}, the nearest is {near}"
        )
    return blocks
