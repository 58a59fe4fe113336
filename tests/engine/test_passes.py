"""Passes over the training rows: what they give, on one process and on two, and where a method gets them."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor
from training import make_method, make_trainer

from support import Net, Rows, rows, train_config
from tutelage.data.source import TensorSource, row_ids, targets
from tutelage.engine.combine import Combined
from tutelage.engine.distributed import check_batch_norm
from tutelage.engine.loop import Trainer
from tutelage.engine.passes import TrainingRows
from tutelage.engine.runtime import Runtime
from tutelage.engine.spec import ModelSpec
from tutelage.engine.step import Step
from tutelage.engine.types import Table, first_tensor
from tutelage.engine.validation import Validation
from tutelage.engine.views import Views
from tutelage.methods.baselines.method import PlainTraining
from tutelage.recipe.schema import ViewConfig
from tutelage.tasks import build_task

NOISE = (ViewConfig(name="noise"),)


def passes(count: int = 10, views: Any = (), batch_size: int = 4) -> TrainingRows:
    return TrainingRows(rows(count), Views(views, 0), Runtime("cpu"), batch_size)


def index(data: TrainingRows, **options: Any) -> list[list[int]]:
    """Ids of every batch; of rows that are masked out none."""
    kept = []
    for batch in data.batches(**options):
        assert batch.index is not None
        kept.append([] if batch.mask is not None and not batch.mask.any() else batch.index.tolist())
    return kept


def test_every_row_once_in_order() -> None:
    assert index(passes()) == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    assert index(passes(), most=10) == index(passes())
    assert index(passes(), most=4) == [[0, 3, 6, 9]]
    assert len(passes()) == 10


def test_rows_are_as_evaluation_sees_them_or_as_the_first_epoch_does() -> None:
    data = passes(views=NOISE)
    plain, drawn = (
        torch.cat([first_tensor(b.inputs) for b in data.batches(augmented=on)]) for on in (False, True)
    )
    assert torch.equal(plain, rows(10).inputs)
    wanted = Views(NOISE, 0)(rows(10).fetch(range(10)), torch.zeros(10, dtype=torch.int64)).inputs
    assert isinstance(wanted, Tensor)
    assert torch.equal(drawn, wanted)
    assert not torch.equal(drawn, plain)
    assert (passes().unchanged, data.unchanged) == (True, False)


def two_ranks() -> list[list[int]]:
    return index(passes(9, batch_size=2))


def test_ranks_share_the_rows_and_each_gets_as_many_batches(pair: Any) -> None:
    assert pair.run(two_ranks) == [[[0, 2], [4, 6], [8]], [[1, 3], [5, 7], []]]


def tokens(count: int) -> Rows:
    """Rows of three tokens, of which the first does not count."""
    mask = torch.tensor([False, True, True]).expand(count, 3)
    return Rows(torch.zeros(count, 3), torch.zeros(count, 3), mask)


def counted_by_two() -> list[list[int]]:
    found = TrainingRows(tokens(3), Views((), 0), Runtime("cpu"), 1).batches()
    return [batch.mask.sum(1).tolist() for batch in found if batch.mask is not None]


def test_a_rank_without_a_row_masks_the_tokens_of_another(pair: Any) -> None:
    assert pair.run(counted_by_two) == [[[2], [2]], [[2], [0]]]


def test_other_parts_of_the_data_are_passed_over_as_evaluation_sees_them() -> None:
    data = TrainingRows(rows(6), Views(NOISE, 0), Runtime("cpu"), 4, {"validation": rows(5, seed=1)})
    assert data.rows("train") is data
    held_out = data.rows("validation")
    assert index(held_out) == [[0, 1, 2, 3], [4]]
    drawn = torch.cat([first_tensor(batch.inputs) for batch in held_out.batches(augmented=True)])
    assert torch.equal(drawn, rows(5, seed=1).inputs)
    with pytest.raises(
        ValueError, match=r"no rows 'test'; this method's Needs.loaders names \['validation'\]"
    ):
        data.rows("test")


class Looks(PlainTraining):
    """Passes over its validation rows, which are fewer than a step's, and ends after two steps."""

    needs = dataclasses.replace(PlainTraining.needs, loaders=("validation",))
    seen = 0

    def after_step(self, ctx: Step) -> None:
        self.seen += sum(len(batch) for batch in ctx.rows("validation").batches())

    @property
    def ended(self) -> bool:
        return self.seen >= 6


