"""bdkd: terms of both sides, its offline form, several teachers, what is followed and reported, launches, refusals."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import contract
import pytest
import torch
import torch.nn.functional as F
from pydantic import ValidationError
from torch import Tensor
from training import assert_same, make_method, make_trainer, train

from support import KeptRows, Net, rows, train_config
from tutelage.engine.checkpoint import CheckpointFolder
from tutelage.engine.loop import Trainer
from tutelage.engine.needs import Offers, PairingError, Setting, check_pairing
from tutelage.engine.runtime import Runtime
from tutelage.engine.step import Step
from tutelage.functional import bdkd_student_loss, bdkd_teacher_loss, expected_calibration_error
from tutelage.methods.bdkd.method import BDKD
from tutelage.models import load_model
from tutelage.runs import distill
from tutelage.tasks import build_task
from tutelage.teachers.local import LocalTeacher
from tutelage.teachers.store import StoredTeacher

OPTIONS = {"student_weight": 0.5, "teacher_weight": 2.0, "temperature": 3.0, "delta": 4.0}


def context(trainer: Trainer, **changes: Any) -> Any:
    return Step(trainer.setup, trainer.source.fetch(range(6)).replace(**changes), 0)


def means(trainer: Trainer, ctx: Any) -> dict[str, Tensor]:
    return {name: term.mean for name, term in trainer.method(ctx).items()}


# --- terms


@pytest.mark.parametrize("soft", [False, True], ids=["ids", "distributions"])
@pytest.mark.parametrize("mask", [None, torch.tensor([1, 0, 1, 1, 0, 1])], ids=["all", "masked"])
@pytest.mark.parametrize("weighting", ["switch", "sigmoid"])
def test_terms_of_both_sides(weighting: str, soft: bool, mask: Tensor | None) -> None:
    trainer: Any = make_trainer("bdkd", {**OPTIONS, "weighting": weighting, "scale": 0.3})
    ctx = context(trainer, mask=mask)
    if soft:
        ids = ctx.batch.target
        ctx.batch = ctx.batch.replace(target=0.7 * F.one_hot(ids, 4) + 0.3 * F.one_hot((ids + 1) % 4, 4))
    kept = slice(None) if mask is None else mask.bool()
    inputs, target = ctx.batch.inputs[kept], ctx.batch.target[kept]
    student = trainer.student.model(inputs)
    teacher = trainer.setup.teachers["teacher"].module.model(inputs)
    parts = bdkd_student_loss(student, teacher, 4.0, 3.0, weighting, 0.3)
    wanted = {
        "student_ce": F.cross_entropy(student, target),
        "student_forward": 0.5 * parts.forward,
        "student_reverse": 0.5 * parts.reverse,
        "teacher_ce": F.cross_entropy(teacher, target),
        "teacher_kl": 2.0 * bdkd_teacher_loss(teacher, student, 3.0),
    }
    torch.testing.assert_close(means(trainer, ctx), wanted)


def test_neither_loss_reaches_the_other_network() -> None:
    trainer: Any = make_trainer("bdkd")
    teacher: Any = trainer.setup.teachers["teacher"].module
    terms = trainer.method(context(trainer))
    for side, own, other in (("student", trainer.student, teacher), ("teacher", teacher, trainer.student)):
        loss: Any = torch.stack([term.mean for name, term in terms.items() if name.startswith(side)]).sum()
        loss.backward(retain_graph=True)
        assert all(p.grad is not None for p in own.parameters())
        assert all(p.grad is None for p in other.parameters())
        own.zero_grad()


@pytest.mark.parametrize("kept", ["forward", "reverse"])
def test_one_divergence_alone(kept: str) -> None:
    trainer, whole = make_trainer("bdkd", {"divergences": kept}), make_trainer("bdkd")
    found, both = (means(each, context(each)) for each in (trainer, whole))
    assert set(both) - set(found) == {f"student_{'reverse' if kept == 'forward' else 'forward'}"}
    torch.testing.assert_close(found[f"student_{kept}"], both[f"student_{kept}"])


def test_forward_alone_with_delta_1_is_mutual_learning() -> None:
    assert_same(train("dml"), train("bdkd", {"divergences": "forward", "delta": 1.0}) | {"buffers": {}})


def test_both_move_at_once_each_by_its_own_optimiser() -> None:
    trainer: Any = make_trainer("bdkd", {"teacher_optimizer": {"name": "adamw", "lr": 0.01}})
    before = {name: p.detach().clone() for name, p in trainer.parameters.items()}
    trainer.run(1)
    assert all(not torch.equal(p, before[name]) for name, p in trainer.parameters.items())
    assert type(trainer.optimizers["teacher"].optimizer).__name__ == "AdamW"
    assert type(trainer.optimizers["student"].optimizer).__name__ == "SGD"


# --- several teachers, and teachers that stay as they are


def with_teachers(options: dict[str, Any], *nets: Net, frozen: bool = False) -> Any:
    source = rows()
    teachers = {
        f"t{number}": LocalTeacher(f"t{number}", net, source.inputs[:2]) for number, net in enumerate(nets)
    }
    if frozen:
        for teacher in teachers.values():
            teacher.freeze()
    return Trainer(
        Runtime("cpu"),
        Net(seed=5),
        make_method("bdkd", options),
        build_task("classification", 4),
        source,
        train_config(),
        teachers=teachers,
    )


@pytest.mark.parametrize("online", [True, False])
def test_several_teachers(online: bool) -> None:
    """The student learns from the mean over them; each of those that learn too from the student."""
    nets = [Net(width=8 + 4 * seed, seed=seed) for seed in (0, 1)]
    trainer = with_teachers({"online": online}, *nets, frozen=not online)
    ctx = context(trainer)
    found = means(trainer, ctx)
    student, inputs = trainer.student.model(ctx.batch.inputs), ctx.batch.inputs
    pairs = [bdkd_student_loss(student, net(inputs)) for net in nets]
    for name in ("forward", "reverse"):
        wanted = torch.stack([getattr(parts, name) for parts in pairs]).mean()
        torch.testing.assert_close(found[f"student_{name}"], wanted)
    share = torch.stack([parts.forward_share for parts in pairs]).mean()
    torch.testing.assert_close(trainer.method.shares, 6 * torch.stack([share, torch.tensor(1.0)]))
    if online:
        back = sum(bdkd_teacher_loss(net(inputs), student) for net in nets)
        torch.testing.assert_close(found["teacher_kl"], back)
    else:
        assert set(found) == {"student_ce", "student_forward", "student_reverse"}


def test_offline_the_teacher_stays_as_it_is() -> None:
    teacher = Net(width=12, seed=1)
    before = [p.clone() for p in teacher.parameters()]
    trainer = with_teachers({"online": False}, teacher, frozen=True)
    start = {name: p.detach().clone() for name, p in trainer.parameters.items()}
    trainer.run()
    assert set(trainer.optimizers) == {"main"}
    assert all(torch.equal(one, two) for one, two in zip(before, teacher.parameters(), strict=True))
    assert all(not torch.equal(p, start[name]) for name, p in trainer.parameters.items())
    assert not teacher.training


def test_offline_a_store_serves() -> None:
    live = with_teachers({"online": False}, Net(width=12, seed=1), frozen=True)
    teacher: Any = live.setup.teachers["t0"]
    store: Any = KeptRows(teacher, live.source.fetch(range(32)))
    kept = with_teachers({"online": False}, Net(width=12, seed=1), frozen=True)
    kept.setup.teachers["t0"] = StoredTeacher(store)
    for trainer in (live, kept):
        trainer.run()
    for name, parameter in live.parameters.items():
        torch.testing.assert_close(kept.parameters[name], parameter)


# --- what is followed


def test_how_often_the_student_is_the_surer_one_by_epoch() -> None:
    trainer: Any = make_trainer("bdkd", steps=8, accumulate=2)
    shares = []
    for step in range(4):
        for batch in next(trainer.loader.steps(step)):
            student = trainer.student.model(batch.inputs)
            teacher = trainer.setup.teachers["teacher"].module.model(batch.inputs)
            shares.append(bdkd_student_loss(student, teacher).forward_share.item())
        trainer.run(1)
    trainer.run()
    ((name, table),) = trainer.method.tables().items()
    assert name == "rows_in_which_the_student_is_more_certain"
    assert [row[0] for row in table.rows] == [1, 2]
    assert table.rows[0][1] == pytest.approx(sum(shares) / len(shares))


def test_a_dry_step_is_not_counted() -> None:
    trainer: Any = make_trainer("bdkd")
    trainer.dry_step()
    assert trainer.method.shares.tolist() == [0, 0]


def test_it_goes_on_after_a_resume(tmp_path: Path) -> None:
    whole = make_trainer("bdkd", steps=8)
    whole.run()
    first, second = (make_trainer("bdkd", steps=8) for _ in range(2))
    for trainer in (first, second):
        trainer.checkpoints = CheckpointFolder(tmp_path / "checkpoints", keep=2)
    first.run(6)
    first.save()
    assert second.restore()
    second.run()
    assert second.method.tables() == whole.method.tables()
    assert all(torch.equal(p, whole.parameters[name]) for name, p in second.parameters.items())


# --- launches


@pytest.mark.parametrize("sharding", ["ddp", "fsdp"])
def test_two_ranks_give_the_losses_of_one(sharding: str, pair: Any) -> None:
    alone = train("bdkd")
    for found in pair.run(train, "bdkd", {}, sharding):
        assert_same(alone, found)


def test_micro_batches_give_the_gradient_of_one_batch() -> None:
    assert_same(train("bdkd"), train("bdkd", accumulate=4), tolerance=1e-6)


# --- a run


def test_calibration_of_both_is_reported_at_each_evaluation(tmp_path: Path) -> None:
    run = distill(contract.recipe("bdkd", steps=8), folder=tmp_path / "run", progress=False)
    lines = [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines()]
    seen = [
        line["metrics"] for line in lines if line["kind"] == "evaluation" and line["split"] == "validation"
    ]
    assert len(seen) == 2
    for metrics in seen:
        assert 0 <= metrics["calibration_error"] <= 1
        assert 0 <= metrics["teacher.calibration_error"] <= 1
    kept = load_model(run.folder / "teachers" / "teacher")
    assert sum(p.numel() for p in kept.module.parameters()) > sum(p.numel() for p in run.student.parameters())
    assert set(run.result["tables"]) == {"rows_in_which_the_student_is_more_certain"}


def test_the_metric_is_the_public_function() -> None:
    logits, target = torch.randn(40, 6), torch.arange(40) % 6
    task = build_task("classification", 6)
    metric = task.metrics(["calibration_error"])["calibration_error"]
    from tutelage.engine.types import Batch, Outputs

    for part in (slice(0, 7), slice(7, 40)):
        metric.update(Outputs(logits[part]), Batch(logits[part], target[part]))
    wanted = expected_calibration_error(logits.softmax(1).double(), target)
    assert metric.compute() == pytest.approx(wanted.item(), abs=1e-7)


# --- what is refused, and defaults


def test_what_it_needs_depends_on_whether_the_teacher_learns() -> None:
    stored, frozen = Offers(live=False, trainable=False, input_gradient=False), Offers(trainable=False)
    setting = Setting("classification", frozenset({"target"}))
    online, offline = (make_method("bdkd", {"online": on}).needs for on in (True, False))
    assert check_pairing("bdkd", online, {"big": frozen}, setting) == [
        "`bdkd` trains its teacher; this one cannot be trained (teacher `big`)"
    ]
    assert len(check_pairing("bdkd", online, {"big": stored}, setting)) == 2
    assert check_pairing("bdkd", online, {"big": Offers()}, setting) == []
    log_probs = Offers(live=False, trainable=False, input_gradient=False, scale="log_probs")
    assert check_pairing("bdkd", offline, {"big": log_probs}, setting) == []
    assert check_pairing("bdkd", offline, {"big": Offers(logits="topk")}, setting) != []


def test_it_runs_alone_and_needs_a_teacher_that_can_learn() -> None:
    with pytest.raises(PairingError, match=r"`bdkd` cannot be combined .* more than one forward"):
        make_method("kd+bdkd", {})
    with pytest.raises(PairingError, match=r"`bdkd` trains its teachers; t0 cannot be trained"):
        with_teachers({}, Net(seed=1), frozen=True)


def test_card_defaults_needs_and_bounds() -> None:
    config = BDKD.Config(name="bdkd")
    assert (config.delta, config.temperature, config.scale) == (2.0, 1.0, 0.1)
    assert (config.student_weight, config.teacher_weight) == (1.0, 1.0)
    assert (config.weighting, config.divergences, config.online) == ("switch", "both", True)
    for option in (
        {"delta": 0.5},
        {"temperature": 0},
        {"weighting": "soft"},
        {"scale": 0},
        {"divergences": "none"},
        {"teacher_schedule": {"name": "constant"}, "online": False},
    ):
        with pytest.raises(ValidationError, match=next(iter(option))):
            BDKD.Config(name="bdkd", **option)
