"""Views: random changes of a batch's images that are a pure function of (seed, view number, row index).

So batch size, order, workers, ranks and a resume do not change a pixel, and a store of teacher outputs holds the answer
to exactly what the student sees. To keep it bit for bit, pixels are moved by integer gathers and changed by one
elementwise operation after the other; nothing here sums floats over an axis, whose order may depend on the batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tutelage.engine.philox import Counter
from tutelage.engine.transfer import send
from tutelage.engine.types import Batch, Inputs
from tutelage.recipe.schema import DataConfig, ViewConfig

_NUMBERS = 8
"""Uniform numbers that a view may use for a row."""

Numbers = NDArray[np.float64]


def to_float(batch: Batch) -> Batch:
    """The batch with uint8 inputs as float32 in [0, 1] (divided by 255); inputs of any other dtype stay as they are."""
    teacher = batch.teacher_inputs
    return batch.replace(
        inputs=_as_float(batch.inputs), teacher_inputs=None if teacher is None else _as_float(teacher)
    )


def _as_float(inputs: Inputs) -> Inputs:
    if isinstance(inputs, dict):
        return {name: value / 255 if value.dtype == torch.uint8 else value for name, value in inputs.items()}
    return inputs / 255 if inputs.dtype == torch.uint8 else inputs


@dataclass(frozen=True)
class Draws:
    """The random numbers of a batch: ``numbers`` ``[views, rows, 8]`` in [0, 1), and where fields come from."""

    counter: Counter
    numbers: Numbers


class Views:
    """Changes images at random, in the order of ``configs``.

    Args:
        configs: the changes; none: inputs are only turned into float32.
        seed: key of all random numbers.
        distinct: views of a row that are drawn in turn; none: a new one every time.
    """

    def __init__(self, configs: Sequence[ViewConfig], seed: int, distinct: int | None = None) -> None:
        self.configs = tuple(configs)
        self.seed, self.distinct = seed, distinct

    @classmethod
    def of(cls, config: DataConfig, seed: int) -> Views:
        """The views of a recipe's ``data``; ``seed`` where it gives no ``view_seed``."""
        own = config.view_seed
        return cls(config.views, seed if own is None else own, config.distinct_views)

    def needed(self, epochs: int, count: int) -> int:
        """How many views of a row a run draws: ``count`` of them in each of so many epochs."""
        if not self.configs:
            return 1
        return min(epochs * count, self.distinct or epochs * count)

    def numbers(self, epoch: int, count: int) -> list[int]:
        """Numbers of the ``count`` views that an epoch shows of each row; without random changes all are view 0."""
        if not self.configs:
            return [0] * count
        return [n % (self.distinct or n + 1) for n in range(epoch * count, (epoch + 1) * count)]

    def draw(self, batch: Batch, view: Tensor) -> Draws | None:
        """All random numbers of the batch's rows under ``view``, ``[rows]`` int64; None where there is no view to draw.

        They are drawn on the CPU: ids that lie on an accelerator are waited for, so draw before the batch moves there.

        Raises:
            ValueError: there are views to draw, but the rows have no index.
        """
        if not self.configs:
            return None
        if batch.index is None:
            raise ValueError("data.views needs a row index in every batch; this source gives none")
        counter = Counter(_ids(batch.index), _ids(view), self.seed)
        numbers = counter.uniform(_NUMBERS * len(self.configs))
        return Draws(counter, numbers.reshape(len(batch), len(self.configs), _NUMBERS).swapaxes(0, 1))

    def __call__(self, batch: Batch, view: Tensor, draws: Draws | None = None) -> Batch:
        """The batch as float32 with ``view`` drawn, on its own device; ``batch.view`` is set.

        Args:
            batch: images ``[rows, channels, height, width]``, uint8 or float in [0, 1]; ``noise`` takes any shape.
            view: number of the view of each row, ``[rows]`` int64.
            draws: what ``draw`` gave for these rows; left out: drawn now.

        Raises:
            ValueError: rows without an index, inputs that are no images, or a crop's padding that is too large.
        """
        draws = draws or self.draw(batch, view)
        batch = to_float(batch).replace(view=send(view, batch.device))
        if draws is None:
            return batch
        if isinstance(batch.inputs, dict):
            raise ValueError(
                f"data.views changes images; these inputs are named tensors ({', '.join(batch.inputs)})"
            )
        inputs = batch.inputs
        for position, config in enumerate(self.configs):
            if config.name != "noise" and inputs.dim() != 4:
                raise ValueError(
                    f"the view {config.name!r} needs images [rows, channels, height, width]; "
                    f"inputs have shape {list(inputs.shape)}; leave it out of data.views"
                )
            change = _Change(config, draws.numbers[position], draws.counter, stream=position + 1)
            inputs = _VIEWS[config.name](inputs, change)
        return batch.replace(inputs=inputs)


