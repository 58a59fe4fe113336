"""Rows that training is timed on: CIFAR-10 where it is at hand, else random ones of its shape."""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from tutelage.data import open_data
from tutelage.recipe.schema import DataConfig

CLASSES = 10
COUNT = 2048
MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)


class Images(NamedTuple):
    """uint8 images ``[rows, 3, 32, 32]``, their labels ``[rows]``, and what they are."""

    inputs: Tensor
    target: Tensor
    name: str


def cifar_rows() -> Images:
    """The same rows in every benchmark. Nothing is downloaded: CIFAR-10 is looked for in the folder ``TUTELAGE_DATA``,
    else in ``../shared/data``."""
    root = Path(__file__).resolve().parent.parent.parent / "shared" / "data"
    folder = Path(os.environ.get("TUTELAGE_DATA", root)) / "cifar10"
    if folder.is_dir():
        config = DataConfig(path=str(folder), image="img", target="label", limit=COUNT)
        batch = open_data(config, "classification").train.fetch(range(COUNT))
        assert isinstance(batch.inputs, Tensor)
        assert batch.target is not None
        return Images(batch.inputs, batch.target, "CIFAR-10")
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randint(256, (COUNT, 3, 32, 32), generator=generator, dtype=torch.uint8)
    return Images(inputs, torch.randint(CLASSES, (COUNT,), generator=generator), "random CIFAR-10 shape")
