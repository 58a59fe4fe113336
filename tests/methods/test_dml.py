"""dml: terms, gradients, both optimisers, launches, and what a run leaves and refuses."""

from __future__ import annotations

import json
from inspect import unwrap
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from pydantic import ValidationError
from safetensors.torch import load_file
from training import assert_same, make_method, make_trainer, train

from support import Net, rows, train_config
from tutelage.engine.checkpoint import CheckpointFolder
from tutelage.engine.loop import Trainer
from tutelage.engine.needs import Offers, PairingError, Setting, check_pairing
from tutelage.engine.runtime import Runtime
from tutelage.engine.step import Step
from tutelage.engine.types import Term
from tutelage.functional import bdkd_teacher_loss, kd_loss
from tutelage.methods.bdkd.method import DML
from tutelage.models import build_model, load_model
from tutelage.recipe.schema import ModelConfig, OptimizerConfig
from tutelage.runs import distill
from tutelage.tasks import build_task
from tutelage.teachers.local import LocalTeacher

GOLDEN = Path(__file__).parent.parent / "golden" / "bdkd"


# --- the teacher's loss


@pytest.mark.parametrize(("suffix", "options"), [("", {}), ("_2", {"temperature": 4.0})])
def test_golden(suffix: str, options: dict[str, float]) -> None:
    with np.load(GOLDEN / "teacher_loss.npz") as file:
        data = {name: torch.from_numpy(file[name]) for name in file}
    teacher, student = (data[f"in_{side}_logits"].requires_grad_() for side in ("teacher", "student"))
    loss = bdkd_teacher_loss(teacher, student, **options)
    loss.backward()
    torch.testing.assert_close(loss, data[f"out_loss{suffix}"], rtol=1e-10, atol=0)
    torch.testing.assert_close(teacher.grad, data[f"grad_teacher_logits{suffix}"], rtol=1e-8, atol=1e-12)
    assert student.grad is None


def test_the_teachers_loss_is_the_students_with_the_roles_changed() -> None:
    generator = torch.Generator().manual_seed(0)
    one, other = torch.randn(2, 4, 5, generator=generator)
    torch.testing.assert_close(bdkd_teacher_loss(one, other, 3.0), kd_loss(one, other, 3.0))
    empty = torch.zeros(0, 5, requires_grad=True)
    bdkd_teacher_loss(empty, torch.zeros(0, 5)).backward()
    assert empty.grad is not None


def test_bad_input_is_named_by_its_side() -> None:
    with pytest.raises(ValueError, match=r"teacher_logits \[2, 3\], student_logits \[2, 4\]"):
        unwrap(bdkd_teacher_loss)(torch.zeros(2, 3), torch.zeros(2, 4))
    with pytest.raises(ValueError, match="temperature must be finite and above 0"):
        bdkd_teacher_loss(torch.zeros(2, 3), torch.zeros(2, 3), 0.0)


# --- a step


def context(trainer: Trainer, **changes: Any) -> Any:
    return Step(trainer.setup, trainer.source.fetch(range(6)).replace(**changes), 0)


def teacher_of(trainer: Trainer) -> Any:
    return trainer.setup.teachers["teacher"].module


@pytest.mark.parametrize("soft", [False, True], ids=["ids", "distributions"])
@pytest.mark.parametrize("mask", [None, torch.tensor([1, 0, 1, 1, 0, 1])], ids=["all", "masked"])
def test_terms_of_both_sides(soft: bool, mask: torch.Tensor | None) -> None:
    options = {"student_weight": 0.5, "teacher_weight": 2.0, "temperature": 3.0}
    trainer = make_trainer("dml", options)
    ctx = context(trainer, mask=mask)
    if soft:
        ids = ctx.batch.target
        ctx.batch = ctx.batch.replace(target=0.7 * F.one_hot(ids, 4) + 0.3 * F.one_hot((ids + 1) % 4, 4))
    terms: dict[str, Term] = trainer.method(ctx)
    kept = slice(None) if mask is None else mask.bool()
    inputs, target = ctx.batch.inputs[kept], ctx.batch.target[kept]
    student, teacher = trainer.student.model(inputs), teacher_of(trainer).model(inputs)
    wanted = {
        "student_ce": F.cross_entropy(student, target),
        "student_forward": 0.5 * kd_loss(student, teacher, 3.0),
        "teacher_ce": F.cross_entropy(teacher, target),
        "teacher_kl": 2.0 * bdkd_teacher_loss(teacher, student, 3.0),
    }
    torch.testing.assert_close({name: term.mean for name, term in terms.items()}, wanted)


