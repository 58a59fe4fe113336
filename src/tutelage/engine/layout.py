"""How a tapped feature lies: a vector, a map with channels first or last, or tokens of a grid behind class tokens."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn

from tutelage.engine.patterns import INPUT
from tutelage.engine.spec import ModelSpec
from tutelage.engine.tracing import Shape

Kind = Literal["vector", "channels_first", "channels_last", "tokens"]
Grid = tuple[int, int]


@dataclass(frozen=True)
class Layout:
    """Where channels and positions of a feature are.

    Attributes:
        kind: ``vector`` ``[rows, channels]``; ``channels_first`` ``[rows, channels, height, width]``; ``channels_last``
            ``[rows, height, width, channels]``; ``tokens`` ``[rows, prefix + height * width, channels]``, row by row.
        channels: width of a position.
        grid: height and width; of a vector 1 and 1.
        prefix: class, distillation and register tokens that come first.
    """

    kind: Kind
    channels: int
    grid: Grid
    prefix: int = 0

    @property
    def shape(self) -> Shape:
        """Of what `to_map` gives, the row axis left out."""
        return (self.channels,) if self.kind == "vector" else (self.channels, *self.grid)

    def to_map(self, features: Tensor) -> Tensor:
        """``[rows, channels, height, width]``, tokens before the grid left out; a vector stays one."""
        if self.kind == "tokens":
            patches = features[:, self.prefix :].transpose(1, 2)
            return patches.reshape(*patches.shape[:2], *self.grid)
        return features.movedim(-1, 1) if self.kind == "channels_last" else features

    def to_tokens(self, features: Tensor) -> Tensor:
        """``[rows, prefix + height * width, channels]``; a vector is one token."""
        if self.kind == "tokens":
            return features
        if self.kind == "vector":
            return features[:, None]
        return features.flatten(1, 2) if self.kind == "channels_last" else features.flatten(2).transpose(1, 2)


def layout_of(spec: ModelSpec, path: str) -> Layout:
    """The layout of a tap, from its probed shape and from what runs before it.

    The grid of tokens is that of the convolution before them with the most positions that they have room for (the patch
    embedding, as a rule), and what is over comes first; where no convolution tells, a square one behind the model's
    ``num_prefix_tokens``, none, or one. A map whose first two sides alone agree has its channels last; where the shape
    does not tell, timm's ``output_fmt`` does.

    Raises:
        TapError: the tap gives no tensor with a row axis.
        ValueError: no such layout.
    """
    shape = spec.shape(path)
    if len(shape) == 1:
        return Layout("vector", shape[0], (1, 1))
    if len(shape) == 2:
        grid, prefix = _token_grid(spec, path, shape[0])
        return Layout("tokens", shape[1], grid, prefix)
    if len(shape) == 3 and _channels_last(shape, spec.module):
        return Layout("channels_last", shape[2], (shape[0], shape[1]))
    if len(shape) == 3:
        return Layout("channels_first", shape[0], (shape[1], shape[2]))
    raise ValueError(
        f"{spec.name}: tap {path!r} gives shape {shape}, neither a vector nor a map nor tokens; "
        "`tutelage taps MODEL` lists others"
    )


def _channels_last(shape: Shape, module: nn.Module | None) -> bool:
    first_two, last_two = shape[0] == shape[1], shape[1] == shape[2]
    if first_two != last_two:
        return first_two
    return str(getattr(module, "output_fmt", "")).endswith("NHWC")


def _token_grid(spec: ModelSpec, path: str, tokens: int) -> tuple[Grid, int]:
    fitting = [grid for grid in _convolved(spec, path) if math.prod(grid) <= tokens < 2 * math.prod(grid)]
    if fitting:
        grid = max(fitting, key=math.prod)
        return grid, tokens - math.prod(grid)
    for prefix in (getattr(spec.module, "num_prefix_tokens", 0), 0, 1):
        side = math.isqrt(max(tokens - prefix, 0))
        if side and side**2 == tokens - prefix:
            return (side, side), prefix
    raise ValueError(
        f"{spec.name}: the {tokens} tokens of {path!r} fit no grid, with or without class tokens; tap a map instead"
    )


def _convolved(spec: ModelSpec, path: str) -> list[Grid]:
    """Grids of the convolutions that end before a tap."""
    found: list[Grid] = []
    for info in spec.infos:
        if info.path == path.removesuffix(INPUT):
            break
        if "Conv2d" in info.kind and info.shape is not None and len(info.shape) == 3:
            found.append((info.shape[1], info.shape[2]))
    return found
