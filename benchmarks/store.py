"""What a teacher costs a step: one that answers from a store, and one that runs."""

from __future__ import annotations

import tempfile
from functools import partial
from typing import Any

import torch

from benchmarks.harness import Bar, Benchmark, Sides, UnequalWorkError
from benchmarks.rows import CLASSES, MEAN, STD, Images, cifar_rows
from tutelage.data import Data
from tutelage.data.opening import DataInfo
from tutelage.data.source import TensorSource
from tutelage.engine.loop import Trainer
from tutelage.models import profile_model
from tutelage.recipe import load_recipe
from tutelage.runs.assemble import assemble
from tutelage.runs.cache import cache

_ENDLESS = 10**9
_STUDENT, _TEACHER = {"model": "cifar:resnet8x4"}, {"model": "cifar:resnet32x4"}


def stored(device: torch.device) -> Sides:
    """kd from a store of a resnet32x4's logits, and labels alone."""
    rows = _data(cifar_rows())
    recipe = _recipe("kd", _TEACHER)
    with tempfile.TemporaryDirectory() as folder:  # mapped files stay readable without their names
        made = cache(recipe, folder, data=rows, progress=False)
        ours = _trainer(_recipe("kd", {"store": folder}), rows)
    live = _trainer(recipe, rows)
    peer = _trainer(_recipe("none"), rows)
    for trainer in (ours, live, peer):
        trainer.run(2)
    if not torch.allclose(ours.last[0]["kd"], live.last[0]["kd"], rtol=1e-5):
        raise UnequalWorkError(
            f"kd is {ours.last[0]['kd']} from the store and {live.last[0]['kd']} from the teacher"
        )
    note = f"{made.manifest.plan.data.rows} rows, {made.manifest.bytes / 1e3:.0f} kB"
    return Sides(partial(ours.run, 1), partial(peer.run, 1), note=note)


def live(device: torch.device) -> Sides:
    """kd from a resnet32x4 that runs, and as many steps of labels alone as have the same FLOPs."""
    rows = _data(cifar_rows())
    ours, peer = _trainer(_recipe("kd", _TEACHER), rows), _trainer(_recipe("none"), rows)
    module = ours.setup.teachers["teacher"].module
    assert module is not None
    row = torch.zeros(1, 3, 32, 32, device=ours.runtime.device)
    of_teacher, of_student = (profile_model(model, row).flops for model in (module, ours.student.model))
    wanted = 1 + of_teacher / (3 * of_student)  # a backward is two forwards
    steps, others = min(
        ((n, round(n * wanted)) for n in range(1, 6)), key=lambda pair: abs(pair[1] / pair[0] / wanted - 1)
    )
    for trainer in (ours, peer):
        trainer.run(2)
    note = f"{steps} against {others} steps: {others / steps:.2f} to one, FLOPs say {wanted:.2f}"
    return Sides(partial(ours.run, steps), partial(peer.run, others), count=steps, note=note)


def _data(images: Images) -> Data:
    source = TensorSource(images.inputs, images.target)
    info = DataInfo((3, 32, 32), CLASSES, None, MEAN, STD, source.fields)
    return Data(source, None, None, info, {"path": images.name, "config": None, "revision": None})


def _recipe(method: str, teacher: dict[str, str] | None = None) -> dict[str, Any]:
    return {
        "data": {"path": "digits"},  # the rows come from Python
        "student": _STUDENT,
        "teacher": teacher,
        "method": method,
        "train": {"steps": _ENDLESS, "batch_size": 64, "schedule": {"name": "constant"}},
    }


def _trainer(recipe: dict[str, Any], rows: Data) -> Trainer:
    return assemble(load_recipe(recipe), data=rows).trainer(None)


_WORK = "resnet8x4, batch 64, SGD, rows in memory, no views"

BENCHMARKS = [
    Benchmark(
        "store.step",
        f"`Trainer`, kd from a store of a resnet32x4's logits; {_WORK}",
        "the same steps on labels alone",
        Bar(1.05),
        stored,
    ),
    Benchmark(
        "teacher.live",
        f"`Trainer`, kd from a resnet32x4 that runs; {_WORK}",
        "steps on labels alone with as many FLOPs (three forwards a step)",
        Bar(1.1),
        live,
    ),
]
