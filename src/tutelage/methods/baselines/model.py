"""Networks that only the baselines need."""

from __future__ import annotations

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
        try:
            hint = F.relu(self.norm(projected))
        except ValueError as error:
            raise ValueError(
                f"the hint regressor's BatchNorm cannot train on {len(features)} row(s) of a "
                f"{projected.shape[2]}x{projected.shape[3]} map; use at least 2 rows a micro-batch or tap a larger map"
            ) from error
        return hint.flatten(1) if len(self.teacher_shape) == 1 else hint


def _as_map(shape: Shape) -> Shape:
    if len(shape) == 1:
        return (*shape, 1, 1)
    if len(shape) == 3:
        return tuple(shape)
    raise ValueError(
        f"a hint needs a map (channels, height, width) or a vector (features,); this tap gives {tuple(shape)}; "
        "`tutelage taps MODEL` lists others"
    )
