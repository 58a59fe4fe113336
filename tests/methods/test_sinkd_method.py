"""sinkd as a method: its terms for rows and tokens, which tokens are compared, launches, text, what is refused."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from ranks import exact, make
from torch import Tensor

from tutelage.engine.loop import Trainer
from tutelage.engine.runtime import Runtime
from tutelage.engine.step import Step
from tutelage.engine.types import Batch, Outputs, Term
from tutelage.functional import annealed_temperature, sinkd_loss, soft_cross_entropy_loss
from tutelage.methods.sinkd.compared import Compared
from tutelage.methods.sinkd.method import SinKD
from tutelage.recipe import load_recipe
from tutelage.runs import distill
from tutelage.runs.assemble import assemble

TASKS = ("classification", "language-model")


def sinkd(**options: Any) -> SinKD:
    return SinKD(SinKD.Config(name="sinkd", **options))


def trainer_of(method: SinKD, task: str, masked: bool = False, **changes: Any) -> Trainer:
    return make(method, "ddp", masked, "fp32", task, **{"accumulate": 1, "clip": None, "ema": None} | changes)


def first_step(
    method: SinKD, task: str, masked: bool = False, rows: int = 12, **fields: Any
) -> tuple[dict[str, Term], Step]:
    trainer = trainer_of(method, task, masked)
    batch = trainer.source.fetch(list(range(rows))).replace(**fields)
    ctx = Step(trainer.setup, batch, 0)
    return method(ctx), ctx


def counted_logits(ctx: Step) -> tuple[Tensor, Tensor]:
    student, teacher = (ctx.seen[name].logits for name in ("student", "teacher teacher"))
    mask = ctx.batch.mask
    return (student, teacher) if mask is None else (student[mask], teacher[mask])


# --- terms


@pytest.mark.parametrize("fused", [False, True], ids=["plain", "fused"])
@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
@pytest.mark.parametrize("task", TASKS)
def test_terms_carry_their_weights(task: str, masked: bool, fused: bool) -> None:
    transport = {"temperature": 1.5, "epsilon": 0.2, "n_iters": 7, "scale": 0.5, "reduction": "mean"}
    terms, ctx = first_step(
        sinkd(alpha=0.7, kd_temperature=3.0, beta=0.6, fused=fused, **transport), task, masked
    )
    ours, theirs = counted_logits(ctx)
    wanted = {
        "label": 0.3 * ctx.label_loss(ctx.seen["student"]).mean,
        "kd": 0.7 * soft_cross_entropy_loss(ours, theirs, temperature=3.0),
        "sinkhorn": 0.6 * sinkd_loss(ours, theirs, **transport),
    }
    torch.testing.assert_close({name: term.mean for name, term in terms.items()}, wanted)
    assert {term.items for term in terms.values()} == {ctx.items}


def test_gradients_are_those_of_the_functional() -> None:
    terms, ctx = first_step(sinkd(beta=1.0, scale=0.1), "language-model", masked=True)
    parameters = list(ctx.parameters().values())
    found = torch.autograd.grad(terms["sinkhorn"].mean, parameters, retain_graph=True)
    wanted = torch.autograd.grad(sinkd_loss(*counted_logits(ctx), scale=0.1), parameters)
    torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize(
    ("options", "names"),
    [
        ({"alpha": 0.0}, {"label", "sinkhorn"}),
        ({"alpha": 1.0}, {"kd", "sinkhorn"}),
        ({"beta": 0.0}, {"label", "kd"}),
        ({"scale": 0.0}, {"label", "kd"}),
    ],
)
@pytest.mark.parametrize("task", TASKS)
def test_a_term_without_weight_is_not_made(task: str, options: dict[str, float], names: set[str]) -> None:
    assert first_step(sinkd(**options), task)[0].keys() == names


def test_the_temperature_anneals_by_epochs() -> None:
    method = sinkd(kd_temperature=4.0, anneal=True)
    trainer = trainer_of(
        method, "classification", steps=10, batch_size=8
    )  # of 32 rows: two and a half epochs
    batch = trainer.source.fetch([0, 1, 2])
    found = [method.kd_temperature(Step(trainer.setup, batch, step)) for step in range(10)]
    assert found == [annealed_temperature(step // 4, 3, 4.0) for step in range(10)]
    assert (found[0], found[-1]) == (4.0, 1.0)
    assert sinkd(kd_temperature=4.0).kd_temperature(Step(trainer.setup, batch, 9)) == 4.0


@pytest.mark.parametrize("task", TASKS)
def test_one_row_and_none(task: str) -> None:
    terms, ctx = first_step(sinkd(scale=1.0, reduction="mean"), task, rows=1)
    torch.stack([term.mean for term in terms.values()]).sum().backward()
    assert all(torch.isfinite(term.mean) for term in terms.values())
    assert all(
        torch.isfinite(value.grad).all() for value in ctx.parameters().values() if value.grad is not None
    )

    rows = (4, 6) if task == "language-model" else (4,)
    empty = torch.zeros(rows, dtype=torch.bool)
    terms, ctx = first_step(sinkd(scale=1.0), task, rows=4, mask=empty)
    assert [term.mean.item() for term in terms.values()] == [0, 0, 0]
    torch.stack([term.mean for term in terms.values()]).sum().backward()
    assert all(not value.grad.any() for value in ctx.parameters().values() if value.grad is not None)


# --- tokens


def test_few_tokens_make_logits_and_no_others() -> None:
    """Each compared token counts and is there once; what stands for the others is never made."""
    method = sinkd(most_tokens=9)
    _, ctx = first_step(method, "language-model")
    student, teacher = ctx.seen["student"], ctx.seen["teacher teacher"]
    assert student._logits is None
    assert teacher._logits is None
    compared = Compared.of(ctx.batch, ctx, 9)
    assert ctx.batch.mask is not None
    assert compared.number == 9
    assert len(compared.own.unique()) == 9
    assert ctx.batch.mask.flatten()[compared.own].all()
    torch.testing.assert_close(compared.logits(student), student.logits.flatten(0, 1)[compared.own])


def test_other_steps_compare_other_tokens() -> None:
    trainer = trainer_of(sinkd(), "language-model")
    batch = trainer.source.fetch(list(range(12)))
    drawn = [Compared.of(batch, Step(trainer.setup, batch, step), 9).own.sort().values for step in (0, 0, 1)]
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])


def of_unlike_lengths() -> list[Tensor]:
    """Transport and its gradient by the logits of rows that are padded to another length on each rank."""
    with exact():
        generator = torch.Generator().manual_seed(0)
        ours, theirs = torch.randn(2, 6, 5, 4, generator=generator)
        mask = torch.arange(5) < torch.tensor([2, 3, 1, 5, 4, 0])[:, None]
        runtime = Runtime("cpu")
        own = slice(None) if runtime.world == 1 else slice(3 * runtime.rank, 3 * runtime.rank + 3)
        length = 3 if (runtime.world, runtime.rank) == (2, 0) else 5
        ours, theirs, mask = (value[own, :length] for value in (ours, theirs, mask))
        student = ours.clone().requires_grad_()
        batch = Batch(torch.zeros(len(mask), 1), target=torch.where(mask, 0, -100), mask=mask)
        ctx: Any = SimpleNamespace(
            items="tokens",
            setup=SimpleNamespace(runtime=runtime),
            shared_generator=torch.Generator().manual_seed(1),
        )
        loss = sinkd(most_tokens=11, scale=1.0).transport(Outputs(student), Outputs(theirs), batch, ctx)
        loss.backward()
        assert student.grad is not None
        return [loss.detach(), student.grad[mask]]


def test_ranks_whose_rows_have_other_lengths_compare_what_one_process_does(pair: Any) -> None:
    (first, ours), (second, theirs) = pair.run(of_unlike_lengths)
    loss, gradient = of_unlike_lengths()
    torch.testing.assert_close([first, second], [loss, loss], rtol=1e-9, atol=1e-9)
    # Both ranks' losses reach a row; the trainer's mean over ranks halves them.
    torch.testing.assert_close(torch.cat([ours, theirs]) / 2, gradient, rtol=1e-9, atol=1e-9)


# --- runs


def test_reviews_with_a_small_pair_of_encoders(data_root: Path, tmp_path: Path) -> None:
    folder = data_root / "sst2"
    if not folder.is_dir():
        pytest.skip(f"no sst2 at {data_root}")
    sizes = {"num_attention_heads": 2, "num_hidden_layers": 1}
    recipe = {
        "data": {
            "path": str(folder),
            "text": "sentence",
            "target": "label",
            "tokenizer": {"train": 2048},
            "max_length": 32,
            "limit": 256,
            "validation": 64,
            "test": 64,
        },
        "teacher": {"model": "config:bert", "options": sizes | {"hidden_size": 32, "intermediate_size": 64}},
        "student": {"model": "config:bert", "options": sizes | {"hidden_size": 16, "intermediate_size": 32}},
        "method": {"name": "sinkd", "anneal": True},
        "train": {"steps": 4, "batch_size": 16, "optimizer": {"name": "adam", "lr": 1e-3}, "device": "cpu"},
        "output": {"report": False},
    }
    result = distill(recipe, folder=tmp_path / "run", progress=False)
    assert result.result["status"] == "done"
    assert 0 <= result.result["test"]["accuracy"] <= 1


def test_its_teacher_is_surer_of_itself_than_it_has_learned_to_be() -> None:
    """That of the recipe and the study: five times its trained logits."""
    student = load_recipe("sinkd-teacher").student
    plain = student.model_copy(update={"options": {}})
    assert student.options == {"confidence": 5.0}
    values = {"data": {"path": "digits"}, "method": {"name": "none"}, "train": {"steps": 1, "device": "cpu"}}
    sure, calm = (
        assemble(load_recipe(values | {"student": each.model_dump(mode="json")})).student.module.eval()
        for each in (student, plain)
    )
    images = torch.rand(3, 1, 8, 8)
    torch.testing.assert_close(sure(images), 5 * calm(images))


# --- what is refused


def test_one_output_is_refused() -> None:
    method = sinkd()
    trainer = trainer_of(method, "classification")
    spec = dataclasses.replace(trainer.setup.teachers["teacher"].spec, outputs=1)
    with pytest.raises(ValueError, match="the student has one output, whose softmax is always 1"):
        method.build(spec, spec, trainer.example)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"alpha": 1.5}, "less than or equal to 1"),
        ({"epsilon": 0.0}, "greater than 0"),
        ({"n_iters": 0}, "greater than or equal to 1"),
        ({"scale": -1.0}, "greater than or equal to 0"),
        ({"kd_temperature": 0.0}, "greater than 0"),
        ({"most_tokens": 1}, "greater than or equal to 2"),
        ({"reduction": "none"}, "'sum' or 'mean'"),
    ],
)
def test_options_that_do_not_fit(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        sinkd(**options)
