"""The hard seams, each against what must hold, and against one process where it runs on two."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from training import assert_same, make_trainer, refused, train, train_beside, train_dropped

import probes
from support import Net

FSDP = [name for name, probe in probes.ALL.items() if probe.needs.sharding == "any"]
PER_MICRO_BATCH = ("InsideBlock", "Memory", "Bilevel", "Couples")
"""What a micro-batch computes depends on which rows are in it."""


@pytest.mark.parametrize("name", probes.ALL)
def test_two_ranks_give_the_losses_of_one(name: str, pair: Any) -> None:
    alone = train(name)
    first, second = pair.run(train, name)
    assert_same(alone, first)
    assert_same(alone, second)


@pytest.mark.parametrize("name", FSDP)
def test_sharded_gives_the_losses_of_one(name: str, pair: Any) -> None:
    alone = train(name)
    first, second = pair.run(train, name, None, "fsdp")
    assert_same(alone, first)
    assert_same(alone, second)


@pytest.mark.parametrize("name", ["InsideBlock", "Couples", "TrainedTeacher"])
@pytest.mark.parametrize("sharding", ["ddp", "fsdp"])
def test_two_ranks_see_the_micro_batches_of_one(name: str, sharding: str, pair: Any) -> None:
    alone = train(name, accumulate=2)
    for found in pair.run(train, name, None, sharding, 2):
        assert_same(alone, found)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_draws_within_a_micro_batch_are_those_of_one_process_that_has_as_many(
    accumulate: int, pair: Any
) -> None:
    """Partners, noise and dropout."""
    alone = train("Mixes", accumulate=2 * accumulate, student=Net(dropout=0.3, seed=2))
    for found in pair.run(train_dropped, "Mixes", accumulate):
        assert_same(alone, found)
    other = train("Mixes", accumulate=accumulate, student=Net(dropout=0.3, seed=2))
    assert other["losses"][0] != pytest.approx(alone["losses"][0], rel=1e-5)


@pytest.mark.parametrize(("sharding", "shard_teacher"), [("ddp", True), ("fsdp", False), ("ddp", None)])
@pytest.mark.parametrize("name", ["InsideBlock", "ThroughTeacher"])
def test_a_frozen_teacher_is_sharded_or_replicated_by_choice(
    name: str, sharding: str, shard_teacher: bool | None, pair: Any
) -> None:
    """Early stopped, or with gradients through it; nothing of a sharded one stays gathered after a step."""
    alone = train(name)
    for found, sharded in pair.run(train_beside, name, sharding, shard_teacher):
        assert_same(alone, found)
        assert sharded == [bool(shard_teacher)]


@pytest.mark.parametrize(("sharding", "shard_teacher"), [("ddp", True), ("fsdp", False)])
def test_a_trained_teacher_is_shared_as_the_student_is(sharding: str, shard_teacher: bool, pair: Any) -> None:
    for text in pair.run(refused, "TrainedTeacher", sharding, shard_teacher):
        assert "train.shard_teacher is for frozen ones: leave it out" in text


@pytest.mark.parametrize("name", [n for n in probes.ALL if n not in PER_MICRO_BATCH])
def test_micro_batches_give_the_step_of_one_batch(name: str) -> None:
    assert_same(train(name), train(name, accumulate=4), tolerance=1e-6)


def test_the_teacher_stops_at_the_tap() -> None:
    trainer = make_trainer("InsideBlock")
    ran: list[str] = []
    model = trainer.setup.teachers["teacher"].module.model
    for path, module in model.named_modules():
        module.register_forward_hook(lambda *_, path=path: ran.append(path))
    trainer.run(1)
    assert "blocks.0.act" in ran
    assert not {"blocks.0.down", "blocks.1", "head"} & set(ran)


def test_only_the_active_optimiser_moves() -> None:
    trainer = make_trainer("ThroughTeacher")
    for step in range(4):
        before = {name: p.detach().clone() for name, p in trainer.parameters.items()}
        trainer.run(1)
        changed = {
            name.split(".")[0] for name, p in trainer.parameters.items() if not torch.equal(p, before[name])
        }
        assert changed == ({"method"} if step % 2 else {"student"})


def test_gradients_reach_the_inputs_through_a_constant_teacher() -> None:
    trainer = make_trainer("ThroughTeacher")
    teacher = trainer.setup.teachers["teacher"]
    batch = trainer.example.replace(inputs=trainer.example.inputs.clone().requires_grad_())
    teacher.outputs(batch, grad="inputs").logits.sum().backward()
    assert batch.inputs.grad is not None
    assert batch.inputs.grad.abs().sum() > 0
    assert all(p.grad is None for p in teacher.module.parameters())


def test_a_trained_teacher_learns_and_is_checkpointed(tmp_path: Any) -> None:
    trainer = make_trainer("TrainedTeacher")
    before = {
        name: p.detach().clone() for name, p in trainer.parameters.items() if name.startswith("teachers.")
    }
    trainer.run(1)
    assert before
    assert all(
        not torch.equal(trainer.parameters[name], value) for name, value in before.items() if "weight" in name
    )
    from tutelage.engine.state import snapshot

    assert "teacher.teacher" in snapshot(trainer).tensors


def test_virtual_steps_leave_weights_and_buffers_alone() -> None:
    trainer = make_trainer("Bilevel")
    ratio = trainer.parameters["method.ratio"].item()
    trainer.run(2)
    assert trainer.parameters["method.ratio"].item() != ratio
    assert trainer.setup.streams["validation"].drawn == 2


def test_the_bilevel_gradient_is_the_finite_difference() -> None:
    """d(outer loss)/d(ratio) through the virtual step, against a central difference."""
    from tutelage.engine.step import Step

    trainer = make_trainer("Bilevel")
    trainer.student.double()
    trainer.setup.teachers["teacher"].module.double()
    trainer.method.double()
    batch = next(trainer.loader.steps(0))[0]
    held_out = next(trainer.setup.streams["validation"])

    def outer(ratio: float) -> torch.Tensor:
        with torch.no_grad():
            trainer.method.ratio.fill_(ratio)
        trainer.setup.streams["validation"].seek(0)
        ctx = Step(trainer.setup, batch.replace(inputs=batch.inputs.double()), 0)
        trainer.setup.streams["validation"].__class__.__next__ = lambda self: held_out.replace(
            inputs=held_out.inputs.double()
        )
        return trainer.method(ctx)["outer"].mean

    stream_next = trainer.setup.streams["validation"].__class__.__next__
    try:
        (exact,) = torch.autograd.grad(outer(0.3), trainer.method.ratio)
        difference = (outer(0.3 + 1e-5) - outer(0.3 - 1e-5)) / 2e-5
    finally:
        trainer.setup.streams["validation"].__class__.__next__ = stream_next
    torch.testing.assert_close(exact, difference.detach(), rtol=1e-5, atol=1e-9)


def test_a_memory_bank_is_prepared_once_and_resumed(tmp_path: Any) -> None:
    trainer = make_trainer("Memory")
    trainer.run(2)
    trainer.run(2)
    assert trainer.method.prepared.item() == 1
    assert (trainer.method.bank != 0).any()


def test_the_own_batch_changes_what_counts() -> None:
    trainer = make_trainer("FromNoise", accumulate=2)
    seen: list[int] = []
    original = trainer.method.count
    trainer.method.count = lambda batch: seen.append(int(batch.mask.sum())) or original(batch)
    trainer.run(1)
    assert len(seen) == 2
    assert seen != [8, 8]


def test_alternating_trainers_are_each_alone() -> None:
    """Two Trainers with dropout, taking turns, end with the bits that each has when run alone."""

    def client(seed: int) -> Any:
        return make_trainer("none", student=Net(dropout=0.5, seed=seed), seed=seed)

    alone = []
    for seed in (1, 2):
        trainer = client(seed)
        trainer.run()
        alone.append(trainer.parameters)
    together = [client(1), client(2)]
    for _ in range(4):
        for trainer in together:
            trainer.run(1)
    for one, other in zip(alone, together, strict=True):
        assert all(torch.equal(value, other.parameters[name]) for name, value in one.items())
