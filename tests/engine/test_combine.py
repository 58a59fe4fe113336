"""Several methods as one: shared forwards, one label loss, and what is refused."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from partners import Backwards, Chooses, DeepHint, Halves, Hint, NamedHint
from training import assert_same, make_method, make_trainer, train

import probes
from support import Losses, Net, rows, train_config
from tutelage.engine.combine import Combined, merged
from tutelage.engine.loop import Trainer
from tutelage.engine.method import Method, OptimSpec
from tutelage.engine.needs import Needs, PairingError
from tutelage.engine.runtime import Runtime
from tutelage.engine.step import Step
from tutelage.engine.types import Batch, Outputs, Term, Terms, first_tensor
from tutelage.recipe import load_recipe
from tutelage.recipe.config import MethodConfig
from tutelage.runs import check
from tutelage.runs.assemble import build_method
from tutelage.tasks import build_task
from tutelage.teachers.local import LocalTeacher


def made(methods: list[Method], label_weight: float | None = None) -> Any:
    source = rows()
    return Trainer(
        Runtime("cpu"),
        Net(seed=2),
        Combined(methods, label_weight),
        build_task("classification", 4),
        source,
        train_config(),
        teachers={
            "teacher": LocalTeacher("teacher", Net(width=12, blocks=3, seed=1), source.inputs[:2]).freeze()
        },
    )


def method(name: str, **options: Any) -> Method:
    return make_method(name, options)


# --- what is computed


def test_one_forward_of_each_model_serves_all() -> None:
    trainer = made([method("kd"), method("nkd"), Hint(), DeepHint(), method("kd", temperature=1.0)])
    ran: Counter[str] = Counter()
    trainer.student.model.register_forward_hook(lambda *_: ran.update(["student"]))
    trainer.setup.teachers["teacher"].module.model.register_forward_hook(lambda *_: ran.update(["teacher"]))
    trainer.run()
    assert ran == {"student": 4, "teacher": 4}


def test_terms_are_those_of_each_alone_times_its_weight() -> None:
    kd, nkd = make_trainer("kd").dry_step(), make_trainer("nkd").dry_step()
    terms = made([method("kd", weight=0.5), method("nkd", weight=3.0)]).dry_step()
    wanted = {
        "label": kd["label"],
        "kd": 0.5 * kd["kd"],
        "target": 3 * nkd["target"],
        "nontarget": 3 * nkd["nontarget"],
    }
    assert terms == pytest.approx(wanted)
    assert list(terms) == list(wanted)


@pytest.mark.parametrize(
    ("names", "weight", "factor"),
    [
        (["kd", "nkd"], None, 0.1),
        (["nkd", "kd"], None, 1.0),
        (["kd", "nkd"], 0.7, 0.7),
        (["kd", "nkd"], 0.0, 0.0),
    ],
    ids=["the first method's", "nkd first", "the recipe's", "none at all"],
)
def test_the_label_loss_counts_once(names: list[str], weight: float | None, factor: float) -> None:
    plain = make_trainer("none").dry_step()["label"]
    terms = made([method(name) for name in names], weight).dry_step()
    assert terms["label"] == pytest.approx(factor * plain)
    assert sum("label" in name for name in terms) == 1


def test_the_label_loss_where_only_a_later_method_has_one_or_none_has() -> None:
    plain = make_trainer("none").dry_step()["label"]
    assert made([NamedHint(), method("kd")]).dry_step()["label"] == pytest.approx(0.1 * plain)
    assert "label" not in made([NamedHint(), Halves()]).dry_step()
    assert made([NamedHint(), Halves()], 2.0).dry_step()["label"] == pytest.approx(2 * plain)


def test_one_method_several_times() -> None:
    temperatures = (1.0, 2.0, 4.0)
    terms = made([method("kd", temperature=each) for each in temperatures]).dry_step()
    assert list(terms) == ["label", "kd", "kd.2.kd", "kd.3.kd"]
    alone = [make_trainer("kd", {"temperature": each}).dry_step()["kd"] for each in temperatures]
    assert list(terms.values())[1:] == pytest.approx(alone)


def test_each_method_sees_its_own_features() -> None:
    terms = made([Hint(), DeepHint(), NamedHint(), Halves()]).dry_step()
    plain = make_trainer("none").dry_step()["label"]
    assert terms["hint"] != pytest.approx(terms["probe.2.hint"])
    assert set(terms) == {"label", "hint", "probe.2.hint", "probe.3.hint", "half"}
    assert terms["label"] == pytest.approx(plain)


def test_the_teacher_stops_where_no_method_reads_its_logits() -> None:
    trainer = made([method("none"), Hint()])
    ran: list[str] = []
    model = trainer.setup.teachers["teacher"].module.model
    for path in ("blocks.0", "blocks.1", "head"):
        model.get_submodule(path).register_forward_hook(lambda *_, path=path: ran.append(path))
    trainer.run(1)
    assert ran == ["blocks.0"]


def test_a_count_of_ones_own_stays_apart() -> None:
    trainer = made([method("kd"), Halves(), Halves()])
    batch = trainer.example
    assert trainer.method.count(batch) == {"rows": 2, "probe.halves": 4, "probe.2.halves": 4}
    terms = trainer.method(Step(trainer.setup, batch, 0))
    assert {name: term.items for name, term in terms.items()} == {
        "label": "rows",
        "kd": "rows",
        "half": "probe.halves",
        "probe.2.half": "probe.2.halves",
    }
    assert list(trainer.method.tables()) == ["halves", "probe.2.halves"]


def test_the_rows_that_one_method_chooses() -> None:
    trainer = made([method("kd"), Chooses()])
    assert isinstance(trainer.sampler, Backwards)


def test_every_hook_reaches_the_methods() -> None:
    """A hook that is added to Method must be passed on, or be a reason to run alone."""
    hooks = {name for name in vars(Method) if not name.startswith("_")} - {
        "Config",
        "paper",
        "kind",
        "missing",
        "alone",  # said to them, not asked of them
    }
    refused = {"step", "optimizers", "active", "combine_gradients"}
    own = {"forward", "needs", "terms"}  # the last calls `objective`, and that the methods' own
    assert hooks - refused - own == {name for name in vars(Combined) if name in hooks}


class Traced(probes.Probe):
    """Writes down what it is called for."""

    needs = Needs(teacher="none", logits=())

    def __init__(self, title: str, calls: list[str]) -> None:
        super().__init__()
        self.title, self.calls = title, calls

    def transform(self, batch: Batch, ctx: Step) -> Batch:
        self.calls.append(f"{self.title} transform")
        return batch.replace(inputs=first_tensor(batch.inputs) + 1)

    def objective(self, student: Outputs, teacher: Outputs | None, batch: Batch, ctx: Step) -> Terms:
        return {"mean": Term(student.logits.mean() + first_tensor(batch.inputs).mean())}

    def after_step(self, ctx: Step) -> None:
        self.calls.append(f"{self.title} after_step")

    def after_evaluation(self, metrics: dict[str, float], ctx: Step) -> None:
        self.calls.append(f"{self.title} after_evaluation")

    def prepare(self, data: Any, student: Any, teacher: Any) -> None:
        self.calls.append(f"{self.title} prepare")

    def finish(self, student: Any) -> Any:
        self.calls.append(f"{self.title} finish")
        return student


def test_hooks_run_in_the_order_of_the_list() -> None:
    calls: list[str] = []
    trainer = made([Traced("a", calls), Traced("b", calls)])
    trainer.run(1)
    trainer.method.after_evaluation({}, Step(trainer.setup, trainer.example, 0))
    trainer.finished()
    hooks = ("prepare", "transform", "after_step", "after_evaluation", "finish")
    assert calls == [f"{title} {hook}" for hook in hooks for title in ("a", "b")]
    moved = trainer.method.transform(trainer.example, Step(trainer.setup, trainer.example, 0))
    torch.testing.assert_close(moved.inputs, trainer.example.inputs + 2)


# --- launches


def test_two_ranks_give_the_losses_of_one(pair: Any) -> None:
    name = "kd+nkd+InsideBlock+Memory"
    alone = train(name)
    for found in pair.run(train, name):
        assert_same(alone, found)


def test_micro_batches_give_the_step_of_one_batch() -> None:
    assert_same(train("kd+nkd"), train("kd+nkd", accumulate=4), tolerance=1e-6)


def test_resume_is_bit_exact(tmp_path: Path) -> None:
    def run(folder: Path | None, steps: int | None) -> Any:
        source = rows()
        trainer = Trainer(
            Runtime("cpu"),
            Net(seed=2),
            make_method("kd+Memory+InsideBlock", {}),
            build_task("classification", 4),
            source,
            train_config(steps=6, checkpoint={"every": 1}),
            teachers={"teacher": LocalTeacher("teacher", Net(width=12, seed=1), source.inputs[:2]).freeze()},
            folder=folder,
        )
        losses = Losses()
        trainer.events.add(losses)
        trainer.restore()
        trainer.run(steps)
        return trainer, losses.steps

    whole, losses = run(None, None)
    run(tmp_path, 3)
    resumed, rest = run(tmp_path, None)
    assert rest == losses[3:]
    saved, wanted = resumed.whole.state_dict(), whole.whole.state_dict()
    assert all(torch.equal(value, saved[name]) for name, value in wanted.items())


# --- recipes

RECIPE: dict[str, Any] = {
    "data": {"path": "digits", "limit": 64, "validation": 32, "test": 40},
    "teacher": {"model": "digits:cnn-6-8"},
    "student": {"model": "digits:cnn-4-6"},
    "train": {"steps": 2, "batch_size": 16, "device": "cpu"},
}


def dry_terms(method: Any, **train: Any) -> dict[str, float]:
    recipe = RECIPE | {"method": method, "train": RECIPE["train"] | train}
    terms: dict[str, float] = check(recipe)["dry_terms"]
    return terms


def test_a_recipe_with_a_list() -> None:
    methods = [{"name": "kd", "weight": 2.0}, {"name": "fitnet", "loss_weight": 1.0}]
    plain, terms = dry_terms("none"), dry_terms(methods, label_weight=0.3)
    assert list(terms) == ["label", "kd", "hint"]
    assert terms["label"] == pytest.approx(0.3 * plain["label"])


def test_a_lone_method_keeps_its_own_label_weight() -> None:
    assert dry_terms("kd", label_weight=5.0) == dry_terms("kd")
    assert dry_terms(["kd"], label_weight=5.0) == dry_terms("kd")


# --- what is refused


class Steps(Halves):
    def step(self, ctx: Step) -> Terms:
        return {"label": ctx.label_loss(ctx.student())}


class Optimises(Halves):
    def optimizers(self) -> dict[str, OptimSpec]:
        return {"main": OptimSpec(("*",))}


class Needy(Halves):
    def __init__(self, **needs: Any) -> None:
        super().__init__()
        self.needs = Needs(**needs)  # type: ignore[misc]


@pytest.mark.parametrize(
    ("methods", "reasons"),
    [
        (
            [Steps(), Halves()],
            [r"`probe` cannot be combined .*: its step is more than one forward of each model"],
        ),
        ([Halves(), Optimises()], [r"it has optimisers of its own; run it alone"]),
        ([probes.PerTerm(), probes.PerTerm()], [r"weighs the gradients of its own terms"] * 2),
        (
            [probes.ThroughTeacher(), Halves()],
            [r"more than one forward .*, and it has optimisers .*, and it says itself which optimisers move"],
        ),
        ([Chooses(), Chooses()], [r"`probe` and `probe` cannot be combined: each chooses the rows"]),
        (
            [Needy(logits=("topk",)), Needy(logits=("dense", "sampled"))],
            [r"no form of teacher logits serves all: `probe` takes topk, `probe.2` takes dense or sampled"],
        ),
        (
            [Needy(tasks=("regression",)), Needy()],
            [r"no task is one of all: `probe` takes regression, `probe.2` takes classification"],
        ),
        (
            [Needy(teacher="trained"), Needy(), Needy(teacher="none")],
            [r"^`probe` trains the teacher, `probe.2` learns from one that stays as it is; run them apart"],
        ),
        (
            [Steps(), Needy(tasks=("regression",)), Halves()],
            [r"`probe` cannot be combined", r"no task is one of all"],
        ),
    ],
)
def test_what_cannot_be_combined(methods: list[Method], reasons: list[str]) -> None:
    with pytest.raises(PairingError) as caught:
        Combined(methods)
    lines = str(caught.value).splitlines()
    assert len(lines) == len(reasons)
    for line, reason in zip(lines, reasons, strict=True):
        assert re.search(reason, line), line


@pytest.mark.parametrize(
    ("methods", "message"),
    [
        ([{"name": "wa"}, {"name": "wa"}], r"wa, wa cannot be combined: a procedure runs alone"),
        (["kd", "wa"], r"wa cannot be combined: a procedure runs alone"),
    ],
)
def test_procedures_in_a_list(methods: list[Any], message: str) -> None:
    with pytest.raises(PairingError, match=message):
        build_method(load_recipe(RECIPE | {"method": methods}))


def test_needs_are_those_of_all() -> None:
    one = Needs(
        logits=("dense", "topk"),
        scale="log_probs",
        fields=("index",),
        views=2,
        sharding="ddp",
        tasks=("a", "b"),
    )
    two = Needs(logits=("topk",), scale="raw", fields=("target", "index"), live=True, tasks=("b",))
    three = Needs(teacher="none", logits=(), sharding="single", loaders=("validation",), tasks=("b", "a"))
    assert merged([one, two, three]) == Needs(
        logits=("topk",),
        live=True,
        fields=("index", "target"),
        loaders=("validation",),
        views=2,
        sharding="single",
        tasks=("b",),
    )
    assert merged([one, three]).scale == "log_probs"
    assert merged([three, three]) == three


def test_names_and_weights() -> None:
    combined = Combined([make_method("kd", {}), make_method("nkd", {})])
    assert combined.config == MethodConfig(name="kd+nkd")
