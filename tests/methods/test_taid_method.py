"""taid as a method: its terms, the schedule over micro-batches and ranks, resume, lists of methods, what is refused."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import contract
import pytest
import torch
from pydantic import ValidationError
from ranks import assert_same, build, exact, make, train
from torch import Tensor

from killing import stop_after
from tutelage.engine.combine import Combined
from tutelage.engine.loop import Trainer
from tutelage.engine.method import Method
from tutelage.engine.needs import Offers, Setting, check_pairing
from tutelage.engine.step import Step
from tutelage.engine.types import Term
from tutelage.functional import taid_loss, taid_schedule, token_divergences
from tutelage.functional.adaptive_kl import adaptive_kl_loss
from tutelage.functional.analytic import make_divergence
from tutelage.functional.fused_vocabulary import Vocabulary
from tutelage.methods.taid.functional import mixed_logits
from tutelage.methods.taid.method import POINTS, TAID

TASKS = ("language-model", "classification")
DIVERGENCES = {
    "forward_kl": {},
    "reverse_kl": {},
    "symmetric_kl": {"weight": 0.3},
    "skewed_forward_kl": {"skew": 0.2},
    "skewed_reverse_kl": {"skew": 0.2},
    "generalized_jsd": {"beta": 0.3},
    "adaptive_kl": {"mu": 0.4},
    "total_variation": {},
}


def taid(**options: Any) -> TAID:
    return TAID(TAID.Config(name="taid", **options))


def trainer_of(method: Method, task: str = "language-model", masked: bool = False, **changes: Any) -> Trainer:
    return make(method, "ddp", masked, "fp32", task, **{"accumulate": 1, "clip": None, "ema": None} | changes)


def first_step(
    method: Method, task: str = "language-model", masked: bool = False
) -> tuple[dict[str, Term], Step]:
    trainer = trainer_of(method, task, masked)
    ctx = Step(trainer.setup, trainer.source.fetch(list(range(12))), 0)
    return method(ctx), ctx


def plain_loss(name: str, student: Tensor, teacher: Tensor, mask: Tensor | None, **options: Any) -> Tensor:
    if name == "adaptive_kl":
        return adaptive_kl_loss(student, teacher, mask, **options)
    loss: Tensor = getattr(token_divergences, f"{name}_loss")(student, teacher, mask, **options)
    return loss


# --- terms


@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
@pytest.mark.parametrize("fused", [False, True], ids=["plain", "fused"])
@pytest.mark.parametrize("task", TASKS)
def test_terms_carry_their_weights(task: str, fused: bool, masked: bool) -> None:
    method = taid(label_weight=0.25, loss_weight=0.75, t_start=0.3, fused=fused)
    terms, ctx = first_step(method, task, masked)
    student, teacher = ctx.seen["student"].logits, ctx.seen["teacher teacher"].logits
    label = ctx.label_loss(ctx.seen["student"]).mean
    wanted = {"label": 0.25 * label, "taid": 0.75 * taid_loss(student, teacher, ctx.batch.mask, t=0.3)}
    torch.testing.assert_close({name: term.mean for name, term in terms.items()}, wanted)
    assert {term.items for term in terms.values()} == {ctx.items}


@pytest.mark.parametrize("name", DIVERGENCES)
def test_any_divergence_is_taken_from_the_moving_target(name: str) -> None:
    terms, ctx = first_step(taid(divergence=name, options=DIVERGENCES[name], schedule_loss="cross_entropy"))
    student, teacher = ctx.seen["student"].logits, ctx.seen["teacher teacher"].logits
    options = DIVERGENCES[name] | ({"subtract_entropy": False} if name == "forward_kl" else {})
    wanted = plain_loss(name, student, mixed_logits(student, teacher, 0.4), ctx.batch.mask, **options)
    torch.testing.assert_close(terms["taid"].mean, wanted)
    assert terms.keys() == {"taid"}


@pytest.mark.parametrize("name", DIVERGENCES)
def test_fused_is_plain(name: str) -> None:
    """Through whole runs: losses, gradient norms, weights and the schedule."""
    found = {}
    with exact():
        for fused in (True, False):
            options = {"divergence": name, "options": DIVERGENCES[name], "label_weight": 0.5, "fused": fused}
            trainer = trainer_of(taid(**options))
            trainer.fit()
            found[fused] = dict(trainer.parameters) | dict(trainer.method.named_buffers())
    torch.testing.assert_close(found[True], found[False], rtol=1e-9, atol=1e-9, equal_nan=True)


@pytest.mark.parametrize("t", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("name", DIVERGENCES)
def test_its_gradient_is_that_of_autograd(name: str, t: float) -> None:
    """With entries of -inf on either side, which are left out."""
    generator = torch.Generator().manual_seed(0)
    student, teacher = torch.randn(2, 5, 9, generator=generator, dtype=torch.float64) * 3
    student[0, 1] = student[1, 4] = teacher[1, 2] = teacher[2, 2] = -math.inf
    logits = student.clone().requires_grad_()
    wanted = plain_loss(name, logits, mixed_logits(student, teacher, t), None, **DIVERGENCES[name])
    (gradient,) = torch.autograd.grad(wanted, logits)
    of = make_divergence(name, **DIVERGENCES[name])
    divergence: Any = make_divergence("taid", t=torch.tensor(t, dtype=torch.float64), of=of)
    value, found = divergence(student.log_softmax(-1), teacher.log_softmax(-1), Vocabulary(9))
    torch.testing.assert_close(value.mean(), wanted.detach())
    torch.testing.assert_close(found / len(found), gradient)


# --- schedule


class Losses:
    """Keeps the divergence of every step."""

    def __init__(self, trainer: Trainer) -> None:
        self.found: list[float] = []
        trainer.events.add(self)

    def on_step_end(self, trainer: Trainer) -> None:
        self.found.append(float(trainer.last[0]["taid"]))


def path_of(method: Method) -> list[list[Any]]:
    return method.tables()["taid schedule"].rows


@pytest.mark.parametrize(
    "options", [{}, {"adaptive": False}, {"schedule_loss": "kl"}, {"divergence": "reverse_kl"}]
)
def test_the_schedule_is_that_of_the_losses(options: dict[str, Any]) -> None:
    numbers = {"t_start": 0.2, "t_end": 0.9, "alpha": 0.5, "beta": 0.8}
    with exact():
        trainer = trainer_of(taid(**numbers, **options), steps=6)
        losses = Losses(trainer)
        trainer.fit()
    steps = torch.arange(1, 7)
    wanted = taid_schedule(
        torch.tensor(losses.found, dtype=torch.float64),
        steps,
        6,
        **numbers,
        adaptive=options.get("adaptive", True),
    )
    rows = path_of(trainer.method)
    assert [row[0] for row in rows] == steps.tolist()
    assert [row[1] for row in rows] == pytest.approx(wanted.t.tolist(), rel=1e-12)
    assert [row[2] for row in rows] == pytest.approx(wanted.momentum.tolist(), rel=1e-9, abs=1e-12)
    assert [row[3] for row in rows] == pytest.approx(losses.found, rel=1e-12)
    assert rows[0][4] is None
    assert [row[4] for row in rows[1:]] == pytest.approx(wanted.delta_t[1:].tolist(), rel=1e-9)


@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
def test_a_step_in_four_parts_moves_as_one_does(masked: bool) -> None:
    paths = []
    with exact():
        for parts in (1, 4):
            trainer = trainer_of(taid(alpha=0.5), masked=masked, steps=4, batch_size=32, accumulate=parts)
            trainer.fit()
            paths.append(torch.tensor([row[1:4] for row in path_of(trainer.method)], dtype=torch.float64))
    torch.testing.assert_close(*paths, rtol=1e-10, atol=1e-10)


def test_after_every_forward_it_moves_as_often_as_there_are_parts() -> None:
    with exact():
        trainer = trainer_of(taid(alpha=0.5, update_every="forward"), steps=3, accumulate=2)
        losses: list[float] = []
        objective = trainer.method.objective

        def kept(*args: Any) -> dict[str, Term]:
            terms = objective(*args)
            losses.append(terms["taid"].mean.item())
            return terms

        trainer.method.objective = kept  # type: ignore[assignment, method-assign]
        trainer.fit()
    steps = torch.tensor([0, 0, 1, 1, 2, 2])
    wanted = taid_schedule(torch.tensor(losses, dtype=torch.float64), steps, 3, alpha=0.5)
    assert [row[1] for row in path_of(trainer.method)] == pytest.approx(wanted.t[1::2].tolist(), rel=1e-12)


def forwards(sharding: str) -> dict[str, Tensor]:
    """The schedule of a run that moves after every forward, in this process or a pair's."""
    with exact():
        trainer = make(taid(alpha=0.5, update_every="forward"), sharding, True, "fp32", "language-model")
        trainer.fit()
    return {name: value.clone() for name, value in trainer.method.named_buffers()}


