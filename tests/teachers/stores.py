"""Small stores: of a digits teacher by a recipe, and of a formula without any model."""

from __future__ import annotations

import copy
import time
from pathlib import Path
from typing import Any

import contract
import torch
from torch import Tensor

from tutelage.data.source import tensor_digest
from tutelage.engine.types import Outputs
from tutelage.runs.cache import CacheResult, cache
from tutelage.teachers.manifest import DataPart, FormPart, Plan, SpecPart, TeacherPart, ViewsPart
from tutelage.teachers.store import Store
from tutelage.teachers.writing import LOCK, StoreWriter

TEACHER = {"model": "digits:cnn-6-8"}


def recipe(name: str | list[str] = "kd", *, teacher: Any = TEACHER, **parts: Any) -> dict[str, Any]:
    """A short run whose rows have two views; parts such as ``cache`` are laid over it."""
    values: dict[str, Any] = contract.recipe("kd") | {"teacher": teacher}
    options = contract.OPTIONS
    names = [name] if isinstance(name, str) else name
    values["method"] = [{"name": each, **options.get(each, {})} for each in names]
    values["data"] |= {"view_seed": 5, "distinct_views": 2}
    values = copy.deepcopy(values)
    for part, content in parts.items():
        values[part] = values.get(part, {}) | content
    return values


def make(folder: Path, name: str | list[str] = "kd", **parts: Any) -> CacheResult:
    return cache(recipe(name, **parts), folder, progress=False)


def opened(folder: Path, name: str | list[str] = "kd", **parts: Any) -> Store:
    make(folder, name, **parts)
    return Store(folder)


CLASSES = 7


def plan(rows: int = 40, views: int = 2, **changes: Any) -> Plan:
    """Of a store whose teacher is a formula; see `answer`."""
    ids = row_ids(rows)
    values: dict[str, Any] = {
        "code": 1,
        "task": "classification",
        "teacher": TeacherPart(
            model="formula",
            weights="0" * 64,
            mean=None,
            std=(1.0,),
            parameters=1,
            flops=2,
            description={"a": [1]},
        ),
        "spec": SpecPart(
            outputs=CLASSES,
            logits=(CLASSES,),
            head="fc",
            stages=("body",),
            modules=(("body", True), ("fc", True)),
            infos=(("body", "Linear", (3, 2), 0.5), ("fc", "Linear", (CLASSES,), 1.0)),
            shapes={"body": (3, 2), "fc": (CLASSES,)},
            hints={"output_fmt": "NHWC"},
        ),
        "data": DataPart(path="formula", fingerprint="f", rows=rows, ids=tensor_digest(ids)),
        "views": ViewsPart(changes=({"name": "crop"},), seed=0, number=views),
        "taps": ("body",),
        "cache": FormPart(form="dense", k=None, scale="raw", dtype="int8", draw_temperature=1.0, seed=0),
        "precision": "fp32",
        "batch_size": 4,
        "shard_rows": 9,
        "made_by": {"torch": "x"},
    }
    return Plan(**(values | changes))


def row_ids(rows: int) -> Tensor:
    return 3 * torch.arange(rows) + 5


def answer(rank: Tensor, view: Tensor) -> tuple[Tensor, Outputs]:
    """Ids, and outputs that are a function of id and view."""
    index = 3 * rank + 5
    seed = (index * 10 + view).double()
    logits = torch.sin(seed[:, None] * torch.arange(1, CLASSES + 1)).float()
    features = torch.cos(seed[:, None] * torch.arange(1, 7)).float().view(-1, 3, 2)
    return index, Outputs(logits, features={"body": features})


def write(folder: Path, wanted: Plan, *, first: int = 0, pause: float = 0.0) -> list[int]:
    """Write a whole store of the formula; the shards that were made here."""

    def slowly(rank: Tensor, view: Tensor) -> tuple[Tensor, Outputs]:
        time.sleep(pause)
        return answer(rank, view)

    writer = StoreWriter(folder, wanted, row_ids(wanted.data.rows))
    assert writer.fill(slowly, first=first, report=lambda rows: None, stop=lambda: False)
    writer.finish(dict)
    return writer.made


def contents(folder: Path) -> dict[str, bytes]:
    """Every file but the lock."""
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.name != LOCK}
