"""Small nets for small images and rows of numbers, as plain sequences: ``layer1, layer2, …, head``."""

from __future__ import annotations

import math
from collections import OrderedDict
from functools import partial

from torch import Tensor, nn

from tutelage.models.names import DIGITS, ModelError


def digits_net(
    name: str,
    outputs: int,
    input_shape: tuple[int, ...],
    *,
    head_bias: bool = True,
    confidence: float = 1.0,
) -> nn.Sequential:
    """Build ``mlp-64-16`` (hidden widths, ReLU) or ``cnn-4-8-16`` (channels).

    Each stage of a ``cnn`` is a 3 × 3 convolution, BatchNorm and ReLU; from the second on with stride 2. Global average
    pooling and a linear classifier follow.

    Args:
        confidence: factor of the logits in eval mode: above 1, a net that is surer of itself than it has learned to be.

    Raises:
        ModelError: a ``cnn`` for rows that are no images.
    """
    match = DIGITS.fullmatch(name)
    assert match is not None
    kind, widths = match[1], [int(width) for width in match[2][1:].split("-")]
    if kind == "mlp":
        parts = _mlp(widths, math.prod(input_shape))
    elif len(input_shape) == 3:
        parts = _cnn(widths, input_shape[0])
    else:
        raise ModelError(
            f"digits:{name} takes images [channels, height, width]; this data gives {list(input_shape)}"
        )
    head = nn.Linear if confidence == 1 else partial(Confident, confidence)
    parts["head"] = head(widths[-1], outputs, bias=head_bias)
    return nn.Sequential(parts)


class Confident(nn.Linear):
    """A classifier whose logits in eval mode are ``confidence`` times those that it is trained by."""

    def __init__(self, confidence: float, width: int, outputs: int, *, bias: bool = True) -> None:
        super().__init__(width, outputs, bias=bias)
        self.confidence = confidence

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 (torch's own name)
        logits = super().forward(input)
        return logits if self.training else self.confidence * logits


def _mlp(widths: list[int], inputs: int) -> OrderedDict[str, nn.Module]:
    parts: OrderedDict[str, nn.Module] = OrderedDict(flatten=nn.Flatten())
    for number, (narrow, wide) in enumerate(zip([inputs, *widths], widths, strict=False), start=1):
        parts[f"layer{number}"] = nn.Sequential(nn.Linear(narrow, wide), nn.ReLU())
    return parts


def _cnn(widths: list[int], channels: int) -> OrderedDict[str, nn.Module]:
    parts: OrderedDict[str, nn.Module] = OrderedDict()
    for number, (narrow, wide) in enumerate(zip([channels, *widths], widths, strict=False), start=1):
        parts[f"layer{number}"] = nn.Sequential(
            nn.Conv2d(narrow, wide, 3, stride=1 if number == 1 else 2, padding=1, bias=False),
            nn.BatchNorm2d(wide),
            nn.ReLU(),
        )
    parts |= OrderedDict(pool=nn.AdaptiveAvgPool2d(1), flatten=nn.Flatten())
    return parts
