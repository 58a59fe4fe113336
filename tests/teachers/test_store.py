"""A store serves every method that reads only what a store holds, with the losses that a live teacher gives."""

from __future__ import annotations

import contract
import pytest
import torch

from tutelage import catalogue
from tutelage.engine.loop import Trainer
from tutelage.engine.method import Method
from tutelage.engine.needs import Setting, check_pairing
from tutelage.engine.types import Batch
from tutelage.recipe import load_recipe
from tutelage.runs.assemble import Assembly, assemble
from tutelage.teachers.store import MemoryStore, StoredTeacher


def _serves(name: str) -> bool:
    needs = catalogue.load(name).needs
    return (
        issubclass(catalogue.load(name), Method)
        and needs.teacher == "frozen"
        and not (needs.live or needs.input_gradient or needs.text)
    )


NAMES = [name for name in catalogue.names() if _serves(name)]


def trainer(name: str) -> tuple[Assembly, Trainer]:
    assembly = assemble(load_recipe(contract.recipe(name)))
    return assembly, assembly.trainer(None)


def stored(name: str) -> StoredTeacher:
    """The answers of a live teacher to all that a run of the method shows it."""
    assembly, live = trainer(name)
    teacher = assembly.teachers["teacher"]
    store = MemoryStore(teacher, live.setup.taps.teachers.get("teacher", ()))
    steps = live.loader.steps(0)
    for step in range(live.total_steps):
        live.progress.step = step  # the views of an epoch are those of its steps
        for batch in next(steps):
            store.add(teacher, live._on_device(batch))
    return StoredTeacher(store)


def losses(run: Trainer) -> list[float]:
    found: list[float] = []
    for _ in range(run.total_steps):
        run.run(1)
        found.append(float(sum(value for value in run.last[0].values())))
    return found


@pytest.mark.parametrize("name", NAMES)
def test_a_store_gives_the_losses_of_a_live_teacher(name: str) -> None:
    _, live = trainer(name)
    expected = losses(live)
    assembly = assemble(load_recipe(contract.recipe(name)))
    assembly.teachers = {"teacher": stored(name)}  # type: ignore[dict-item]
    assert losses(assembly.trainer(None)) == pytest.approx(expected, rel=1e-5)


def test_what_a_store_cannot_do_is_refused() -> None:
    teacher = stored("kd")
    rows = Batch(torch.zeros(1, 1, 8, 8), index=torch.tensor([0]), view=torch.tensor([99]))
    with pytest.raises(KeyError, match=r"never stored; the first is \(index, view\) = \(0, 99\)"):
        teacher.outputs(rows)
    with pytest.raises(ValueError, match="gives no gradients"):
        teacher.outputs(rows, grad="inputs")
    with pytest.raises(ValueError, match=r"read by \(index, view\); this batch has none"):
        teacher.outputs(Batch(torch.zeros(1, 1, 8, 8)))
    known = assemble(load_recipe(contract.recipe("kd"))).trainer(None)
    batch = known._on_device(next(known.loader.steps(0))[0])
    with pytest.raises(KeyError, match="were not stored"):
        teacher.outputs(batch, ("layer9",))
    setting = Setting("classification", frozenset({"target", "index"}))
    reasons = check_pairing("x", catalogue.load("fitnet").needs, {"teacher": teacher.offers}, setting)
    assert reasons == ["`x` needs inner features; this teacher gives none (teacher `teacher`)"]