def test_neither_loss_reaches_the_other_network() -> None:
    trainer = make_trainer("dml")
    teacher = teacher_of(trainer)
    terms = trainer.method(context(trainer))
    for side, own, other in (("student", trainer.student, teacher), ("teacher", teacher, trainer.student)):
        loss = torch.stack([term.mean for name, term in terms.items() if name.startswith(side)]).sum()
        loss.backward(retain_graph=True)
        assert all(p.grad is not None for p in own.parameters())
        assert all(p.grad is None for p in other.parameters())
        own.zero_grad()


def test_both_move_at_once_each_by_its_own_optimiser() -> None:
    options = {
        "teacher_optimizer": OptimizerConfig(name="adamw", lr=0.01),
        "teacher_schedule": {"name": "multistep", "milestones": (0.5,)},
    }
    trainer = make_trainer("dml", options)
    before = {name: p.detach().clone() for name, p in trainer.parameters.items()}
    trainer.run()
    assert all(not torch.equal(p, before[name]) for name, p in trainer.parameters.items())
    assert set(trainer.optimizers) == {"student", "teacher"}
    assert {name.split(".")[0] for name in trainer.optimizers["teacher"].names} == {"teachers"}
    assert type(trainer.optimizers["teacher"].optimizer).__name__ == "AdamW"
    assert trainer.optimizers["teacher"].lr == pytest.approx(0.001)
    assert trainer.optimizers["student"].lr == pytest.approx(0.1)
    plain = make_trainer("dml").optimizers
    assert {type(optim.optimizer).__name__ for optim in plain.values()} == {"SGD"}


def test_without_exchange_each_learns_as_if_alone() -> None:
    together = make_trainer("dml", {"student_weight": 0.0, "teacher_weight": 0.0})
    alone = make_trainer("none")
    together.run()
    alone.run()
    for name, parameter in alone.parameters.items():
        torch.testing.assert_close(together.parameters[name], parameter, rtol=1e-5, atol=1e-7)


def test_the_teacher_is_in_train_mode_and_its_statistics_move() -> None:
    source, teacher = rows(), torch.nn.Sequential(torch.nn.BatchNorm1d(6), Net(width=12, seed=1))
    trainer = Trainer(
        Runtime("cpu"),
        Net(seed=2),
        make_method("dml", {}),
        build_task("classification", 4),
        source,
        train_config(),
        teachers={"teacher": LocalTeacher("teacher", teacher, source.inputs[:2])},
    )
    trainer.run()
    assert teacher[0].num_batches_tracked == 4
    assert teacher.training


def test_several_teachers() -> None:
    """Each learns from the student, the student from the mean over them."""
    source = rows()
    nets = {name: Net(width=8 + 4 * seed, seed=seed) for seed, name in enumerate(("one", "two"))}
    trainer = Trainer(
        Runtime("cpu"),
        Net(seed=5),
        make_method("dml", {}),
        build_task("classification", 4),
        source,
        train_config(),
        teachers={name: LocalTeacher(name, net, source.inputs[:2]) for name, net in nets.items()},
    )
    ctx = context(trainer)
    terms = trainer.method(ctx)
    student, inputs = trainer.student.model(ctx.batch.inputs), ctx.batch.inputs
    forward = [kd_loss(student, net(inputs), 1.0) for net in nets.values()]
    back = [bdkd_teacher_loss(net(inputs), student) for net in nets.values()]
    torch.testing.assert_close(terms["student_forward"].mean, (forward[0] + forward[1]) / 2)
    torch.testing.assert_close(terms["teacher_kl"].mean, back[0] + back[1])
    before = {name: p.detach().clone() for name, p in trainer.parameters.items()}
    trainer.run(1)
    assert all(not torch.equal(p, before[name]) for name, p in trainer.parameters.items())


# --- launches


def test_two_ranks_give_the_losses_of_one(pair: Any) -> None:
    alone = train("dml")
    for found in pair.run(train, "dml"):
        assert_same(alone, found)


def test_micro_batches_give_the_step_of_one_batch() -> None:
    assert_same(train("dml"), train("dml", accumulate=4), tolerance=1e-6)


# --- what is refused


