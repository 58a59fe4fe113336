"""Networks that only the baselines need."""

from __future__ import annotations

import math
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Shape = tuple[int, ...]


class HintRegressor(nn.Module):
    """Maps a student's feature to the shape of the teacher's: convolution, BatchNorm, ReLU.

    A student's map of twice the teacher's size is halved (3x3, stride 2), one of half its size doubled (transposed 4x4,
    stride 2), any other that is at least as large cut down by one kernel of the difference in size plus one. A vector
    counts as a 1x1 map.

    Args:
        student_shape: ``(channels, height, width)`` or ``(features,)``, without the row axis.
        teacher_shape: likewise.

    Raises:
        ValueError: a shape is no map or vector, or the student's map is smaller than the teacher's and not half of it.

    Source: Romero et al. (arXiv 1412.6550), section 2.2, in the form of mdistiller's regressor.
    """

    def __init__(self, student_shape: Shape, teacher_shape: Shape) -> None:
        super().__init__()
        (width_in, *size_in), (width_out, *size_out) = _as_map(student_shape), _as_map(teacher_shape)
        self.student_shape, self.teacher_shape = tuple(student_shape), tuple(teacher_shape)
        self.projection: nn.Conv2d | nn.ConvTranspose2d
        if size_in == [2 * side for side in size_out]:
            self.projection = nn.Conv2d(width_in, width_out, kernel_size=3, stride=2, padding=1)
        elif size_out == [2 * side for side in size_in]:
            self.projection = nn.ConvTranspose2d(width_in, width_out, kernel_size=4, stride=2, padding=1)
        elif size_in[0] >= size_out[0] and size_in[1] >= size_out[1]:
            kernel = (1 + size_in[0] - size_out[0], 1 + size_in[1] - size_out[1])
            self.projection = nn.Conv2d(width_in, width_out, kernel_size=kernel)
        else:
            raise ValueError(
                f"the student's map {self.student_shape} is smaller than the teacher's {self.teacher_shape} and not "
                "half of it; tap an earlier stage of the student or a later one of the teacher"
            )
        self.norm = nn.BatchNorm2d(width_out)

    def forward(self, features: Tensor) -> Tensor:
        """``[batch, *student_shape]`` to ``[batch, *teacher_shape]``.

        Raises:
            ValueError: BatchNorm has one value a channel to train on: one row, and a 1x1 map.
        """
        projected = self.projection(features[..., None, None] if features.dim() == 2 else features)
        hint = F.relu(_normalised(self.norm, projected, "hint regressor"))
        return hint.flatten(1) if len(self.teacher_shape) == 1 else hint


class VIDRegressor(nn.Module):
    """Predicts a teacher's map as a Gaussian: three 1x1 convolutions without bias, ReLU between, give the mean.

    Attributes:
        log_scale: one a teacher channel; the variance is ``softplus(log_scale) + eps``. It is learned.

    Args:
        student_width, teacher_width: channels.
        variance: of every channel at the start; above ``eps``.
        eps: least variance.

    Raises:
        ValueError: ``variance`` is not above ``eps``.

    Source: Ahn et al. (arXiv 1904.05835), equation 5, and mdistiller's regressor.
    """

    def __init__(
        self, student_width: int, teacher_width: int, variance: float = 5.0, eps: float = 1e-5
    ) -> None:
        super().__init__()
        if variance <= eps:
            raise ValueError(f"the variance at the start must be above eps={eps}; got {variance}")
        widths = (student_width, teacher_width, teacher_width, teacher_width)
        self.layers = nn.ModuleList(nn.Conv2d(*pair, 1, bias=False) for pair in pairwise(widths))
        self.log_scale = nn.Parameter(torch.full((teacher_width,), _inverse_softplus(variance - eps)))

    def forward(self, features: Tensor) -> Tensor:
        """``[batch, student_width, height, width]`` to ``[batch, teacher_width, height, width]``."""
        first, *rest = self.layers
        mean: Tensor = first(features)
        for layer in rest:
            mean = layer(F.relu(mean))
        return mean


