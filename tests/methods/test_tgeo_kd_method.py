"""tgeo_kd as a method: its outer step, what moves when, two ranks, resume, refusals, and its tables."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn
from training import assert_same, make_trainer, train

from support import Block, Net
from tutelage.data import Data, TensorSource, open_data
from tutelage.engine.needs import PairingError
from tutelage.engine.step import Step
from tutelage.functional import class_mean_prediction
from tutelage.methods.tgeo_kd.method import Rows, TGeoKD
from tutelage.recipe.schema import DataConfig
from tutelage.runs import check, distill

EVERY_STEP = {"outer_every": 1, "warmup": 0}
SLOW = {"outer_every": 2, "warmup": 1.0}


def prepared(options: dict[str, Any], **changes: Any) -> Any:
    trainer = make_trainer("tgeo_kd", options, **changes)
    trainer._prepare_once()
    return trainer


def context(trainer: Any) -> Step:
    trainer.whole.train()
    return Step(trainer.setup, next(trainer.loader.steps(0))[0], trainer.step)


def in_float64(trainer: Any) -> None:
    for module in (trainer.student, trainer.setup.teachers["teacher"].module, trainer.method):
        module.double()
    for source in (trainer.source, trainer.setup.streams["validation"].make().source):
        source.inputs = source.inputs.double()


@pytest.mark.parametrize(("how", "tolerance"), [("forward", 1e-9), ("difference", 1e-3)])
def test_the_ratio_networks_gradient_is_that_of_the_virtual_step(how: str, tolerance: float) -> None:
    """Against autograd through the whole virtual step, in float64."""
    trainer = prepared(EVERY_STEP | {"derivative": how})
    in_float64(trainer)
    method, ctx = trainer.method, context(trainer)
    terms = method(ctx)
    weights = list(method.ratio.parameters())
    found = torch.autograd.grad(terms["outer"].mean, weights)

    trainer.setup.streams["validation"].seek(0)
    teacher, parameters = ctx.teacher(), ctx.parameters()
    read = Rows.of(ctx.batch, ctx.student(params=parameters), teacher)
    losses, ratio = method.losses(read, ctx), method.ratios(read)
    inner = (ratio * losses.kd + (1 - ratio) * losses.label).mean()
    steps = torch.autograd.grad(inner, list(parameters.values()), create_graph=True)
    moved = {n: p - 0.1 * g for (n, p), g in zip(parameters.items(), steps, strict=True)}
    held_out = next(ctx.loader("validation"))
    outer = ctx.label_loss(ctx.student(held_out, params=moved), held_out).mean
    torch.testing.assert_close(terms["outer"].mean.detach(), outer.detach())
    for ours, exact in zip(found, torch.autograd.grad(outer, weights), strict=True):
        torch.testing.assert_close(ours, exact, rtol=tolerance, atol=1e-12)


def test_the_outer_term_moves_the_ratio_network_alone() -> None:
    trainer = prepared(EVERY_STEP)
    terms = trainer.method(context(trainer))
    student = [p for n, p in trainer.parameters.items() if n.startswith("student.")]
    ratio = list(trainer.method.ratio.parameters())
    of_outer = torch.autograd.grad(
        terms["outer"].mean, [*student, *ratio], retain_graph=True, allow_unused=True
    )
    assert all(part is None for part in of_outer[: len(student)])
    assert any(bool((part != 0).any()) for part in of_outer[len(student) :])
    inner = terms["label"].mean + terms["kd"].mean
    assert all(
        part is None for part in torch.autograd.grad(inner, ratio, allow_unused=True, retain_graph=True)
    )


def test_it_moves_only_in_outer_steps() -> None:
    """Warm-up of one epoch (4 steps), then every second step."""
    trainer = make_trainer("tgeo_kd", SLOW, epochs=2)
    moved = []
    for _ in range(8):
        before = {n: p.detach().clone() for n, p in trainer.parameters.items()}
        trainer.run(1)
        changed = {n.split(".")[0] for n, p in trainer.parameters.items() if not torch.equal(p, before[n])}
        assert "student" in changed
        moved.append("method" in changed)
    assert moved == [False] * 4 + [True, False, True, False]
    assert trainer.setup.streams["validation"].drawn == 2


def test_a_network_that_does_not_learn_stays_as_drawn() -> None:
    trainer: Any = make_trainer("tgeo_kd", {"learn": False, "warmup": 0})
    before = [p.detach().clone() for p in trainer.method.ratio.parameters()]
    trainer.run()
    assert all(torch.equal(a, b) for a, b in zip(before, trainer.method.ratio.parameters(), strict=True))
    assert trainer.setup.streams["validation"].drawn == 0


def test_class_means_are_the_teachers_over_the_training_rows() -> None:
    trainer = prepared(EVERY_STEP)
    source = trainer.source
    said = trainer.setup.teachers["teacher"].outputs(source.fetch(range(len(source)))).logits.softmax(1)
    wanted = class_mean_prediction(said, source.target, spread=False)
    torch.testing.assert_close(trainer.method.class_mean, wanted)


def test_virtual_steps_leave_batch_norm_alone() -> None:
    """Its running statistics move once a step, whatever the outer step does."""

    class Normed(Net):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm1d(6)

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(self.norm(x))

    trainer = make_trainer("tgeo_kd", EVERY_STEP, student=Normed())
    trainer.run(3)
    assert trainer.student.model.get_buffer("norm.num_batches_tracked").item() == 3


def test_every_pass_over_a_batch_has_the_same_dropout() -> None:
    """With unlike masks a central difference would be noise divided by a small step."""
    slopes = {}
    for how in ("forward", "difference"):
        trainer = prepared(EVERY_STEP | {"derivative": how}, student=Net(dropout=0.5, seed=2))
        in_float64(trainer)
        torch.manual_seed(0)
        outer = trainer.method(context(trainer))["outer"].mean
        slopes[how] = torch.cat(
            [g.flatten() for g in torch.autograd.grad(outer, list(trainer.method.ratio.parameters()))]
        )
    torch.testing.assert_close(slopes["forward"], slopes["difference"], rtol=1e-2, atol=1e-7)


def test_a_layer_without_a_forward_rule_gets_differences_and_a_warning() -> None:
    class Backwards(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return 2 * x

        @staticmethod
        def backward(ctx: Any, gradient: Tensor) -> Tensor:
            return 2 * gradient

    class Odd(Block):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(Backwards.apply(x))

    student = Net(seed=2)
    student.blocks[0] = Odd(8)
    trainer = make_trainer("tgeo_kd", EVERY_STEP, student=student)
    with pytest.warns(UserWarning, match="central differences.*derivative=difference"):
        trainer.run(1)
    trainer.run(1)
    assert trainer.method.derivative == "difference"


def test_attention_has_a_forward_rule() -> None:
    class Attends(Net):
        def forward(self, x: Tensor) -> Tensor:
            tokens = self.stem(x).view(len(x), 1, 2, 4)
            mixed = nn.functional.scaled_dot_product_attention(tokens, tokens, tokens)
            given: Tensor = self.head(self.blocks(mixed.reshape(len(x), 8)))
            return given

    trainer = make_trainer("tgeo_kd", EVERY_STEP, student=Attends(seed=2))
    trainer.run(1)
    assert trainer.method.derivative == "forward"


def test_masked_rows_do_not_count() -> None:
    trainer = prepared(EVERY_STEP)
    ctx = context(trainer)
    kept = torch.tensor([1, 1, 1, 0, 0, 1, 0, 1])
    ctx.batch = ctx.batch.replace(mask=kept)
    masked = {name: term.mean.item() for name, term in trainer.method(ctx).items()}
    trainer.setup.streams["validation"].seek(0)
    ctx.batch = ctx.batch.replace(mask=None).select(kept.bool())
    alone = {name: term.mean.item() for name, term in trainer.method(ctx).items()}
    assert masked == pytest.approx(alone, rel=1e-5)


@pytest.mark.parametrize(
    "options", [EVERY_STEP, EVERY_STEP | {"edges": "squared", "derivative": "difference"}]
)
def test_two_ranks_give_the_losses_of_one(options: dict[str, Any], pair: Any) -> None:
    alone = train("tgeo_kd", options)
    for found in pair.run(train, "tgeo_kd", options):
        assert_same(alone, found, tolerance=2e-5 if "derivative" in options else 1e-5)


def recipe(**data: Any) -> dict[str, Any]:
    return {
        "data": {"path": "digits", "limit": 64, "validation": 32, "test": 40} | data,
        "teacher": {"model": "digits:mlp-16"},
        "student": {"model": "digits:mlp-8"},
        "method": {"name": "tgeo_kd", **EVERY_STEP},
        "train": {"epochs": 2, "batch_size": 16, "device": "cpu", "threads": 1},
        "output": {"report": False},
    }


def test_what_it_leaves(tmp_path: Path) -> None:
    tables = distill(recipe(), folder=tmp_path / "run", progress=False).result["tables"]
    epochs = [
        dict(zip(tables["ratio by epoch"]["columns"], row, strict=True))
        for row in tables["ratio by epoch"]["rows"]
    ]
    assert [row["epoch"] for row in epochs] == [1, 2]
    for row in epochs:
        assert 0 < row["least_ratio"] <= row["mean_ratio"] <= row["largest_ratio"] < 1
        assert 0 < row["entropy"] <= 0.6932
    by_teacher = tables["ratio by teacher correctness"]["rows"]
    assert sum(row[2] for row in by_teacher) == pytest.approx(1)
    assert all(0 <= row[0] <= 1 and 0 < row[1] < 1 for row in by_teacher)


def test_it_refuses_the_test_data_as_validation() -> None:
    found = open_data(DataConfig(path="digits", test=40, validation=32), "classification")
    same = Data(found.train, found.test, found.test, found.info, found.origin)
    with pytest.raises(
        PairingError, match=r"`tgeo_kd` learns from data\.validation, and that is the test data"
    ):
        check(recipe(), data=same)
    with pytest.raises(PairingError, match=r"needs the further data `validation`; set data\.validation"):
        check(recipe(validation=None))
    named = Data(
        found.train,
        TensorSource(torch.rand(9, 1, 8, 8), torch.zeros(9, dtype=torch.int64)),
        None,
        found.info,
        {},
    )
    with pytest.raises(PairingError, match="that is the test data"):
        check(recipe(validation="test", test=None), data=named)


def test_options_out_of_range() -> None:
    for bad in (
        {"hidden": (0,)},
        {"outer_every": 0},
        {"warmup": -1.0},
        {"edges": "round"},
        {"temperature": 0},
    ):
        with pytest.raises(ValidationError):
            TGeoKD.Config(name="tgeo_kd", **bad)
