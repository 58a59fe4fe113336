"""What saving costs: how long training stands still for a checkpoint, as a share of the time between two."""

from __future__ import annotations

import tempfile
import weakref
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from benchmarks.harness import Bar, Benchmark, Sides
from benchmarks.rows import CLASSES, cifar_rows
from benchmarks.training import BATCH, make_trainer, model
from tutelage.engine.checkpoint import CheckpointFolder
from tutelage.engine.loop import Trainer
from tutelage.engine.sharded import save_together
from tutelage.engine.state import snapshot
from tutelage.models import build_model

STEPS = 2
"""Steps of one call."""
EPOCH = 45_000 // BATCH
"""Steps between the checkpoints of `recipes/image-classification/cifar10.yaml`, which saves once an epoch."""
OFTEN = 100
STALL = 5.0
"""Percent of an interval; more, and checkpoints would be written beside training instead."""


def recipe_trainer() -> Trainer:
    """As CIFAR-10's recipe has it: a student of 1.2 million parameters and its teacher."""
    return make_trainer(cifar_rows(), model("resnet8x4", 1), model("resnet32x4", 2))


def large_trainer() -> Trainer:
    """25 million parameters on small images without a teacher: much to save, little to compute."""
    student = build_model("timm:resnet50", outputs=CLASSES, input_shape=(3, 32, 32), seed=1).module
    return make_trainer(cifar_rows(), student, None)


def stall(device: torch.device, *, make: Callable[[], Trainer], interval: int) -> Sides:
    """A save against the steps between two; every save is flushed to the disk of the temporary folder."""
    trainer = make()
    trainer.run(1)  # momentum is there to be saved
    place = tempfile.TemporaryDirectory()
    weakref.finalize(trainer, place.cleanup)
    checkpoints = CheckpointFolder(Path(place.name), 2)
    written = checkpoints.save(snapshot(trainer))
    size = sum(path.stat().st_size for path in written.iterdir())

    def save() -> None:
        save_together(checkpoints, snapshot(trainer), trainer.runtime)

    return Sides(save, partial(trainer.run, STEPS), interval // STEPS, f"{size / 2**20:.0f} MiB a checkpoint")


BENCHMARKS = [
    Benchmark(
        f"saving.{name}",
        f"a checkpoint of {what}",
        f"{interval} steps of its training",
        Bar(STALL, "%"),
        partial(stall, make=make, interval=interval),
        slow=True,
    )
    for name, what, make, interval in [
        ("recipe", "CIFAR-10's recipe (ResNet-8x4, momentum), once an epoch", recipe_trainer, EPOCH),
        ("large", "25 million parameters (ResNet-50, momentum) on 32 × 32 images", large_trainer, OFTEN),
    ]
]