def test_card_defaults_needs_and_bounds() -> None:
    config = DML.Config(name="dml")
    assert (config.student_weight, config.teacher_weight, config.temperature) == (1.0, 1.0, 1.0)
    assert (DML.needs.teacher, DML.needs.live, DML.needs.teacher_taps) == ("trained", True, False)
    for option in ({"temperature": 0}, {"student_weight": -1}, {"teacher_optimizer": {"lr": 0}}):
        with pytest.raises(ValidationError, match=next(iter(option))):
            DML.Config(name="dml", **option)


def test_a_stored_teacher_is_refused_with_the_reasons() -> None:
    stored = Offers(live=False, trainable=False, input_gradient=False)
    setting = Setting("classification", frozenset({"target"}))
    assert check_pairing("dml", DML.needs, {"big": stored}, setting) == [
        "`dml` needs a live teacher; this one is stored (teacher `big`)",
        "`dml` trains its teacher; this one cannot be trained (teacher `big`)",
    ]
    assert check_pairing("dml", DML.needs, {"big": Offers()}, setting) == []


def test_a_frozen_teacher_is_refused() -> None:
    source = rows()
    teacher = LocalTeacher("big", Net(seed=1), source.inputs[:2]).freeze()
    with pytest.raises(
        PairingError, match=r"`dml` trains its teachers; big cannot be trained \(frozen or stored\)"
    ):
        Trainer(
            Runtime("cpu"),
            Net(seed=2),
            make_method("dml", {}),
            build_task("classification", 4),
            source,
            train_config(),
            teachers={"big": teacher},
        )


def test_it_runs_alone() -> None:
    with pytest.raises(
        PairingError, match=r"`dml` cannot be combined .* more than one forward .* optimisers of its own"
    ):
        make_method("kd+dml", {})


# --- a run


@pytest.fixture(scope="module")
def recipe() -> dict[str, Any]:
    return {
        "data": {"path": "digits", "limit": 64, "validation": 32, "test": 40},
        "teacher": {"model": "digits:cnn-6-8"},
        "student": {"model": "digits:cnn-4-6"},
        "method": "dml",
        "train": {"epochs": 2, "batch_size": 16, "device": "cpu", "threads": 1},
        "output": {"report": False},
    }


@pytest.fixture(scope="module")
def finished(recipe: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Any:
    return distill(recipe, folder=tmp_path_factory.mktemp("dml") / "run", progress=False)


def test_both_are_measured(finished: Any) -> None:
    lines = [json.loads(line) for line in (finished.folder / "metrics.jsonl").read_text().splitlines()]
    seen = [
        line["metrics"] for line in lines if line["kind"] == "evaluation" and line["split"] == "validation"
    ]
    assert len(seen) == 2
    for metrics in seen:
        for metric in ("accuracy", "calibration_error"):
            assert 0 <= metrics[metric] <= 1
            assert 0 <= metrics[f"teacher.{metric}"] <= 1
    teacher = finished.result["teachers"]["teacher"]
    assert teacher["validation"]["accuracy"] == pytest.approx(seen[-1]["teacher.accuracy"])
    assert 0 <= teacher["test"]["accuracy"] <= 1
    rates = next(line["lr"] for line in lines if line["kind"] == "train")
    assert set(rates) == {"student", "teacher"}


def test_the_trained_teacher_is_kept_beside_the_student(finished: Any, recipe: dict[str, Any]) -> None:
    kept = finished.folder / "teachers" / "teacher"
    saved = CheckpointFolder(finished.folder / "checkpoints", keep=2).latest()
    assert saved is not None
    weights = load_file(kept / "model.safetensors")
    assert all(
        torch.equal(saved.tensors["teacher.teacher"][f"model.{name}"], value)
        for name, value in weights.items()
    )
    config = ModelConfig(model="digits:cnn-6-8", weights=str(kept))
    again = build_model(config, outputs=10, input_shape=(1, 8, 8)).module.eval()
    inputs = torch.rand(2, 1, 8, 8)
    assert torch.equal(again(inputs), load_model(kept).module.eval()(inputs))
    fresh = build_model(ModelConfig(model="digits:cnn-6-8"), outputs=10, input_shape=(1, 8, 8)).module.eval()
    assert not torch.equal(again(inputs), fresh(inputs))


def test_a_teacher_that_was_only_read_is_not_kept(recipe: dict[str, Any], tmp_path: Path) -> None:
    run = distill(recipe | {"method": "kd"}, folder=tmp_path / "run", progress=False)
    assert not (run.folder / "teachers").exists()
