"""Runs a probe or a method of the catalogue; in this process, or in both of a pair."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

import probes
from support import Losses, Net, rows, train_config
from tutelage import catalogue
from tutelage.engine.combine import Combined
from tutelage.engine.distributed import whole
from tutelage.engine.loop import Trainer
from tutelage.engine.method import Method
from tutelage.engine.needs import PairingError
from tutelage.engine.runtime import Runtime
from tutelage.tasks import build_task
from tutelage.teachers.local import LocalTeacher


def make_method(name: str, options: dict[str, Any]) -> Method:
    """A probe, a method of the catalogue, or several with ``+`` between them."""
    if "+" in name:
        return Combined([make_method(part, {}) for part in name.split("+")], **options)
    if name in vars(probes):
        return vars(probes)[name]()
    found = catalogue.load(name)
    return found(found.Config(name=name, **options))


def make_trainer(
    name: str,
    options: dict[str, Any] | None = None,
    sharding: str = "ddp",
    student: nn.Module | None = None,
    **changes: Any,
) -> Trainer:
    method = make_method(name, options or {})
    source = rows()
    runtime = Runtime("cpu", sharding=sharding)  # type: ignore[arg-type]
    teacher = LocalTeacher("teacher", Net(width=12, blocks=3, seed=1), source.inputs[:2])
    if method.needs.teacher == "frozen":
        teacher.freeze()
    return Trainer(
        runtime,
        student or Net(seed=2),
        method,
        build_task("classification", 4),
        source,
        train_config(**changes),
        teachers={"teacher": teacher},
        loaders={"validation": rows(24, seed=5)},
        callbacks=[],
    )


def train(
    name: str,
    options: dict[str, Any] | None = None,
    sharding: str = "ddp",
    accumulate: int = 1,
    **changes: Any,
) -> dict[str, Any]:
    """Terms by step, over all ranks, and the final weights of all that was trained."""
    return _train(make_trainer(name, options, sharding, accumulate=accumulate, **changes))


def train_dropped(name: str, accumulate: int) -> dict[str, Any]:
    return train(name, accumulate=accumulate, student=Net(dropout=0.3, seed=2))


def train_beside(name: str, sharding: str, shard_teacher: bool | None) -> tuple[dict[str, Any], list[bool]]:
    """`train`, and whether parameters of the teacher are spread over ranks at its end."""
    trainer = make_trainer(name, None, sharding, shard_teacher=shard_teacher)
    found = _train(trainer)
    teacher = trainer.setup.teachers["teacher"].module
    return found, sorted({isinstance(p, DTensor) for p in teacher.parameters()})


def refused(name: str, sharding: str, shard_teacher: bool) -> str:
    try:
        make_trainer(name, None, sharding, shard_teacher=shard_teacher)
    except PairingError as error:
        return str(error)
    return "not refused"


def _train(trainer: Trainer) -> dict[str, Any]:
    losses = Losses()
    trainer.events.add(losses)
    if trainer.runtime.sharding == "fsdp":
        sharded = [p for p in trainer.whole.parameters() if p.requires_grad]
        assert sharded
        assert all(isinstance(p, DTensor) for p in sharded), "a trained parameter is not sharded"
    trainer.fit()
    weights = {n: whole(p.detach()).clone() for n, p in trainer.parameters.items()}
    buffers = {n: b.clone() for n, b in trainer.method.named_buffers()}
    return {"losses": losses.steps, "weights": weights, "buffers": buffers}


def assert_same(one: dict[str, Any], two: dict[str, Any], tolerance: float = 1e-5) -> None:
    for step, (left, right) in enumerate(zip(one["losses"], two["losses"], strict=True)):
        assert left.keys() == right.keys()
        for term in left:
            assert abs(left[term] - right[term]) <= tolerance * max(1.0, abs(left[term])), (
                step,
                term,
                left,
                right,
            )
    for kind in ("weights", "buffers"):
        assert one[kind].keys() == two[kind].keys()
        for name, value in one[kind].items():
            torch.testing.assert_close(two[kind][name], value, rtol=1e-4, atol=tolerance)


def moved(result: dict[str, Any], start: dict[str, Tensor], prefix: str) -> bool:
    return any(
        not torch.equal(value, start[name])
        for name, value in result["weights"].items()
        if name.startswith(prefix)
    )
