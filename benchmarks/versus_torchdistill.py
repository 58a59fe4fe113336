"""Distillation by torchdistill, on the same recipe. It is no dependency: where it is not installed, this is skipped."""

from __future__ import annotations

import copy
import logging
import time
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from benchmarks.harness import Bar, Benchmark, Sides, Skipped
from benchmarks.rows import MEAN, STD, Images, cifar_rows
from benchmarks.training import (
    BATCH,
    DECAY,
    KD_WEIGHT,
    LABEL_WEIGHT,
    LR,
    MOMENTUM,
    TEMPERATURE,
    make_trainer,
    model,
    same_training,
)
from tutelage.engine.loading import Sampler
from tutelage.recipe.schema import ViewConfig

_VIEWS = (ViewConfig(name="crop", padding=4), ViewConfig(name="flip"))


class CIFAR(Dataset[tuple[Tensor, int]]):
    """Rows as torchvision's CIFAR10 holds and gives them: an array in memory, transformed row by row."""

    def __init__(self, images: Images, *, augmented: bool) -> None:
        from torchvision import transforms

        self.data, self.targets = images.inputs.permute(0, 2, 3, 1).numpy(), images.target.tolist()
        random = (
            [transforms.RandomCrop(32, padding=4), transforms.RandomHorizontalFlip()] if augmented else []
        )
        self.transform = transforms.Compose([*random, transforms.ToTensor(), transforms.Normalize(MEAN, STD)])

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, position: int) -> tuple[Tensor, int]:
        from PIL import Image

        return self.transform(Image.fromarray(self.data[position])), self.targets[position]


class Order:
    """Our sampler's order, epoch after epoch, as a DataLoader's sampler."""

    def __init__(self, sampler: Sampler) -> None:
        self.sampler, self.epoch = sampler, 0

    def __len__(self) -> int:
        return len(self.sampler)

    def __iter__(self) -> Iterator[int]:
        yield from self.sampler.order(self.epoch).tolist()
        self.epoch += 1


class TheirLoop:
    """torchdistill's distillation box, driven step by step as its image classification example drives it."""

    def __init__(self, box: Any, device: torch.device) -> None:
        from torchdistill.misc.log import MetricLogger, SmoothedValue

        self.box, self.device = box, device
        self.batches: Iterator[Any] = iter(())
        self.log = MetricLogger(delimiter="  ")
        self.log.add_meter("lr", SmoothedValue(window_size=1, fmt="{value}"))
        self.log.add_meter("img/s", SmoothedValue(window_size=10, fmt="{value}"))

    def run(self, steps: int) -> None:
        for _ in range(steps):
            batch = next(self.batches, None)
            if batch is None:
                self.box.pre_epoch_process(epoch=0)
                self.batches = iter(self.box.train_data_loader)
                batch = next(self.batches)
            self._step(*batch)

    def _step(self, images: Tensor, target: Tensor, extra: dict[str, Any]) -> None:
        started = time.time()
        images, target = images.to(self.device), target.to(self.device)
        loss = self.box.forward_process(images, target, extra)
        self.box.post_forward_process(loss)
        self.log.update(loss=loss.item(), lr=self.box.optimizer.param_groups[0]["lr"])
        self.log.meters["img/s"].update(len(images) / (time.time() - started))
        if torch.isnan(loss) or torch.isinf(loss):
            raise ValueError("the loss is not finite")


def recipe(sampler: Sampler) -> dict[str, Any]:
    """kd with the options of `make_trainer`, as torchdistill's YAML files spell it."""
    loss = {
        "key": "KDLoss",
        "kwargs": {
            "student_module_path": ".",
            "student_module_io": "output",
            "teacher_module_path": ".",
            "teacher_module_io": "output",
            "temperature": TEMPERATURE,
            "alpha": LABEL_WEIGHT,
            "beta": KD_WEIGHT,
            "reduction": "batchmean",
        },
    }
    return {
        "num_epochs": 1,
        "train_data_loader": {
            "dataset_id": "rows",
            "sampler": {"class_or_func": lambda dataset: Order(sampler)},
            "kwargs": {"batch_size": BATCH, "num_workers": 0, "drop_last": True},
        },
        "teacher": {"forward_proc": "forward_batch_only", "requires_grad": False},
        "student": {"forward_proc": "forward_batch_only", "requires_grad": True},
        "optimizer": {
            "key": "SGD",
            "kwargs": {"lr": LR, "momentum": MOMENTUM, "weight_decay": DECAY},
        },
        "criterion": {
            "key": "WeightedSumLoss",
            "kwargs": {"sub_terms": {"kd": {"criterion": loss, "weight": 1.0}}},
        },
    }


def against_torchdistill(
    device: torch.device, *, student: str, teacher: str, views: bool, steps: int = 1
) -> Sides:
    try:
        from torchdistill.core.distillation import get_distillation_box
    except ImportError:
        raise Skipped("pip install torchdistill") from None
    logging.getLogger("torchdistill").setLevel(logging.WARNING)
    images = cifar_rows()
    ours, taught = model(student, seed=0), model(teacher, seed=1)
    theirs, their_teacher = copy.deepcopy(ours).to(device), copy.deepcopy(taught).to(device)
    trainer = make_trainer(images, ours, taught, _VIEWS if views else ())
    rows = {"rows": CIFAR(images, augmented=views)}
    box = get_distillation_box(their_teacher, theirs, rows, recipe(trainer.sampler), device, None, False, 1)
    loop = TheirLoop(box, device)
    trainer.run(2)
    loop.run(2)
    if not views:  # else each draws its own
        same_training(trainer, theirs)
    return Sides(partial(trainer.run, steps), partial(loop.run, steps), count=steps, note=images.name)


_PEER = (
    "torchdistill, driven as in its image classification example, rows in memory as torchvision holds them"
)

BENCHMARKS = [
    Benchmark(
        "torchdistill.recipe",
        "`Trainer`: resnet8x4 taught by resnet8x4 through kd, batch 64, random crops and flips, no loader workers",
        _PEER,
        Bar(1.0),
        partial(against_torchdistill, student="resnet8x4", teacher="resnet8x4", views=True),
    ),
    Benchmark(
        "torchdistill.loop",
        "`Trainer`: a net of 40 parameters through kd, batch 64, no views: loop and data path alone",
        _PEER,
        Bar(1.0),
        partial(against_torchdistill, student="tiny", teacher="tiny", views=False, steps=16),
    ),
]