def test_two_ranks_move_together_after_every_forward(pair: Any) -> None:
    wanted = forwards("ddp")
    for found in pair.run(forwards, "ddp"):
        torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-9, equal_nan=True)


def test_it_ends_at_the_teacher_and_never_goes_back() -> None:
    trainer = trainer_of(taid(t_end=0.8), steps=5)
    trainer.fit()
    path = [row[1] for row in path_of(trainer.method)]
    assert path == sorted(path)
    assert path[0] == 0.4
    assert path[-1] == 0.8


def test_where_nothing_counts_it_stays_as_it_is() -> None:
    method = taid()
    trainer = trainer_of(method)
    trainer.run(1)
    before = [value.clone() for value in method.state]
    batch = trainer.source.fetch([0, 1])
    nothing = batch.replace(mask=torch.zeros_like(batch.mask), target=torch.full_like(batch.target, -100))  # type: ignore[arg-type]
    ctx = Step(trainer.setup, nothing, 1)
    loss = method(ctx)["taid"].mean
    loss.backward()
    method.after_step(ctx)
    assert loss.item() == 0
    for found, wanted in zip(method.state, before, strict=True):
        torch.testing.assert_close(found, wanted, rtol=0, atol=0, equal_nan=True)
    method.pending += torch.tensor([math.nan, 3.0])
    method.after_step(ctx)
    assert method.t == before[0]


