"""dhkd: which head gets which loss, gradient alignment in launches, what is measured, what ships, what is refused."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import contract
import pytest
import torch
import torch.nn.functional as F
from objectives import CLASSES, Pairing
from pydantic import ValidationError
from torch import Tensor, nn
from training import assert_same, make_method, make_trainer, train

from support import Net, rows, train_config
from tutelage.engine.checkpoint import CheckpointFolder
from tutelage.engine.combine import Combined
from tutelage.engine.loop import Trainer
from tutelage.engine.needs import Offers, PairingError, Setting, check_pairing
from tutelage.engine.runtime import Runtime
from tutelage.engine.step import Step
from tutelage.functional import align_gradients, binary_kl_norm_loss, gradient_dot, neural_collapse
from tutelage.methods.dhkd.method import DHKD
from tutelage.methods.dhkd.model import NonlinearHead
from tutelage.recipe.schema import OptimizerConfig
from tutelage.runs import distill
from tutelage.tasks import build_task
from tutelage.teachers.local import LocalTeacher

CONFLICT = 7
"""Seed of a student whose two gradients are against each other in each of its four steps."""
ALIGNED = {"head": "linear", "align_gradients": True, "loss_weight": 3.0}


def dhkd(**options: Any) -> DHKD:
    return DHKD(DHKD.Config(name="dhkd", **options))


# --- terms


@pytest.mark.parametrize("mask", [None, torch.tensor([1, 0, 1, 1, 0, 1])], ids=["all", "masked"])
@pytest.mark.parametrize("head", ["linear", "nonlinear", "own"])
def test_terms_carry_their_weights(head: str, mask: Tensor | None) -> None:
    made: Any = Pairing(
        dhkd(head=head, label_weight=0.5, loss_weight=2.0, temperature=3.0, eps=1e-6, dropout=0.0)
    )
    made.batch = made.batch.replace(mask=mask)
    kept = slice(None) if mask is None else mask.bool()
    own = made.method.head
    logits = made.student.logits if own is None else own(made.student.feature())
    assert made.batch.target is not None
    wanted = {
        "label": 0.5 * F.cross_entropy(made.student.logits[kept], made.batch.target[kept]),
        "binary_kl": 2.0 * binary_kl_norm_loss(logits[kept], made.teacher.logits[kept], 3.0, 1e-6),
    }
    torch.testing.assert_close({name: term.mean for name, term in made.terms().items()}, wanted)


def test_each_head_gets_its_own_loss_and_the_trunk_both() -> None:
    made: Any = Pairing(dhkd())
    student: Any = made.nets[0].model
    terms = made.terms()
    for name, own, other in (
        ("label", student.head, made.method.head),
        ("binary_kl", made.method.head, student.head),
    ):
        terms[name].mean.backward(retain_graph=True)
        assert own.weight.grad is not None
        assert other.weight.grad is None
        assert student.layer1[0].weight.grad is not None
        student.zero_grad()
        made.method.zero_grad()


def test_heads_by_option() -> None:
    heads: dict[str, Any] = {
        head: Pairing(dhkd(head=head, hidden=16, dropout=0.3)).method.head
        for head in ("linear", "nonlinear", "own")
    }
    assert (heads["linear"].in_features, heads["linear"].out_features) == (6, CLASSES)
    nonlinear: Any = heads["nonlinear"]
    assert isinstance(nonlinear, NonlinearHead)
    assert (nonlinear[0].out_features, nonlinear[1].p) == (16, 0.3)
    assert heads["own"] is None


# --- gradient alignment


def one_step(options: dict[str, Any], **changes: Any) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Both losses' gradients merged by hand, and what an optimiser step of rate 0.1 made of them."""
    made: Any = make_trainer("dhkd", options, student=Net(seed=CONFLICT), **changes)
    parameters = list(made.parameters.values())
    before = [p.detach().clone() for p in parameters]
    batches = next(made.loader.steps(0))
    terms = [made.whole(Step(made.setup, made._on_device(batch), 0)) for batch in batches]
    parts = []
    for name in ("label", "binary_kl"):
        loss = torch.stack([each[name].mean for each in terms]).mean()
        parts.append(torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True))
    assert gradient_dot(*parts) < 0, "the case has to be one of conflict"
    made.run(1)
    merged = {}
    moved = {}
    for name, old, new, wanted in zip(
        made.parameters, before, parameters, align_gradients(*parts), strict=True
    ):
        merged[name] = torch.zeros_like(old) if wanted is None else wanted
        moved[name] = (old - new.detach()) / 0.1
    return merged, moved


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_step_has_the_aligned_gradient_of_its_whole_batch(accumulate: int) -> None:
    merged, moved = one_step(ALIGNED, accumulate=accumulate)
    torch.testing.assert_close(moved, merged, rtol=1e-4, atol=1e-6)


def test_clipping_comes_after_the_alignment() -> None:
    merged, moved = one_step(ALIGNED, clip=0.01)
    norm = torch.cat([g.flatten() for g in merged.values()]).norm()
    assert norm > 0.01
    wanted = {name: gradient * (0.01 / norm) for name, gradient in merged.items()}
    torch.testing.assert_close(moved, wanted, rtol=1e-3, atol=1e-6)


