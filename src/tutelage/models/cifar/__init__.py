"""The nets of the CIFAR distillation literature, for 32 × 32 images; whole numbers in a name are read as they stand.

timm and torchvision have none of them, and pytorchcv's CIFAR nets lack the ``x4`` ones, the narrow wide nets, ``vgg8``,
and the light nets: so they are written here, from their papers' descriptions in the sizes that Tian et al. (arXiv
1910.10699) compared methods on.
"""

from __future__ import annotations

from torch import nn

from tutelage.models.cifar.mobilenet import mobilenet_v2
from tutelage.models.cifar.resnet import resnet
from tutelage.models.cifar.shufflenet import shufflenet_v1, shufflenet_v2
from tutelage.models.cifar.vgg import vgg
from tutelage.models.cifar.wrn import wide_resnet
from tutelage.models.names import CIFAR_NAME

__all__ = ["cifar_net"]


def cifar_net(name: str, outputs: int, channels: int = 3) -> nn.Sequential:
    """The net called ``name`` with fresh weights: a stem, ``layer1, layer2, …``, ``pool, flatten, head``.

    All are plain sequences, so that they can be split. No activation works in place, so that its input can be tapped:
    ``layer3.-1.relu2:in``.

    Raises:
        ModelError: a depth that the family does not have.
    """
    match = CIFAR_NAME.fullmatch(name)
    assert match is not None
    numbers = {key: int(value) for key, value in match.groupdict().items() if value is not None}
    if "resnet" in numbers:
        return resnet(numbers["resnet"], outputs, channels, wide=name.endswith("x4"))
    if "wrn" in numbers:
        return wide_resnet(numbers["wrn"], numbers["factor"], outputs, channels)
    if "vgg" in numbers:
        return vgg(numbers["vgg"], outputs, channels)
    light = {"mobilenetv2": mobilenet_v2, "shufflenetv1": shufflenet_v1, "shufflenetv2": shufflenet_v2}
    return light[name](outputs, channels)