def looking(**options: Any) -> Trainer:
    method, task = Looks(Looks.Config(name="none")), build_task("classification", 4)
    options["loaders"] = {"validation": rows(3)}
    return Trainer(Runtime("cpu"), Net(), method, task, rows(), train_config(), **options)


def test_rows_that_are_only_passed_over_may_be_fewer_than_a_step_takes() -> None:
    made = looking()
    made.run(1)
    assert made.method.seen == 3
    with pytest.raises(ValueError, match=r"train.batch_size is 8, but an epoch has 3 rows"):
        next(Step(made.setup, made.example, 0).loader("validation"))


def test_a_method_may_end_its_training(tmp_path: Any) -> None:
    """The last step is evaluated and saved; a run that goes on does nothing more."""
    evaluated: list[int] = []

    def evaluate(trainer: Trainer) -> dict[str, float]:
        evaluated.append(trainer.step)
        return {"accuracy": 1.0}

    made = looking(validation=Validation(evaluate, every=1000), folder=tmp_path)
    made.fit()
    assert (made.step, made.total_steps, evaluated) == (2, 4, [2])
    assert made.progress.stopped_early
    again = looking(validation=Validation(evaluate, every=1000), folder=tmp_path)
    again.fit()
    assert (again.step, evaluated) == (2, [2])


def test_what_the_source_knows_is_found_through_it() -> None:
    source = TensorSource(torch.zeros(3, 2), torch.tensor([2, 0, 1]), index=torch.tensor([7, 8, 9]))
    data = TrainingRows(source, Views((), 0), Runtime("cpu"), 2)
    assert targets(data) is source.target
    assert row_ids(data) is source.ids
    assert data.fingerprint == source.fingerprint
    with pytest.raises(AttributeError):
        data.nothing  # noqa: B018


class Measures(PlainTraining):
    """Counts the rows that it is given before and after training."""

    def prepare(self, data: Any, student: Any, teacher: Any) -> None:
        self.before = sum(len(batch) for batch in data.batches())

    def tables(self) -> dict[str, Table]:
        return {"rows": Table(["before"], [[self.before]])}

    def measure(self, ctx: Step) -> dict[str, Table]:
        assert not self.training
        assert not torch.is_grad_enabled()
        after = sum(len(ctx.student(batch, frozen=True).logits) for batch in ctx.data.batches())
        return {"measured": Table(["after"], [[after]])}


def measures() -> Measures:
    return Measures(Measures.Config(name="none"))


def test_a_trainer_gives_them_to_its_method() -> None:
    trainer: Any = make_trainer("none")
    trainer.method = measures()
    trainer.run(1)
    assert trainer.tables() == {"rows": Table(["before"], [[32]]), "measured": Table(["after"], [[32]])}
    trainer.run(1)
    assert all(module.training for module in trainer.student.modules())


def test_tables_of_several_methods_keep_their_names_apart() -> None:
    trainer: Any = make_trainer("none")
    trainer.method = Combined([measures(), make_method("kd", {}), measures()])
    trainer.run(1)
    assert set(trainer.tables()) == {"rows", "measured", "none.2.rows", "none.2.measured"}


def test_a_fingerprint_is_of_weights_and_buffers() -> None:
    def mark(net: Any) -> str | None:
        return ModelSpec.of("net", net, torch.zeros(2, 6)).fingerprint()

    first = mark(Net(seed=1))
    assert first is not None
    assert len(first) == 64
    assert mark(Net(seed=1)) == first != mark(Net(seed=2))
    norm: Any = torch.nn.Sequential(torch.nn.BatchNorm1d(6), Net(seed=1))
    before = mark(norm)
    norm[0].running_mean.fill_(1)
    assert mark(norm) != before
    assert ModelSpec("store", None, 4, None).fingerprint() is None
    assert ModelSpec("store", torch.nn.Module(), 4, None, weights=first).fingerprint() == first


def test_one_row_is_no_batch_for_batch_norm() -> None:
    check_batch_norm(2, "x")
    with pytest.raises(ValueError, match="x has a BatchNorm, which learns nothing from one row"):
        check_batch_norm(1, "x")