def test_watching_changes_nothing() -> None:
    plain, watched = (make_trainer("dhkd", {"watch_gradients": on}) for on in (False, True))
    for made in (plain, watched):
        made.run()
    for name, parameter in plain.parameters.items():
        torch.testing.assert_close(watched.parameters[name], parameter, rtol=1e-5, atol=1e-7)


class Idle(Net):
    """With a parameter that no loss reaches."""

    def __init__(self) -> None:
        super().__init__(seed=2)
        self.idle = nn.Parameter(torch.ones(3))


@pytest.mark.parametrize("dense", [False, True])
def test_weight_decay_moves_idle_parameters_only_where_their_gradient_is_dense(dense: bool) -> None:
    decay = OptimizerConfig(name="sgd", lr=0.1, weight_decay=0.5)
    options = {"align_gradients": True, "dense_gradients": dense}
    made: Any = make_trainer("dhkd", options, student=Idle(), optimizer=decay)
    made.run(1)
    idle = made.student.model.idle.detach()
    assert (idle < 1).all() if dense else (idle == 1).all()


def test_half_of_the_terms_is_enough() -> None:
    for options in ({"label_weight": 0.0}, {"loss_weight": 0.0}):
        made: Any = make_trainer("dhkd", {"align_gradients": True, **options})
        made.run(1)
        assert made.step == 1


# --- what is measured


def test_cosines_by_epoch() -> None:
    made: Any = make_trainer("dhkd", {"head": "own", "watch_gradients": True}, steps=10)
    parameters = list(made.parameters.values())
    names = list(made.parameters)
    wanted = []
    for step in range(4):
        batch = next(made.loader.steps(step))[0]
        terms = made.whole(Step(made.setup, made._on_device(batch), step))
        grads = [
            torch.autograd.grad(terms[name].mean, parameters, retain_graph=True)
            for name in ("label", "binary_kl")
        ]
        by_part = []
        for classifier in (True, False):
            one, two = (
                torch.cat(
                    [g.flatten() for n, g in zip(names, gs, strict=True) if ("head" in n) == classifier]
                )
                for gs in grads
            )
            by_part.append(F.cosine_similarity(one, two, dim=0).item())
        wanted.append(by_part)
        made.run(1)
    made.run(6)
    table = made.method.tables()["gradient_cosines"]
    assert table.columns == ["epoch", "classifier", "trunk"]
    assert [row[0] for row in table.rows] == [1, 2]
    assert table.rows[0][1:] == pytest.approx(torch.tensor(wanted).mean(0).tolist(), abs=1e-5)


def test_a_part_that_one_loss_alone_reaches_has_no_cosine() -> None:
    made: Any = make_trainer("dhkd", {"watch_gradients": True})
    made.run()
    ((epoch, classifier, trunk),) = made.method.tables()["gradient_cosines"].rows
    assert (epoch, classifier) == (1, None)
    assert -1 <= trunk <= 1
    assert make_trainer("dhkd").method.tables() == {}


def test_the_cosines_go_on_after_a_resume(tmp_path: Path) -> None:
    options = {"head": "own", "watch_gradients": True}
    whole = make_trainer("dhkd", options, steps=10)
    whole.run()
    first = make_trainer("dhkd", options, steps=10)
    first.checkpoints = CheckpointFolder(tmp_path / "checkpoints", keep=2)
    first.run(6)
    first.save()
    second = make_trainer("dhkd", options, steps=10)
    second.checkpoints = CheckpointFolder(tmp_path / "checkpoints", keep=2)
    assert second.restore()
    second.run()
    assert second.method.tables() == whole.method.tables()


@pytest.mark.parametrize("head", ["linear", "nonlinear", "own"])
def test_neural_collapse_of_every_linear_head(head: str) -> None:
    made: Any = make_trainer("dhkd", {"head": head}, steps=2)
    made.run()
    table = made.tables()["neural_collapse"]
    net, source = made.student.model.eval(), rows()
    features = net.blocks(net.stem(source.inputs))
    heads = {"own": net.head.weight} | ({"second": made.method.head.weight} if head == "linear" else {})
    assert [row[0] for row in table.rows] == list(heads)
    for row, weight in zip(table.rows, heads.values(), strict=True):
        found = neural_collapse(features, source.target, 4, weight)
        assert row[1:] == pytest.approx([value.item() for value in found if value is not None], rel=1e-3)


def test_classes_without_rows_are_left_out_of_it() -> None:
    made: Any = make_trainer("dhkd")
    made.source.target[made.source.target == 3] = 0
    (own, _) = made.tables()["neural_collapse"].rows
    assert all(value is not None for value in own)
    made.source.target.zero_()
    assert made.tables() == {}


# --- launches


def aligned(sharding: str, accumulate: int = 1) -> dict[str, Any]:
    return train("dhkd", ALIGNED, sharding, student=Net(seed=CONFLICT), accumulate=accumulate)


