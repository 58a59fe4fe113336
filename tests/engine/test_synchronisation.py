"""No step makes the host wait for the device: neither the engine nor a method's loss."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from contract import NAMES, on_tokens, recipe
from synchronising import Synchronisations

from support import Net, rows, train_config
from tutelage import catalogue
from tutelage.engine import finite
from tutelage.engine.finite import FiniteGuard
from tutelage.engine.loading import Loader
from tutelage.engine.loop import Trainer
from tutelage.engine.method import Method
from tutelage.engine.runtime import Runtime
from tutelage.engine.types import Batch, Outputs, Terms
from tutelage.methods.baselines.method import PlainTraining, PlainTrainingConfig
from tutelage.recipe import load_recipe
from tutelage.runs.assemble import assemble
from tutelage.tasks import build_task

LOOPS = [name for name in NAMES if issubclass(catalogue.load(name), Method)]
WARM, COUNTED = 2, 4
LONG = {"steps": 16, "batch_size": 8}
"""An epoch of the contract's 64 rows: none of the steps that are counted is recorded."""
UNRECORDED = {"ddk": {"interval": 8}}
"""Options with which a method's epochs are as long."""
OF_TOKENS = {"calling.py", "fused_tokens.py", "analytic.py"}
"""Where steps of language models wait, and no method of itself: transformers look whether a row is packed, a fused loss
how many tokens count, the adaptive KL how large the largest head is."""


class StepsOnly:
    """Counts from a step's start to its end; what comes after (records, evaluation) may read values."""

    def __init__(self, seen: Synchronisations) -> None:
        self.seen = seen

    def on_step_start(self, trainer: Trainer) -> None:
        self.seen.counting = True

    def on_step_end(self, trainer: Trainer) -> None:
        assert trainer.record is None, "a recorded step reads its figures"
        self.seen.counting = False


def waits(trainer: Trainer, monkeypatch: pytest.MonkeyPatch) -> Counter[tuple[str, str]]:
    """What would wait for the device in a few steps that are not recorded, after the first ones."""
    seen = Synchronisations(host=_on_host(trainer))
    _as_on_an_accelerator(trainer, monkeypatch)
    steps = Loader.steps

    def fetched(loader: Loader, start: int) -> Iterator[list[Batch]]:
        inner = steps(loader, start)
        while True:
            yield seen.on_host(inner.__next__)()

    monkeypatch.setattr(Loader, "steps", fetched)
    monkeypatch.setattr(trainer.views, "draw", seen.on_host(trainer.views.draw))
    trainer.run(WARM)
    trainer.events.add(StepsOnly(seen))
    with seen.watching():
        trainer.run(COUNTED)
    assert trainer.step == WARM + COUNTED
    return seen.found


def _on_host(trainer: Trainer) -> tuple[torch.Tensor, ...]:
    """The moving average's counter stays on the host wherever the model is."""
    return () if trainer.ema is None else (trainer.ema.averaged.n_averaged,)


def _as_on_an_accelerator(trainer: Trainer, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the CPU a step's flag is read at once; on an accelerator it is read when it has arrived."""
    optimizers = [optim.optimizer for optim in trainer.optimizers.values()]
    trainer.guard = FiniteGuard(torch.device("cpu"), optimizers, immediate=False)
    trainer.guard._blind = False  # the fused optimisers, which accelerators get, can be masked

    def later(step: int, names: tuple[str, ...], bad: torch.Tensor) -> finite._Reading:
        return finite._Reading(step, names, bad, lambda: False, lambda: None)

    monkeypatch.setattr(finite, "_read_later", later)


def small(method: Method | None = None, **train: Any) -> Trainer:
    """A Trainer of our own engine around a net without surprises."""
    return Trainer(
        Runtime("cpu"),
        Net(),
        method or PlainTraining(PlainTrainingConfig(name="none")),
        build_task("classification", outputs=4),
        rows(80),
        train_config(steps=9, **train),
    )


@pytest.mark.parametrize("name", LOOPS)
def test_a_method_never_waits_for_the_device(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    content = recipe(name, **LONG)
    if not on_tokens(name):
        views = [{"name": "crop", "padding": 1}, {"name": "erase"}, {"name": "color_jitter"}]
        content["data"]["views"] = views
    content["method"] |= UNRECORDED.get(name, {})
    trainer = assemble(load_recipe(content)).trainer(None)
    trainer.validation = None
    places = {place.partition(":")[0] for _, place in waits(trainer, monkeypatch)}
    assert places <= (OF_TOKENS if on_tokens(name) else set())


@pytest.mark.parametrize(
    "train",
    [{"clip": 1.0}, {"ema": 0.9}, {"accumulate": 2}, {"precision": "bf16"}],
    ids=lambda train: next(iter(train)),
)
def test_the_engine_never_waits_for_the_device(
    train: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert not waits(small(**train), monkeypatch)


class Waiting(PlainTraining):
    """Does once a step what no method should."""

    def __init__(self, how: str) -> None:
        super().__init__(PlainTrainingConfig(name="none"))
        self.how = how

    def objective(self, student: Outputs, teacher: Outputs | None, batch: Batch, ctx: Any) -> Terms:
        logits = student.logits.detach()
        _WAITS[self.how](logits)
        return super().objective(student, teacher, batch, ctx)


_WAITS: dict[str, Any] = {
    "_local_scalar_dense": lambda x: bool((x > 0).any()),
    "nonzero": lambda x: (x > 0).nonzero(),
    "masked_select": lambda x: x.masked_select(x > 0),
    "index by a mask": lambda x: x[x > 0],
    "tolist": lambda x: x.tolist(),
    "numpy": lambda x: x.numpy(),
    "cpu": lambda x: x.cpu(),
    "to": lambda x: x.to("cpu"),
    "_unique2": lambda x: x.unique(),
    "tensor": lambda x: torch.tensor([1.0, 2.0], device=x.device),
}


@pytest.mark.parametrize("how", _WAITS)
def test_each_way_of_waiting_is_seen_once_a_step(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    found = waits(small(Waiting(how)), monkeypatch)
    assert {name for name, _ in found} == {how}
    assert found.total() == COUNTED


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device: torch's own check needs one")
@pytest.mark.parametrize("name", LOOPS)
def test_cuda_itself_sees_no_wait(name: str) -> None:
    content = recipe(name, **LONG, device="cuda")
    trainer = assemble(load_recipe(content)).trainer(None)
    trainer.validation = None
    trainer.run(WARM)

    class Errors:
        def on_step_start(self, trainer: Trainer) -> None:
            torch.cuda.set_sync_debug_mode("error")

        def on_step_end(self, trainer: Trainer) -> None:
            torch.cuda.set_sync_debug_mode("default")

    trainer.events.add(Errors())
    try:
        trainer.run(COUNTED)
    finally:
        torch.cuda.set_sync_debug_mode("default")
