"""int4 weights, two to a byte, in a ``.pt2`` that torch alone runs.

Weights are rounded by torchao, as `train.quantize: int4` rounds them. The graph unpacks them in each forward: the file
is small, and is not faster. torchao's own int4 tensors either keep a byte a weight or need kernels of one kind of GPU.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tutelage.engine.quantize import block, coverage, quantised
from tutelage.export.check import check, check_quantised
from tutelage.export.coverage import shares
from tutelage.export.deployed import deployed
from tutelage.export.errors import ExportError
from tutelage.export.program import capture, save
from tutelage.export.reading import load_program
from tutelage.export.subject import Subject

FILE = "model.int4.pt2"


def write(subject: Subject, folder: Path) -> dict[str, Any]:
    """Write and check ``model.int4.pt2``.

    Raises:
        ExportError: no layer can be rounded.
        CheckFailedError: too little is left of the student.
    """
    model = copy.deepcopy(subject.built.module)
    layers = pack(model)
    if not layers:
        raise ExportError(
            "int4 rounds linear layers and convolutions with 16 inputs or more, and this student has none; take int8"
        )
    small = deployed(subject.built, model)
    save(
        capture(small, subject.rows),
        folder / FILE,
        subject.described("int4 weights"),
    )
    run = load_program(folder / FILE)
    with torch.no_grad():
        check(FILE, subject, run, expected=small(subject.rows))
    return {
        "files": [FILE],
        "check": check_quantised(FILE, subject, run, "int4"),
        "quantised": shares(subject.model, subject.rows, [f"model.{name}" for name in layers]),
        "metrics": subject.metrics(run),
    }


def pack(model: nn.Module) -> tuple[str, ...]:
    """Put packed int4 numbers in the place of weights; gives the paths of the layers."""
    layers = coverage(model, "int4").layers
    for name in layers:
        module: Any = model.get_submodule(name)
        if isinstance(module, Packed):  # shared, and met under another name before
            continue
        size = block(module, "int4")
        weight = module._parameters.pop("weight")
        assert size is not None
        numbers, scale = quantised(weight.detach(), size, "int4")
        nibbles = (numbers.flatten() + 8).to(torch.uint8)
        if len(nibbles) % 2:
            nibbles = torch.cat([nibbles, nibbles.new_zeros(1)])
        module.register_buffer("packed", nibbles[::2] | nibbles[1::2] << 4)
        module.register_buffer("scale", scale.unsqueeze(-1) if weight.dim() == 2 else scale)
        module.packed_shape = tuple(weight.shape)
        kind = type(module)
        module.__class__ = type(f"Int4{kind.__name__}", (Packed, kind), {})
    return layers


class Packed(nn.Module):
    """Mixed into a layer's class: ``weight`` is made from ``packed`` and ``scale`` when it is read."""

    packed: Tensor
    scale: Tensor
    packed_shape: tuple[int, ...]

    @property
    def weight(self) -> Tensor:
        low, high = self.packed & 15, self.packed >> 4
        numbers = torch.stack([low, high], 1).flatten()[: _count(self.packed_shape)].float() - 8
        if len(self.packed_shape) == 2:  # scales [outputs, groups, 1]
            return (numbers.view(*self.scale.shape[:2], -1) * self.scale).view(self.packed_shape)
        return numbers.view(self.packed_shape) * self.scale


def _count(shape: tuple[int, ...]) -> int:
    return torch.Size(shape).numel()