class AttentionFusion(nn.Module):
    """One stage of the review: fuses a student's map with what the deeper stages handed down.

    The map is brought to ``mid`` channels by a 1x1 convolution and BatchNorm; with ``fuse`` the deeper residual is
    enlarged to it (nearest), and both are added under two attention maps that a 1x1 convolution and a sigmoid make of
    them. The sum is what is handed on; a 3x3 convolution and BatchNorm of it are compared with the teacher.

    Args:
        width_in, mid, width_out: channels of the student's map, of the residual, and of the teacher's map.
        fuse: whether there is a deeper stage.

    Source: Chen et al. (arXiv 2104.09044), section 3.3, and the authors' code.
    """

    def __init__(self, width_in: int, mid: int, width_out: int, fuse: bool) -> None:
        super().__init__()
        self.reduce = nn.Conv2d(width_in, mid, 1, bias=False)
        self.reduce_norm = nn.BatchNorm2d(mid)
        self.expand = nn.Conv2d(mid, width_out, 3, padding=1, bias=False)
        self.expand_norm = nn.BatchNorm2d(width_out)
        self.attention = nn.Conv2d(2 * mid, 2, 1) if fuse else None
        for layer in (self.reduce, self.expand):
            nn.init.kaiming_uniform_(layer.weight, a=1)

    def forward(
        self, features: Tensor, residual: Tensor | None, size: tuple[int, int]
    ) -> tuple[Tensor, Tensor]:
        """What is compared with the teacher, and the residual for the next shallower stage.

        Args:
            features: ``[batch, width_in, height, width]``.
            residual: ``[batch, mid, ...]`` of the deeper stage, where ``fuse`` is set; else None.
            size: height and width of the teacher's map, and so of what is returned.

        Raises:
            ValueError: a residual is missing or not expected; BatchNorm has one value a channel to train on.
        """
        if (residual is None) != (self.attention is None):
            raise ValueError(
                "this fusion was built to take a residual; got none"
                if residual is None
                else "this fusion was built without a deeper stage; it takes no residual"
            )
        fused = _normalised(self.reduce_norm, self.reduce(features), "fusion")
        if residual is not None:
            fused = self._fuse(fused, residual)
        fused = _resized(fused, size)
        return _normalised(self.expand_norm, self.expand(fused), "fusion"), fused

    def _fuse(self, features: Tensor, residual: Tensor) -> Tensor:
        assert self.attention is not None
        # A 1x1 convolution of both, laid side by side, is the sum of one of each; of the residual it may come before
        # the enlargement. So neither the joined tensor nor its gradient is ever made.
        own, handed = self.attention.weight.chunk(2, dim=1)
        size = (features.shape[2], features.shape[3])
        attention = F.conv2d(features, own, self.attention.bias) + _resized(F.conv2d(residual, handed), size)
        weights = attention.sigmoid()
        return features * weights[:, :1] + _resized(residual, size) * weights[:, 1:]


def _resized(features: Tensor, size: tuple[int, int]) -> Tensor:
    return features if tuple(features.shape[2:]) == size else F.interpolate(features, size, mode="nearest")


def _inverse_softplus(value: float) -> float:
    return value + math.log(-math.expm1(-value))


def _normalised(norm: nn.BatchNorm2d, features: Tensor, what: str) -> Tensor:
    """Apply BatchNorm.

    Raises:
        ValueError: there is one value a channel to train on.
    """
    try:
        normalised: Tensor = norm(features)
    except ValueError as error:
        height, width = features.shape[2:]
        raise ValueError(
            f"the {what}'s BatchNorm cannot train on {len(features)} row(s) of a {height}x{width} map; "
            "use at least 2 rows a micro-batch or tap a larger map"
        ) from error
    return normalised


def _as_map(shape: Shape) -> Shape:
    if len(shape) == 1:
        return (*shape, 1, 1)
    if len(shape) == 3:
        return tuple(shape)
    raise ValueError(
        f"a hint needs a map (channels, height, width) or a vector (features,); this tap gives {tuple(shape)}; "
        "`tutelage taps MODEL` lists others"
    )
