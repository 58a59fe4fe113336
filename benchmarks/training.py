"""The trainer, and the hand-written loop that it is held against."""

from __future__ import annotations

import copy
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.harness import Bar, Benchmark, Sides, UnequalWorkError
from benchmarks.rows import CLASSES, MEAN, STD, Images, cifar_rows
from tutelage import catalogue
from tutelage.data.source import TensorSource
from tutelage.engine.loop import Trainer
from tutelage.engine.runtime import Runtime
from tutelage.engine.views import Views
from tutelage.models import build_model
from tutelage.recipe.schema import OptimizerConfig, ScheduleConfig, TrainConfig, ViewConfig
from tutelage.tasks import build_task
from tutelage.teachers.local import LocalTeacher

BATCH = 64
LR, MOMENTUM, DECAY = 0.05, 0.9, 5e-4
LABEL_WEIGHT, KD_WEIGHT, TEMPERATURE = 0.1, 0.9, 4.0
_ENDLESS = 10**9


class TinyNet(nn.Module):
    """As little work as a student can be: what is left of a step's time is the loop's own."""

    def __init__(self) -> None:
        super().__init__()
        self.pool, self.flatten, self.head = nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.head(self.flatten(self.pool(images)))
        return logits


def model(name: str, seed: int) -> nn.Module:
    """A fresh net of the zoo, or `TinyNet`; the same weights for the same seed."""
    net = TinyNet if name == "tiny" else f"cifar:{name}"
    return build_model(net, outputs=CLASSES, input_shape=(3, 32, 32), seed=seed).module


def make_trainer(
    images: Images,
    student: nn.Module,
    teacher: nn.Module | None,
    views: tuple[ViewConfig, ...] = (),
    *,
    fast: bool = False,
) -> Trainer:
    """Our side: no evaluation, no checkpoints. ``fast``: bf16 and compiled models."""
    runtime = Runtime(precision="bf16" if fast else "fp32")
    name = "kd" if teacher else "none"
    method = catalogue.load(name)
    config = TrainConfig(
        steps=_ENDLESS,
        batch_size=BATCH,
        optimizer=OptimizerConfig(name="sgd", lr=LR, momentum=MOMENTUM, weight_decay=DECAY),
        schedule=ScheduleConfig(name="constant"),
        precision=runtime.precision,
        compile=fast,
    )
    teachers = {}
    if teacher is not None:
        held = LocalTeacher("teacher", teacher, images.inputs[:2] / 255, mean=MEAN, std=STD).freeze()
        held.held.to(runtime.device)
        teachers["teacher"] = held
    return Trainer(
        runtime,
        student,
        method(method.Config(name=name)),
        build_task("classification", CLASSES),
        TensorSource(images.inputs, images.target),
        config,
        teachers=teachers,
        views=Views(views, config.seed),
        mean=MEAN,
        std=STD,
    )


class BareLoop:
    """What one writes by hand, rows in memory: no checks, no records, no hooks.

    Args:
        orders: a trainer whose sampler says which rows come when, so that both do the same steps.
    """

    def __init__(
        self,
        images: Images,
        student: nn.Module,
        teacher: nn.Module | None,
        orders: Trainer,
        device: torch.device,
    ) -> None:
        self.images, self.orders, self.device = images, orders.sampler, device
        self.student = student.to(device).train()
        self.teacher = teacher.to(device).eval() if teacher else None
        self.mean, self.std = (
            torch.tensor(values, device=device).view(1, -1, 1, 1) for values in (MEAN, STD)
        )
        self.optimizer = torch.optim.SGD(student.parameters(), lr=LR, momentum=MOMENTUM, weight_decay=DECAY)
        self.step = 0

    def run(self, steps: int) -> None:
        for _ in range(steps):
            epoch, position = divmod(self.step, len(self.images.inputs) // BATCH)
            if position == 0:
                self.order = self.orders.order(epoch)
            rows = self.order[position * BATCH : (position + 1) * BATCH]
            inputs = self.images.inputs[rows].to(self.device, non_blocking=True) / 255
            inputs = (inputs - self.mean) / self.std
            loss = self.loss(inputs, self.images.target[rows].to(self.device, non_blocking=True))
            self.optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            self.optimizer.step()
            self.step += 1

    def loss(self, inputs: Tensor, target: Tensor) -> Tensor:
        logits = self.student(inputs)
        label = F.cross_entropy(logits, target)
        if self.teacher is None:
            return label
        with torch.no_grad():
            wanted = F.softmax(self.teacher(inputs) / TEMPERATURE, dim=1)
        divergence = F.kl_div(F.log_softmax(logits / TEMPERATURE, dim=1), wanted, reduction="batchmean")
        return LABEL_WEIGHT * label + KD_WEIGHT * TEMPERATURE**2 * divergence


def same_training(ours: Trainer, theirs: nn.Module) -> None:
    """Both have trained to the same weights.

    Raises:
        UnequalWorkError: a parameter differs.
    """
    others = dict(theirs.named_parameters())
    for name, parameter in ours.student.model.named_parameters():
        if not torch.allclose(parameter, others[name], rtol=1e-3, atol=1e-5):
            raise UnequalWorkError(f"after {ours.step} steps {name} differs between the two loops")


def against_bare_loop(
    device: torch.device, *, student: str, teacher: str | None = None, steps: int = 1
) -> Sides:
    images = cifar_rows()
    ours = model(student, seed=0)
    taught = model(teacher, seed=1) if teacher else None
    theirs, their_teacher = copy.deepcopy(ours), copy.deepcopy(taught)
    trainer = make_trainer(images, ours, taught)
    loop = BareLoop(images, theirs, their_teacher, trainer, device)
    trainer.run(2)
    loop.run(2)
    same_training(trainer, theirs)
    return Sides(partial(trainer.run, steps), partial(loop.run, steps), count=steps, note=images.name)


_PEER = "the same steps in a bare PyTorch loop"
_WORK = "batch 64, SGD, rows in memory, no views, no evaluation, no checkpoints"

BENCHMARKS = [
    Benchmark(
        "trainer.none",
        f"`Trainer` on resnet8x4, labels alone; {_WORK}",
        _PEER,
        Bar(1.03),
        partial(against_bare_loop, student="resnet8x4"),
    ),
    Benchmark(
        "trainer.kd",
        f"`Trainer` on resnet8x4 taught by resnet8x4 through kd; {_WORK}",
        _PEER,
        Bar(1.03),
        partial(against_bare_loop, student="resnet8x4", teacher="resnet8x4"),
    ),
    Benchmark(
        "trainer.overhead",
        f"what `Trainer` adds to a step of a net of 40 parameters, labels alone; {_WORK}",
        _PEER,
        Bar(500, "µs"),
        partial(against_bare_loop, student="tiny", steps=64),
    ),
]
