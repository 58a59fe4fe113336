"""The whole recipe, held against the least that a step can cost: both models' passes over a batch that lies ready."""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F

from benchmarks.harness import Bar, Benchmark, Sides
from benchmarks.rows import MEAN, STD, cifar_rows
from benchmarks.training import BATCH, make_trainer, model
from tutelage.recipe.schema import ViewConfig

VIEWS = (ViewConfig(name="crop"), ViewConfig(name="flip", probability=0.5))


class Passes:
    """Forward and backward of the student, forward of the teacher: nothing is fetched, changed or updated, and the loss
    is the cheapest there is.

    Args:
        fast: bf16 and compiled models, as one trains on a GPU.
    """

    def __init__(self, device: torch.device, *, fast: bool) -> None:
        self.student = model("resnet8x4", seed=0).to(device).train()
        self.teacher = model("resnet32x4", seed=1).to(device).eval()
        self.device, self.fast = device, fast
        if fast:
            self.student.compile()
            self.teacher.compile()
        rows = cifar_rows().inputs[:BATCH].to(device) / 255
        mean, std = (torch.tensor(values, device=device).view(1, -1, 1, 1) for values in (MEAN, STD))
        self.inputs = (rows - mean) / std

    def run(self, steps: int) -> None:
        for _ in range(steps):
            self.student.zero_grad()
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.fast):
                with torch.no_grad():
                    wanted = self.teacher(self.inputs)
                loss = F.mse_loss(self.student(self.inputs), wanted)
            loss.backward()  # type: ignore[no-untyped-call]


def against_the_limit(device: torch.device, *, steps: int = 1) -> Sides:
    fast = device.type == "cuda"
    images = cifar_rows()
    trainer = make_trainer(images, model("resnet8x4", seed=0), model("resnet32x4", seed=1), VIEWS, fast=fast)
    passes = Passes(device, fast=fast)
    trainer.run(2)
    passes.run(2)
    note = f"{images.name}, {'bf16, compiled' if fast else 'fp32'}"
    return Sides(partial(trainer.run, steps), partial(passes.run, steps), count=steps, note=note)


BENCHMARKS = [
    Benchmark(
        "recipe.limit",
        "`Trainer` on the recipe cifar10 (resnet32x4 teaches resnet8x4 through kd, crop and flip, batch 64, SGD)",
        "forward and backward of the student and forward of the teacher alone, on a batch that lies ready",
        Bar(1 / 0.9),
        against_the_limit,
    ),
]
