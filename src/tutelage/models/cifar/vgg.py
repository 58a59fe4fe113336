"""Plain convolutional nets, from the description in Simonyan and Zisserman, arXiv 1409.1556, table 1, with BatchNorm.

Five stages of 3 × 3 convolutions. For small images one linear layer is the classifier, and only the first three stages
are followed by max pooling: the last two work at 4 pixels. ``vgg8`` has one convolution a stage.
"""

from __future__ import annotations

from collections import OrderedDict

from torch import nn

from tutelage.models.cifar.parts import Parts, classifier

WIDTHS = (64, 128, 256, 512, 512)
CONVOLUTIONS = {8: (1, 1, 1, 1, 1), 13: (2, 2, 2, 2, 2), 16: (2, 2, 3, 3, 3), 19: (2, 2, 4, 4, 4)}
"""Convolutions of each stage, by depth."""
POOLED = (2, 3, 4)
"""Stages that begin with max pooling."""


def vgg(depth: int, outputs: int, channels: int) -> nn.Sequential:
    """``layer1 … layer5, pool, flatten, head``; a stage gives its last activation, before it is pooled."""
    parts: Parts = OrderedDict()
    width = channels
    for number, (wider, count) in enumerate(zip(WIDTHS, CONVOLUTIONS[depth], strict=True), start=1):
        stage: Parts = OrderedDict(maxpool=nn.MaxPool2d(2)) if number in POOLED else OrderedDict()
        for position in range(1, count + 1):
            stage |= {
                # With a bias, which BatchNorm makes idle: so have the published nets, and their parameter counts.
                f"conv{position}": nn.Conv2d(width, wider, 3, padding=1),
                f"bn{position}": nn.BatchNorm2d(wider),
                f"relu{position}": nn.ReLU(),
            }
            width = wider
        parts[f"layer{number}"] = nn.Sequential(stage)
    return classifier(parts, width, outputs)