def test_a_long_run_keeps_few_rows() -> None:
    trainer = trainer_of(taid(), steps=2 * POINTS, batch_size=2)
    trainer.fit()
    assert [row[0] for row in path_of(trainer.method)] == [2 * row + 2 for row in range(POINTS)]
    plots = trainer.method.tables()["taid schedule"].plots
    assert [plot.y for plot in plots] == [("t",), ("momentum",), ("loss",), ("delta_t",)]


def test_a_killed_run_has_the_same_schedule(tmp_path: Path) -> None:
    """To the bit, though it is killed where nothing is saved."""
    whole = contract.run("taid", tmp_path / "whole")
    stop_after(3, lambda kill: contract.run("taid", tmp_path / "killed", callbacks=[kill]))
    again = contract.run("taid", tmp_path / "killed", resume=True)
    rows = whole.result["tables"]["taid schedule"]["rows"]
    assert [row[0] for row in rows] == list(range(1, contract.STEPS + 1))
    assert again.result["tables"]["taid schedule"]["rows"] == rows


# --- beside other methods, and what is refused


def test_beside_another_method_the_label_loss_counts_once() -> None:
    first = taid(label_weight=0.5, alpha=0.5)
    combined = Combined([first, build("fkl")])
    terms, ctx = first_step(combined)
    assert terms.keys() == {"label", "taid", "forward_kl"}
    combined.after_step(ctx)
    assert first.previous == pytest.approx(terms["taid"].mean.item(), rel=1e-6)
    gradients = torch.autograd.grad(terms["taid"].mean, list(ctx.parameters().values()), retain_graph=True)
    alone = taid_loss(ctx.seen["student"].logits, ctx.seen["teacher teacher"].logits, ctx.batch.mask, t=0.4)
    wanted = torch.autograd.grad(alone, list(ctx.parameters().values()))
    torch.testing.assert_close(gradients, wanted, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"t_start": 0.8, "t_end": 0.5}, "t_start is 0.8, above t_end, 0.5"),
        ({"t_start": 1.0}, "less than 1"),
        ({"t_end": 0.0}, "greater than 0"),
        ({"alpha": 1.5}, "less than or equal to 1"),
        ({"beta": -0.1}, "greater than or equal to 0"),
        ({"loss_weight": 0.0}, "greater than 0"),
        ({"divergence": "taid"}, "forward_kl"),
        ({"divergence": "reverse_kl", "schedule_loss": "kl"}, "belongs to divergence: forward_kl"),
        ({"divergence": "generalized_jsd", "options": {"skew": 0.1}}, "generalized_jsd takes beta; got skew"),
        ({"divergence": "generalized_jsd", "options": {"beta": 2.0}}, "beta must lie in"),
        ({"options": {"subtract_entropy": 1.0}}, "said by schedule_loss"),
    ],
)
def test_options_that_do_not_fit(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        taid(**options)


def test_a_store_of_the_likeliest_tokens_is_refused() -> None:
    setting = Setting("language-model", frozenset({"target"}))
    assert not check_pairing("taid", TAID.needs, {"teacher": Offers(scale="log_probs")}, setting)
    (reason,) = check_pairing("taid", TAID.needs, {"teacher": Offers(logits="topk")}, setting)
    assert "needs dense logits; this teacher gives topk" in reason


def test_two_ranks_with_another_divergence_and_labels_are_one_process(pair: Any) -> None:
    wanted = with_labels()
    for found in pair.run(with_labels):
        assert_same(wanted, found)


def with_labels() -> dict[str, Any]:
    options = {"label_weight": 0.5, "divergence": "generalized_jsd", "options": {"beta": 0.2}}
    contract.OPTIONS["taid"] = options
    try:
        return train("taid", "ddp", True, "fp32", "language-model")
    finally:
        del contract.OPTIONS["taid"]
