"""Eigen-CAM maps of two teachers, side by side, as pictures for the report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from tutelage.data.pictures import png_uri
from tutelage.engine.loading import Source
from tutelage.engine.types import Table
from tutelage.engine.views import to_float
from tutelage.functional.cam import eigen_cam
from tutelage.teachers.local import LocalTeacher

SIDE = 64
"""Pixels that small pictures grow to at least."""


def cam_table(
    teachers: Mapping[str, LocalTeacher], source: Source, count: int, class_names: Sequence[str] | None
) -> Table | None:
    """Of ``count`` rows, evenly spread: the image, and each teacher's map of its last stage over it.

    None where rows are no images, or a teacher's last stage gives no map."""
    positions = torch.linspace(0, len(source) - 1, min(count, len(source))).round().long().tolist()
    device = next(next(iter(teachers.values())).held.model.parameters()).device
    batch = to_float(source.fetch(positions).to(device))
    inputs, stages = batch.inputs, {name: teacher.spec.stages()[-1:] for name, teacher in teachers.items()}
    shown = isinstance(inputs, Tensor) and inputs.dim() == 4 and inputs.shape[1] in (1, 3)
    if not shown or not all(_gives_map(teachers[name], stage) for name, stage in stages.items()):
        return None
    assert isinstance(inputs, Tensor)
    assert batch.target is not None
    maps = {
        name: eigen_cam(teacher.outputs(batch, stages[name]).feature()) for name, teacher in teachers.items()
    }
    rows = []
    for place, position in enumerate(positions):
        label = int(batch.target[place])
        name = class_names[label] if class_names else str(label)
        row = [position, name, png_uri(inputs[place], least_side=SIDE)]
        row += [png_uri(overlay(inputs[place], found[place]), least_side=SIDE) for found in maps.values()]
        rows.append(row)
    return Table(["row", "class", "image", *maps], rows)


def overlay(image: Tensor, heat: Tensor) -> Tensor:
    """The grey image ``[3, height, width]`` under a map ``[h, w]`` in [0, 1]: blue is 0, red is 1."""
    whole = F.interpolate(heat[None, None].to(image), size=image.shape[1:], mode="bilinear")[0, 0]
    colour = torch.stack([whole, torch.zeros_like(whole), 1 - whole])
    return 0.5 * image.mean(0).expand_as(colour) + 0.5 * colour


def _gives_map(teacher: LocalTeacher, stage: Sequence[str]) -> bool:
    return bool(stage) and len(teacher.spec.shape(stage[0])) == 3
