"""crd: the memory of rows, the term, and when memories move: after a step, over its micro-batches and ranks."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from objectives import CLASSES, ROWS, FakeStep, Pairing
from pydantic import ValidationError
from torch import Tensor

from support import Net, Rows, train_config
from tutelage.data import NoisySource, TensorSource, TorchSource, row_ids, subset
from tutelage.engine.distributed import world_size
from tutelage.engine.loop import Trainer
from tutelage.engine.runtime import Runtime
from tutelage.engine.types import Batch
from tutelage.functional import crd_loss
from tutelage.methods.baselines.crd import CRD
from tutelage.methods.baselines.memory import RowMemory
from tutelage.recipe.schema import OptimizerConfig
from tutelage.tasks import build_task
from tutelage.teachers.local import LocalTeacher

IDS = torch.tensor([40, 3, 17, 8, 99, 5])
KINDS = torch.tensor([0, 1, 2, 0, 1, 2])


def crd(**options: Any) -> CRD:
    return CRD(CRD.Config(name="crd", **({"width": 4, "negatives": 3} | options)))


def memory(ids: Tensor = IDS, classes: Tensor = KINDS) -> RowMemory:
    filled = RowMemory(width=4)
    filled.fill(ids, classes)
    return filled


def draw(
    found: RowMemory, places: Tensor, negatives: int, generator: torch.Generator, relax: bool = False
) -> Tensor:
    return found.draw(
        places, torch.rand(len(places), len(found), generator=generator), negatives, relax=relax
    )


class Spaced(Rows):
    """Rows whose ids are no positions, as those of a split."""

    def fetch(self, positions: Sequence[int]) -> Batch:
        batch = super().fetch(positions)
        assert batch.index is not None
        return batch.replace(index=1000 - 7 * batch.index)


def balanced(count: int = 24, classes: int = 4) -> Spaced:
    generator = torch.Generator().manual_seed(0)
    return Spaced(torch.randn(count, 6, generator=generator), torch.arange(count) % classes)


def test_rows_are_found_by_their_ids() -> None:
    found = memory()
    assert found.ids.tolist() == [3, 5, 8, 17, 40, 99]
    assert found.classes.tolist() == [1, 2, 0, 2, 0, 1]
    assert found.places(torch.tensor([99, 3, 17])).tolist() == [5, 0, 3]
    for stray in (4, 0, 1000):
        with pytest.raises(ValueError, match=f"row {stray} is none of the 6 training rows"):
            found.places(torch.tensor([3, stray]))


def test_a_row_that_comes_twice_is_remembered_once() -> None:
    found = memory(torch.tensor([7, 2, 7]), torch.tensor([1, 0, 1]))
    assert (found.ids.tolist(), found.classes.tolist()) == ([2, 7], [0, 1])


def test_memories_start_uniform() -> None:
    found = RowMemory(width=12)
    torch.manual_seed(0)
    found.fill(torch.arange(500), torch.zeros(500, dtype=torch.int64))
    for values in (found.student, found.teacher):
        assert values.abs().max() <= 0.5
        torch.testing.assert_close(values.std(), torch.tensor(0.5 / 3**0.5), rtol=0.02, atol=0)
    assert not torch.equal(found.student, found.teacher)
    assert found.z_student == found.z_teacher == 0


def test_negatives_are_all_rows_of_other_classes_alike() -> None:
    classes = torch.tensor([0, 0, 0, 1, 1, 2])
    found = memory(torch.arange(6), classes)
    assert found.negatives() == 3
    generator, places = torch.Generator().manual_seed(0), torch.arange(6)
    counts = torch.zeros(6, 6)
    for _ in range(2000):
        drawn = draw(found, places, 2, generator)
        assert torch.equal(drawn[:, 0], places)
        assert (drawn[:, 1] != drawn[:, 2]).all()
        counts.scatter_add_(1, drawn[:, 1:], torch.ones(6, 2))
    other = classes[:, None] != classes
    assert (counts[~other] == 0).all()
    shares = counts / 2000
    for row in range(6):
        wanted = torch.full((int(other[row].sum()),), 2 / float(other[row].sum()))
        torch.testing.assert_close(shares[row][other[row]], wanted, rtol=0.1, atol=0)


def test_rows_draw_on_their_own() -> None:
    found = memory(torch.arange(200), torch.arange(200) % 2)
    drawn = draw(found, torch.tensor([0, 0, 2]), 20, torch.Generator().manual_seed(0))
    sets = [set(row.tolist()) for row in drawn[:, 1:]]
    assert len(sets[0] & sets[1]) < 15
    assert len(sets[0] & sets[2]) < 15


def test_relax_takes_any_row_of_the_class() -> None:
    found = memory(torch.arange(6), torch.tensor([0, 0, 0, 1, 1, 2]))
    generator = torch.Generator().manual_seed(0)
    drawn = [draw(found, torch.tensor([1, 4, 5]), 2, generator, relax=True)[:, 0] for _ in range(600)]
    positives = torch.stack(drawn)
    assert set(positives[:, 0].tolist()) == {0, 1, 2}
    assert 150 < int((positives[:, 0] == 1).sum()) < 250
    assert set(positives[:, 1].tolist()) == {3, 4}
    assert set(positives[:, 2].tolist()) == {5}


def test_the_same_generator_draws_the_same() -> None:
    found, places = memory(), torch.tensor([0, 5])
    draws = [draw(found, places, 3, torch.Generator().manual_seed(s)) for s in (1, 1, 2)]
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])


def test_a_memory_comes_back_from_its_state() -> None:
    filled = memory()
    filled.z_student.fill_(3.0)
    empty = RowMemory(width=4)
    empty.load_state_dict(filled.state_dict())
    assert all(torch.equal(value, filled.state_dict()[name]) for name, value in empty.state_dict().items())
    assert empty.negatives() == 4
    assert torch.equal(copy.deepcopy(empty).places(IDS), filled.places(IDS))


@pytest.mark.parametrize("mode", ["exact", "relax"])
@pytest.mark.parametrize("student", ["cnn-4-6", "mlp-7-9"])
def test_terms_and_memories_of_two_steps(mode: str, student: str) -> None:
    pairing = Pairing(crd(loss_weight=2.0, label_weight=0.5, mode=mode), student)
    method, batch = pairing.method, pairing.batch
    method.prepare(Rows(batch.inputs, batch.target), None, None)
    z: dict[str, Tensor] = {}
    memories = {
        "memory_student": method.memory.student.clone(),
        "memory_teacher": method.memory.teacher.clone(),
    }
    for number in (0, 1):
        contrast = method.memory.draw(
            batch.index, FakeStep(batch=batch, seed=number).rand(ROWS), 3, relax=mode == "relax"
        )
        features = (pairing.student.features["head:in"], pairing.teacher.features["head:in"])
        ours, theirs = (
            F.normalize(embed(each), dim=1)
            for embed, each in zip((method.student_embed, method.teacher_embed), features, strict=True)
        )
        wanted = crd_loss(
            ours, theirs, **memories, index=batch.index, contrast_index=contrast, mode=mode, **z
        )
        step = FakeStep(number, batch=batch, seed=number)
        terms = pairing.terms(step)
        torch.testing.assert_close(terms["crd"].mean, 2 * wanted.loss)
        label = step.label_loss(pairing.student, batch)
        torch.testing.assert_close(terms["label"].mean, 0.5 * label.mean)
        torch.testing.assert_close(method.memory.student, memories["memory_student"])
        method.after_step(step)
        memories = {"memory_student": wanted.memory_student, "memory_teacher": wanted.memory_teacher}
        z = {"z_student": wanted.z_student, "z_teacher": wanted.z_teacher}
        torch.testing.assert_close(method.memory.student, wanted.memory_student)
        torch.testing.assert_close(method.memory.teacher, wanted.memory_teacher)
        torch.testing.assert_close(method.memory.z_student, wanted.z_student)


def test_card_defaults() -> None:
    config = CRD.Config(name="crd")
    assert (config.label_weight, config.loss_weight, config.width, config.negatives) == (1, 0.8, 128, 16384)
    assert (config.temperature, config.momentum, config.mode) == (0.07, 0.5, "exact")
    pairing = Pairing(crd())
    assert pairing.taps.student == pairing.taps.teacher == ("head:in",)
    assert not pairing.taps.teacher_logits
    assert (pairing.method.student_embed.in_features, pairing.method.teacher_embed.in_features) == (6, 8)


def test_named_taps_may_be_maps() -> None:
    pairing = Pairing(crd(student_tap="layer2", teacher_tap="layer1"))
    pairing.method.prepare(Rows(pairing.batch.inputs, pairing.batch.target), None, None)
    assert pairing.method.student_embed.in_features == 6 * 4 * 4
    assert torch.isfinite(pairing.terms()["crd"].mean)


def test_gradients_reach_both_embeddings_and_not_the_teacher() -> None:
    pairing = Pairing(crd(label_weight=0))
    pairing.method.prepare(Rows(pairing.batch.inputs, pairing.batch.target), None, None)
    pairing.teacher.features["head:in"].retain_grad()
    pairing.backward()
    assert pairing.teacher.features["head:in"].grad is None
    for parameter in (*pairing.method.parameters(), pairing.nets[0].model.layer1[0].weight):
        assert parameter.grad is not None
        assert parameter.grad.abs().sum() > 0


def test_rows_that_do_not_count_are_neither_learned_from_nor_remembered() -> None:
    mask = torch.tensor([1, 1, 0, 0, 1, 0])
    pairing = Pairing(crd(negatives=4, loss_weight=1), mask=mask, target=torch.arange(ROWS) % 3)
    method, batch, rows = pairing.method, pairing.batch, mask.bool()
    method.prepare(Rows(batch.inputs, batch.target), None, None)
    before = copy.deepcopy(method.memory)
    features = pairing.student.features["head:in"]
    features.retain_grad()
    step = FakeStep(batch=batch)
    found = pairing.terms(step)["crd"].mean
    found.backward()
    assert features.grad is not None
    assert torch.equal((features.grad != 0).any(1), rows)
    method.after_step(step)
    assert torch.equal((method.memory.student != before.student).any(1), rows)
    others = (torch.arange(ROWS)[None] % 3 != batch.target[:, None]).nonzero()[:, 1].view(ROWS, 4)
    wanted = crd_loss(
        F.normalize(method.student_embed(features), dim=1)[rows],
        F.normalize(method.teacher_embed(pairing.teacher.features["head:in"]), dim=1)[rows],
        before.student,
        before.teacher,
        batch.index[rows],
        torch.cat([batch.index[:, None], others], 1)[rows],
        z_student=method.memory.z_student,
        z_teacher=method.memory.z_teacher,
    )
    torch.testing.assert_close(found, wanted.loss)


def test_a_dry_step_remembers_nothing() -> None:
    pairing = Pairing(crd())
    method = pairing.method
    assert set(pairing.terms()) == {"label"}
    assert len(method.memory) == 0
    method.prepare(Rows(pairing.batch.inputs, pairing.batch.target), None, None)
    before = method.memory.student.clone()
    pairing.terms(FakeStep(0))  # a dry step of a method that is ready
    pairing.terms(FakeStep(5))
    method.after_step(FakeStep(5, batch=pairing.batch))
    ours = F.normalize(method.student_embed(pairing.student.features["head:in"]), dim=1).detach()
    torch.testing.assert_close(method.memory.student, F.normalize((before + ours) / 2, dim=1))
    moved = method.memory.student.clone()
    method.after_step(FakeStep(6, batch=pairing.batch))
    assert torch.equal(method.memory.student, moved)


def test_more_negatives_than_there_are_is_said_once() -> None:
    pairing = Pairing(crd(negatives=100))
    source = Rows(pairing.batch.inputs, pairing.batch.target)
    with pytest.warns(
        UserWarning, match=r"negatives=100, but of the 6 training rows only 4 are sure .* 4 are used"
    ):
        pairing.method.prepare(source, None, None)
    drawn = pairing.method.memory.draw(torch.arange(ROWS), torch.rand(ROWS, ROWS), 4, relax=False)
    assert drawn.shape == (ROWS, 5)
    assert torch.isfinite(pairing.terms()["crd"].mean)


def test_what_is_refused() -> None:
    method, inputs = Pairing(crd()).method, torch.rand(4, 1, 8, 8)
    with pytest.raises(ValueError, match="all training rows are of one class"):
        method.prepare(Rows(inputs, torch.zeros(4, dtype=torch.int64)), None, None)
    with pytest.raises(ValueError, match=r"one class id a row; .*float32 and shape \[4, 5\]"):
        method.prepare(Rows(inputs, torch.rand(4, CLASSES)), None, None)
    with pytest.raises(ValueError, match="one class id a row"):
        Pairing(crd(), target=torch.rand(ROWS, CLASSES))


@pytest.mark.parametrize(
    "option", [{"negatives": 0}, {"width": 0}, {"temperature": 0}, {"momentum": 2}, {"mode": "loose"}]
)
def test_bounds_are_refused_by_name(option: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match=next(iter(option))):
        crd(**option)


def run(lr: float = 0.1, **changes: Any) -> dict[str, Any]:
    """Four steps with every row of another class as a negative, so that nothing depends on the draw."""
    source = balanced()
    method = crd(negatives=18)
    teacher = LocalTeacher("teacher", Net(width=12, blocks=3, seed=1), source.inputs[:2]).freeze()
    trainer = Trainer(
        Runtime("cpu", sharding="ddp"),
        Net(seed=2),
        method,
        build_task("classification", 4),
        source,
        train_config(steps=4, optimizer=OptimizerConfig(name="sgd", lr=lr), **changes),
        teachers={"teacher": teacher},
    )
    trainer.fit()
    state = {name: value.clone() for name, value in method.memory.state_dict().items()}
    head = trainer.student.model.get_parameter("head.weight").detach().clone()
    return {"memory": state, "head": head, "rank": dist.get_rank() if world_size() > 1 else 0}


def test_two_ranks_remember_what_one_process_does(pair: Any) -> None:
    alone = run()
    first, second = pair.run(run)
    assert (first["rank"], second["rank"]) == (0, 1)
    for name, value in alone["memory"].items():
        assert torch.equal(first["memory"][name], second["memory"][name]), name
        torch.testing.assert_close(first["memory"][name], value, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(first["head"], alone["head"], rtol=1e-4, atol=1e-5)


def test_micro_batches_read_the_memory_before_the_step_and_move_it_after() -> None:
    """The normalisers alone come from the first micro-batch; where nothing learns they change nothing else."""
    whole, parts = run(lr=1e-9), run(lr=1e-9, accumulate=4)
    for name in ("ids", "classes", "student", "teacher"):
        torch.testing.assert_close(parts["memory"][name], whole["memory"][name], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(parts["memory"]["z_student"], whole["memory"]["z_student"], rtol=1e-4)


def test_ids_of_any_source() -> None:
    inputs, target = torch.rand(5, 2), torch.arange(5)
    source = TensorSource(inputs, target, index=torch.tensor([9, 7, 5, 3, 1]))
    assert row_ids(subset(source, [3, 0])).tolist() == [3, 9]
    noisy = NoisySource(source, 0.1, scale=torch.ones(2), seed=0, split="train")
    assert row_ids(noisy).tolist() == [9, 7, 5, 3, 1]
    assert row_ids(balanced(3)).tolist() == [1000, 993, 986]
    dataset = torch.utils.data.TensorDataset(inputs, target)
    assert row_ids(TorchSource(dataset)).tolist() == [0, 1, 2, 3, 4]
