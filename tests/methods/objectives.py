"""What tests of a baseline's objective share: a fake step, and real small models tapped as the method wants."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tutelage.engine.method import Method
from tutelage.engine.spec import ModelSpec
from tutelage.engine.taps import Tapped, outputs_of
from tutelage.engine.types import Batch, Outputs, Term, Terms
from tutelage.models import build_model

ROWS, CLASSES = 6, 5


class FakeStep:
    """What the objectives use of a step, in one process."""

    def __init__(self, step: int = 0, epoch: int = 0, batch: Batch | None = None, seed: int = 0) -> None:
        self.step, self.epoch, self.batch = step, epoch, batch
        self.seed = seed
        self.generator = torch.Generator().manual_seed(seed)

    def label_loss(self, outputs: Outputs, batch: Batch) -> Term:
        rows = slice(None) if batch.mask is None else batch.mask.bool()
        assert batch.target is not None
        return Term(F.cross_entropy(outputs.logits[rows], batch.target[rows]))

    def rand(self, *shape: int) -> Tensor:
        rows = ROWS if self.batch is None else len(self.batch)
        return torch.rand(rows, *shape, generator=torch.Generator().manual_seed(self.seed))

    def gather(self, tensor: Tensor) -> Tensor:
        return tensor

    def mean(self, tensor: Tensor) -> Tensor:
        return tensor


def images(rows: int = ROWS, size: int = 8, **fields: Any) -> Batch:
    generator = torch.Generator().manual_seed(0)
    target = torch.arange(rows) % CLASSES
    inputs = torch.rand(rows, 1, size, size, generator=generator)
    return Batch(inputs, target=target, index=torch.arange(rows)).replace(**fields)


def net(name: str, batch: Batch) -> nn.Module:
    assert isinstance(batch.inputs, Tensor)
    shape = tuple(batch.inputs.shape[1:])
    return build_model(f"digits:{name}", outputs=CLASSES, input_shape=shape).module


class Pairing:
    """A method built for two digits nets, and both nets' outputs for a batch."""

    def __init__(
        self, method: Method, student: str = "cnn-4-6", teacher: str = "cnn-6-8", **batch: Any
    ) -> None:
        self.method, self.batch = method, images(**batch)
        self.nets = [Tapped(net(name, self.batch)) for name in (student, teacher)]
        self.specs = [
            ModelSpec.of(side, held.model, self.batch.inputs)
            for side, held in zip(("student", "teacher"), self.nets, strict=True)
        ]
        self.taps = method.taps(self.specs[1], self.specs[0])
        method.build(self.specs[1], self.specs[0], self.batch)
        paths = (self.taps.student, self.taps.teacher)
        self.student, self.teacher = (
            outputs_of(held(self.batch.inputs, taps)) for held, taps in zip(self.nets, paths, strict=True)
        )

    def terms(self, step: Any = None) -> Terms:
        return self.method.objective(self.student, self.teacher, self.batch, step or FakeStep())

    def backward(self) -> None:
        torch.stack([term.mean for term in self.terms().values()]).sum().backward()
