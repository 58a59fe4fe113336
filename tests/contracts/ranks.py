"""A run of a method's Trainer, in this process or in both of a pair, with all that the engine adds to a step."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from contract import OPTIONS
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from support import conv_net, llama, pictures, sentences, train_config
from tutelage import catalogue
from tutelage.engine.combine import Combined
from tutelage.engine.distributed import whole
from tutelage.engine.evaluate import evaluate
from tutelage.engine.finite import NonFiniteError
from tutelage.engine.heads import HeadPlan
from tutelage.engine.loop import Trainer
from tutelage.engine.method import Method
from tutelage.engine.runtime import Runtime
from tutelage.engine.types import Batch
from tutelage.engine.validation import Validation
from tutelage.models.language_head import language_head
from tutelage.recipe.schema import OptimizerConfig
from tutelage.tasks import Task, build_task
from tutelage.teachers.local import LocalTeacher

COUNTED = torch.arange(32) % 5 == 0
"""Rows that count where rows are masked: some ranks have none in a micro-batch."""


class Watch:
    """Keeps every step's terms and gradient norm."""

    def __init__(self) -> None:
        self.steps: list[dict[str, float]] = []

    def on_step_end(self, trainer: Any) -> None:
        terms, norm = trainer.last
        self.steps.append({name: float(term) for name, term in (terms | {"norm": norm}).items()})


def build(name: str) -> Method:
    """A method of the catalogue, or several with ``+`` between them."""
    if "+" in name:
        return Combined([build(part) for part in name.split("+")])
    found = catalogue.load(name)
    return found(found.Config(name=name, **OPTIONS.get(name, {})))


@dataclass
class Scene:
    """Rows and models of a task. ``heads`` say where student and teacher make their logits."""

    task: Task
    rows: Callable[..., Any]
    student: nn.Module
    teacher: nn.Module
    heads: tuple[HeadPlan | None, HeadPlan | None] = (None, None)

    @classmethod
    def of(cls, task: str) -> Scene:
        if task == "classification":
            return cls(build_task(task, 5), pictures, conv_net(6, 8, 12, seed=2), conv_net(8, 12, 16, seed=1))
        models, inputs = (llama(8, seed=2), llama(12, seed=1)), sentences(2).fetch([0, 1]).inputs
        first, second = (language_head("the model", model, 11, inputs) for model in models)
        return cls(build_task(task, 11), sentences, *models, (first, second))


def make(
    name: str | Method,
    sharding: Any,
    masked: bool = False,
    precision: Any = "fp32",
    task: str = "classification",
    **train: Any,
) -> Trainer:
    """A Trainer with micro-batches, clipping, a moving average and validation; 7 rows of that do not divide by 2.

    One process alone cuts a step as finely as two do where rows get partners from their part of it.
    """
    method, scene = build(name) if isinstance(name, str) else name, Scene.of(task)
    source, held_out = scene.rows(mask=COUNTED if masked else None), scene.rows(7)
    runtime = Runtime("cpu", precision, sharding)
    teacher = LocalTeacher("teacher", scene.teacher, source.fetch([0, 1]).inputs, head=scene.heads[1])
    if method.needs.teacher == "frozen":
        teacher.freeze()

    def metrics(trainer: Trainer) -> dict[str, float]:
        return evaluate(
            trainer.predict, held_out, scene.task, batch_size=2, device="cpu", rank=runtime.rank,
            world=runtime.world,
        )  # fmt: skip

    optimizer = OptimizerConfig(name="sgd", lr=0.05, weight_decay=1e-3)
    parts = 4 if method.needs.mixes_rows and runtime.world == 1 else 2
    values = {
        "steps": 3,
        "batch_size": 16,
        "accumulate": parts,
        "clip": 1.0,
        "ema": 0.5,
        "optimizer": optimizer,
    }
    return Trainer(
        runtime,
        scene.student,
        method,
        scene.task,
        source,
        train_config(**values | train),
        teachers={"teacher": teacher},
        loaders={"validation": scene.rows(24)},
        head=scene.heads[0],
        validation=Validation(metrics, best=("accuracy", True)),
    )


@contextmanager
def exact() -> Iterator[None]:
    """Double precision: what differs then is no rounding, which steep losses enlarge from step to step."""
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


def train(
    name: str,
    sharding: str = "ddp",
    masked: bool = False,
    precision: Any = "fp32",
    task: str = "classification",
) -> dict[str, Any]:
    """Terms, gradient norms, validation metrics, final weights and buffers of a run."""
    with exact() if precision == "fp32" else nullcontext():
        return _train(make(name, sharding, masked, precision, task))


def _train(trainer: Trainer) -> dict[str, Any]:
    watch = Watch()
    trainer.events.add(watch)
    if trainer.runtime.sharding == "fsdp":
        assert_sharded(trainer.whole)
        for teacher in trainer.setup.teachers.values():
            assert_sharded(teacher.module)  # type: ignore[arg-type]
    counted: list[int] = []
    original = trainer.method.count

    def count(batch: Batch) -> dict[str, int | Tensor]:
        found = original(batch)
        counted.append(int(found.get("tokens", found["rows"])))
        return found

    trainer.method.count = count  # type: ignore[method-assign]
    trainer.fit()
    weights = {name: whole(value.detach()).clone() for name, value in trainer.parameters.items()}
    average = (
        {name: whole(value).clone() for name, value in trainer.ema.state_dict().items()}
        if trainer.ema
        else {}
    )
    return {
        "losses": watch.steps,
        "counted": counted,
        "metrics": trainer.progress.metrics,
        "best": trainer.progress.best_step,
        "weights": weights,
        "average": average,
        "buffers": {name: value.clone() for name, value in trainer.method.named_buffers()},
    }


def assert_sharded(module: nn.Module) -> None:
    for name, parameter in module.named_parameters():
        assert isinstance(parameter, DTensor), f"{name} is not sharded"


def failure(sharding: str) -> str:
    """What a run says whose second step has a row with NaN, whichever rank has it."""
    trainer = make("kd", sharding)
    source: Any = trainer.source
    spoilt = int(trainer.sampler.order(0)[-1])
    source.inputs[spoilt] = torch.nan
    before = {name: whole(value.detach()).clone() for name, value in trainer.parameters.items()}
    trainer.run(1)
    after = {name: whole(value.detach()).clone() for name, value in trainer.parameters.items()}
    assert any(not torch.equal(value, before[name]) for name, value in after.items())
    try:
        trainer.run()
    except NonFiniteError as error:
        assert all(
            torch.equal(whole(value.detach()), after[name]) for name, value in trainer.parameters.items()
        )
        return str(error).replace(f"rows {spoilt}", "the row")
    return "it went on"


def assert_same(alone: dict[str, Any], found: dict[str, Any], tolerance: float = 1e-6) -> None:
    """Losses, norms and metrics to the tolerance, relative above 1; weights and buffers close."""
    assert len(alone["losses"]) == len(found["losses"]) > 0
    for step, (left, right) in enumerate(zip(alone["losses"], found["losses"], strict=True)):
        assert right == _near(left, tolerance), f"step {step}"
    assert found["metrics"] == _near(alone["metrics"], tolerance)
    assert found["best"] == alone["best"]
    for kind in ("weights", "average", "buffers"):
        torch.testing.assert_close(found[kind], alone[kind], rtol=tolerance, atol=tolerance, equal_nan=True)


def _near(values: dict[str, float], tolerance: float) -> Any:
    return pytest.approx(values, rel=tolerance, abs=tolerance)
