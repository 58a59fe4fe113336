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
_SMALL = {"hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 4, "num_attention_heads": 4}
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
    note = f"{made.manifest.plan.data.rows} rows, {made.bytes / 1e3:.0f} kB"
    return Sides(partial(ours.run, 1), partial(peer.run, 1), note=note)


def corpus(device: torch.device) -> Sides:
    """fkl from a store of a language model's 50 likeliest tokens, and labels alone."""
    taught = _corpus_recipe(
        {"name": "fkl", "label_weight": 0.5}, {"model": "config:llama", "options": _SMALL}
    )
    with tempfile.TemporaryDirectory() as folder:
        made = cache(taught, folder, progress=False)
        stored_teacher = {"store": folder}
        ours = assemble(load_recipe(taught | {"teacher": stored_teacher})).trainer(None)
    peer = assemble(load_recipe(_corpus_recipe("none", None))).trainer(None)
    for trainer in (ours, peer):
        trainer.run(2)
    plan = made.manifest.plan
    assert plan.spec.logits is not None
    tokens = plan.data.rows * plan.spec.logits[0]
    note = f"{tokens} tokens, {made.bytes / tokens:.0f} bytes each"
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


def _corpus_recipe(method: Any, teacher: dict[str, Any] | None) -> dict[str, Any]:
    sources = [{"name": "words", "order": 0, "concentration": 0.01}]
    return {
        "task": "language-model",
        "data": {
            "path": "markov",
            "max_length": 128,
            "validation": None,
            "markov": {"symbols": 4096, "rows": 256, "sources": sources},
        },
        "teacher": teacher,
        "student": {"model": "config:llama", "options": _SMALL},
        "method": method,
        "train": {
            "steps": _ENDLESS,
            "batch_size": 8,
            "optimizer": {"name": "adamw", "lr": 1e-3},
            "schedule": {"name": "constant"},
        },
        "cache": {"form": "topk", "k": 50, "batch_size": 32},
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
        "store.corpus",
        "`Trainer`, fkl and labels from a store of 50 tokens' log-probabilities; a transformer of 4 layers of width "
        "256, 8 rows of 128 tokens, a vocabulary of 4097, AdamW",
        "the same steps on labels alone",
        Bar(1.1),
        corpus,
    ),
    Benchmark(
        "teacher.live",
        f"`Trainer`, kd from a resnet32x4 that runs; {_WORK}",
        "steps on labels alone with as many FLOPs (three forwards a step)",
        Bar(1.1),
        live,
    ),
]