@dataclass(frozen=True)
class _Change:
    """One view of a batch: its options and the numbers ``[rows, 8]`` that it may use. Stream 0 holds the numbers of all
    views, so a view's fields come from the stream behind its position."""

    config: ViewConfig
    numbers: Numbers
    counter: Counter
    stream: int

    def field(self, kind: str, like: Tensor) -> Tensor:
        """Random numbers in the shape of ``like``: ``normal`` or ``uniform``."""
        counter = Counter(self.counter.index, self.counter.view, self.counter.seed, stream=self.stream)
        draw = counter.normal_field if kind == "normal" else counter.uniform_field
        return send(torch.from_numpy(draw(tuple(like.shape[1:]))), like.device)

    def box(self, height: int, width: int, log_ratio: float) -> tuple[Numbers, Numbers, Numbers, Numbers]:
        """Top, left, height and width of a random rectangle inside the image: its area is a share in ``scale``, its
        ratio of width to height log-uniform within ``±log_ratio`` of 1 and cut where it would not fit."""
        low, high = self.config.scale
        area = (low + (high - low) * self.numbers[:, 0]) * height * width
        ratio = np.exp(log_ratio * (2 * self.numbers[:, 1] - 1))
        box_height = np.minimum(np.sqrt(area / ratio), height)
        box_width = np.minimum(np.sqrt(area * ratio), width)
        top, left = self.numbers[:, 2] * (height - box_height), self.numbers[:, 3] * (width - box_width)
        return top, left, box_height, box_width


def _crop(images: Tensor, change: _Change) -> Tensor:
    """Shift by up to ``padding`` pixels; what comes in is the image reflected at its border."""
    height, width = images.shape[2:]
    padding = change.config.padding
    if padding >= min(height, width):
        raise ValueError(
            f"the view 'crop' reflects {padding} pixels of a border, but images are {height}×{width}; "
            f"set its padding to at most {min(height, width) - 1}"
        )
    shifts = np.floor(change.numbers[:, :2] * (2 * padding + 1)).astype(np.int64) - padding
    rows = _reflect(np.arange(height) + shifts[:, :1], height)
    columns = _reflect(np.arange(width) + shifts[:, 1:], width)
    return _take(images, rows, columns)


def _flip(images: Tensor, change: _Change) -> Tensor:
    """Mirror left and right."""
    width = images.shape[3]
    mirrored = change.numbers[:, :1] < change.config.probability
    columns = np.where(mirrored, np.arange(width)[::-1], np.arange(width))
    return images.gather(3, _send(columns, images)[:, None, None].expand(images.shape))


def _noise(images: Tensor, change: _Change) -> Tensor:
    """Add Gaussian noise. Values may leave [0, 1]: cut off, it would shift the mean of dark and bright pixels."""
    return images + change.field("normal", images) * change.config.strength


def _resized_crop(images: Tensor, change: _Change) -> Tensor:
    """A random rectangle (Szegedy et al. 2015: ratio in [3/4, 4/3]), resampled bilinearly to the image's own size."""
    height, width = images.shape[2:]
    top, left, box_height, box_width = change.box(height, width, math.log(4 / 3))
    above, below, down = _between(top, box_height, height)
    before, behind, right = _between(left, box_width, width)
    down_weight, right_weight = _send(down, images)[:, None, :, None], _send(right, images)[:, None, None, :]
    upper = _mix(_take(images, above, before), _take(images, above, behind), right_weight)
    lower = _mix(_take(images, below, before), _take(images, below, behind), right_weight)
    return _mix(upper, lower, down_weight)