def nonlinear(sharding: str) -> dict[str, Any]:
    return train("dhkd", {"head": "nonlinear", "dropout": 0.0, "align_gradients": True}, sharding)


@pytest.mark.parametrize("sharding", ["ddp", "fsdp"])
@pytest.mark.parametrize("case", [aligned, nonlinear])
def test_two_ranks_give_the_losses_of_one(case: Any, sharding: str, pair: Any) -> None:
    """The dot products of sharded gradients are those of the whole ones."""
    alone = case("ddp")
    for found in pair.run(case, sharding):
        assert_same(alone, found)


def collapse(sharding: str) -> list[Any]:
    made: Any = make_trainer("dhkd", {"watch_gradients": True}, sharding)
    made.run()
    tables = made.tables()
    return [tables["neural_collapse"].rows, tables["gradient_cosines"].rows]


@pytest.mark.parametrize("sharding", ["ddp", "fsdp"])
def test_ranks_measure_the_same_as_one(sharding: str, pair: Any) -> None:
    alone = collapse("ddp")
    for found in pair.run(collapse, sharding):
        for wanted, got in zip(alone, found, strict=True):
            for one, other in zip(wanted, got, strict=True):
                assert other[0] == one[0]
                assert [v for v in other[1:] if v is not None] == pytest.approx(
                    [v for v in one[1:] if v is not None], rel=1e-3, abs=1e-4
                )


def test_micro_batches_give_the_step_of_one_batch() -> None:
    assert_same(aligned("ddp"), aligned("ddp", accumulate=4), tolerance=1e-6)


# --- a run, and what is refused


def test_the_second_head_is_saved_with_checkpoints_and_does_not_ship(tmp_path: Path) -> None:
    result = distill(contract.recipe("dhkd"), folder=tmp_path / "run", progress=False)
    saved = CheckpointFolder(tmp_path / "run" / "checkpoints", keep=2).latest()
    assert saved is not None
    assert set(saved.tensors["method"]) == {"head.weight", "head.bias"}
    assert len([name for name, _ in result.student.named_modules() if "head" in name]) == 1
    assert "neural_collapse" in result.result["tables"]


def test_alignment_runs_alone_and_two_heads_in_a_list() -> None:
    with pytest.raises(
        PairingError, match=r"`dhkd` cannot be combined .* weighs the gradients of its own terms"
    ):
        Combined([make_method("kd", {}), dhkd(align_gradients=True)])
    assert Combined([make_method("kd", {}), dhkd()]).needs.scale == "raw"


class LogSoftmax(Net):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).log_softmax(1)


def test_a_teacher_of_log_probabilities_is_warned_of() -> None:
    source = rows()

    def run(net: nn.Module) -> None:
        made = Trainer(
            Runtime("cpu"),
            Net(seed=2),
            dhkd(),
            build_task("classification", 4),
            source,
            train_config(steps=1),
            teachers={"teacher": LocalTeacher("teacher", net, source.inputs[:2]).freeze()},
        )
        made.run()

    with pytest.warns(UserWarning, match="reads raw logits, and this teacher's look like log-probabilities"):
        run(LogSoftmax(seed=1))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run(Net(seed=1))


def test_stores_of_anything_but_raw_dense_logits_are_refused() -> None:
    setting = Setting("classification", frozenset({"target"}))

    def reasons(**offers: Any) -> list[str]:
        teacher = Offers(live=False, trainable=False, input_gradient=False, taps=False, **offers)
        return check_pairing("dhkd", DHKD.needs, {"t": teacher}, setting)

    assert reasons() == []
    assert reasons(scale="log_probs") == [
        "`dhkd` needs raw logits; this teacher gives log-probabilities (teacher `t`)"
    ]
    assert reasons(logits="topk") == ["`dhkd` needs dense logits; this teacher gives topk (teacher `t`)"]


def test_one_row_a_micro_batch_is_refused_with_a_hidden_layer() -> None:
    with pytest.raises(ValueError, match=r"dhkd's head has a BatchNorm, .* lower train.accumulate"):
        make_trainer("dhkd", {"head": "nonlinear"}, batch_size=1).dry_step()
    assert make_trainer("dhkd", batch_size=1).dry_step()["binary_kl"] > 0


def test_card_defaults_needs_and_bounds() -> None:
    config = DHKD.Config(name="dhkd")
    assert (config.temperature, config.label_weight, config.loss_weight, config.eps) == (2.0, 1.0, 1.0, 1e-8)
    assert (config.head, config.hidden, config.dropout) == ("linear", 200, 0.1)
    assert not any((config.align_gradients, config.dense_gradients, config.watch_gradients))
    assert (DHKD.needs.logits, DHKD.needs.scale, DHKD.needs.teacher_taps) == (("dense",), "raw", False)
    assert dhkd(head="nonlinear").needs.couples_rows
    assert not dhkd().needs.couples_rows
    for option in ({"temperature": 0}, {"head": "two"}, {"eps": 0.5}, {"dense_gradients": True}):
        with pytest.raises(ValidationError, match=next(iter(option))):
            dhkd(**option)