def _color_jitter(images: Tensor, change: _Change) -> Tensor:
    """Scale brightness, contrast and saturation, in this order, each by a factor in ``1 ± strength``; cut to [0, 1]
    after each. Images that are not RGB have no saturation."""
    factors = _send(1 + change.config.strength * (2 * change.numbers[:, :3] - 1), images)[
        :, :, None, None, None
    ]
    images = (images * factors[:, 0]).clamp(0, 1)
    images = _mix(_mean(_grey(images)), images, factors[:, 1]).clamp(0, 1)
    if images.shape[1] != 3:
        return images
    return _mix(_grey(images), images, factors[:, 2]).clamp(0, 1)


def _erase(images: Tensor, change: _Change) -> Tensor:
    """Put uniform random pixels into a random rectangle (Zhong et al. 2020: ratio in [0.3, 1/0.3])."""
    height, width = images.shape[2:]
    top, left, box_height, box_width = change.box(height, width, -math.log(0.3))
    erased = change.numbers[:, 4] < change.config.probability
    rows = _inside(top, box_height, height) & erased[:, None]
    columns = _inside(left, box_width, width)
    mask = _send(rows, images)[:, None, :, None] & _send(columns, images)[:, None, None, :]
    return torch.where(mask, change.field("uniform", images), images)


_VIEWS: dict[str, Callable[[Tensor, _Change], Tensor]] = {
    "crop": _crop,
    "flip": _flip,
    "noise": _noise,
    "resized_crop": _resized_crop,
    "color_jitter": _color_jitter,
    "erase": _erase,
}


def _ids(tensor: Tensor) -> NDArray[np.int64]:
    ids: NDArray[np.int64] = tensor.detach().to("cpu", torch.int64).contiguous().numpy()
    return ids


def _send(array: NDArray[Any], images: Tensor) -> Tensor:
    """The array beside the images, floats as their dtype."""
    tensor = torch.from_numpy(array)
    tensor = tensor.to(images.dtype) if tensor.is_floating_point() else tensor
    return send(tensor, images.device)


def _take(images: Tensor, rows: NDArray[np.int64], columns: NDArray[np.int64]) -> Tensor:
    """Pixels at ``rows`` × ``columns`` (``[batch, height]`` and ``[batch, width]``) of each image."""
    batch, channels, height, width = images.shape
    pixels = _send((rows[:, :, None] * width + columns[:, None, :]).reshape(batch, 1, -1), images)
    taken = images.reshape(batch, channels, height * width).gather(2, pixels.expand(batch, channels, -1))
    return taken.view(batch, channels, rows.shape[1], columns.shape[1])


def _reflect(positions: NDArray[np.int64], size: int) -> NDArray[np.int64]:
    mirrored = np.abs(positions)
    return np.where(mirrored >= size, 2 * (size - 1) - mirrored, mirrored)


def _between(
    start: Numbers, length: Numbers, size: int
) -> tuple[NDArray[np.int64], NDArray[np.int64], Numbers]:
    """For each of ``size`` pixel centres of a stretch: the two pixels beside it, and how far it is from the first."""
    centres = start[:, None] + (np.arange(size) + 0.5) * length[:, None] / size - 0.5
    centres = np.clip(centres, 0, size - 1)
    first = np.floor(centres).astype(np.int64)
    return first, np.minimum(first + 1, size - 1), centres - first


def _inside(start: Numbers, length: Numbers, size: int) -> NDArray[np.bool_]:
    centres = np.arange(size) + 0.5
    return (centres >= start[:, None]) & (centres < (start + length)[:, None])


def _mix(first: Tensor, second: Tensor, weight: Tensor) -> Tensor:
    return first * (1 - weight) + second * weight


def _grey(images: Tensor) -> Tensor:
    """Luma ``[rows, 1, height, width]`` of ITU-R BT.601."""
    if images.shape[1] != 3:
        return images[:, :1]
    red, green, blue = images[:, :1], images[:, 1:2], images[:, 2:]
    return red * 0.299 + green * 0.587 + blue * 0.114


def _mean(grey: Tensor) -> Tensor:
    """Mean of each image. Summed as integers: a float sum's rounding depends on how the batch is cut."""
    total = (grey * 2**20).to(torch.int64).sum((1, 2, 3), keepdim=True)
    return total.to(grey.dtype) / (2**20 * grey[0].numel())
