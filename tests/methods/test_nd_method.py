"""nd: its terms, the pass over the training rows, lists of methods, stores, launches, resume, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import contract
import pytest
import torch
import torch.nn.functional as F
from objectives import CLASSES, FakeStep, Pairing
from pydantic import ValidationError
from torch import Tensor, nn
from training import assert_same, make_method, make_trainer, train

from support import KeptRows, Net, Rows, rows, train_config
from tutelage.engine.checkpoint import CheckpointError, CheckpointFolder
from tutelage.engine.combine import Combined
from tutelage.engine.loop import Trainer
from tutelage.engine.runtime import Runtime
from tutelage.engine.types import Batch
from tutelage.engine.views import Views
from tutelage.functional import class_means, kd_loss, nd_loss
from tutelage.methods.nd.method import ND
from tutelage.recipe import load_recipe
from tutelage.recipe.schema import ViewConfig
from tutelage.runs import distill
from tutelage.runs.assemble import assemble
from tutelage.tasks import build_task
from tutelage.teachers.local import LocalTeacher
from tutelage.teachers.store import StoredTeacher


def nd(**options: Any) -> ND:
    return ND(ND.Config(name="nd", **options))


def pairing(student: str = "cnn-4-8", teacher: str = "cnn-6-8", **options: Any) -> Any:
    found: Any = Pairing(nd(**options), student, teacher)
    found.method.class_means.copy_(torch.randn(CLASSES, 8, generator=torch.Generator().manual_seed(7)))
    return found


# --- terms


@pytest.mark.parametrize("mask", [None, torch.tensor([1, 0, 1, 1, 0, 1])], ids=["all", "masked"])
def test_terms_carry_their_weights(mask: Tensor | None) -> None:
    made = pairing(label_weight=0.5, loss_weight=2.0, kd_weight=3.0, temperature=2.0, warmup_epochs=4)
    made.batch = made.batch.replace(mask=mask)
    kept = slice(None) if mask is None else mask.bool()
    ours, theirs = (side.feature()[kept] for side in (made.student, made.teacher))
    target = made.batch.target[kept]
    wanted = {
        "label": 0.5 * F.cross_entropy(made.student.logits[kept], target),
        "nd": 2.0 * nd_loss(ours, theirs, made.method.class_means, target),
        "kd": 3.0 * 0.25 * kd_loss(made.student.logits[kept], made.teacher.logits[kept], 2.0),
    }
    terms = made.terms(FakeStep(epoch=1))
    torch.testing.assert_close({name: term.mean for name, term in terms.items()}, wanted)


def test_only_the_divergence_warms_up_and_from_nothing() -> None:
    made = pairing()
    by_epoch = [made.terms(FakeStep(epoch=epoch)) for epoch in (0, 10, 20, 30)]
    whole = kd_loss(made.student.logits, made.teacher.logits, 4.0).item()
    found = [terms["kd"].mean.item() / whole for terms in by_epoch]
    assert found == pytest.approx([0, 0.5, 1, 1])
    assert len({terms["nd"].mean.item() for terms in by_epoch}) == 1
    at_once = pairing(warmup_epochs=0)
    wanted = kd_loss(at_once.student.logits, at_once.teacher.logits, 4.0)
    torch.testing.assert_close(at_once.terms(FakeStep())["kd"].mean, wanted)


def test_direction_alone() -> None:
    made = pairing(form="direction", kd_weight=0.0)
    target = made.batch.target
    wanted = nd_loss(
        made.student.feature(), made.teacher.feature(), made.method.class_means, target, form="direction"
    )
    torch.testing.assert_close(made.terms()["nd"].mean, wanted)
    assert set(made.terms()) == {"label", "nd"}


def test_where_widths_differ_the_student_is_projected_for_this_term_alone() -> None:
    made = pairing("cnn-4-6", projection_dropout=0.0)
    norm, dropout, linear = made.method.projection
    assert (norm.num_features, dropout.p, linear.in_features, linear.out_features) == (6, 0.0, 6, 8)
    made.backward()
    assert all(p.grad is not None for p in made.method.parameters())
    with torch.no_grad():
        linear.weight.mul_(-1)
        before = made.terms(FakeStep(epoch=20))
        linear.weight.mul_(-1)
    after = made.terms(FakeStep(epoch=20))
    assert before["nd"].mean != after["nd"].mean
    assert before["kd"].mean == after["kd"].mean
    assert not list(pairing().method.parameters())


def test_half_precision_features_are_measured_in_float32() -> None:
    made = pairing(kd_weight=0.0)
    for side in (made.student, made.teacher):
        side.features = {path: value.bfloat16() for path, value in side.features.items()}
    assert made.terms()["nd"].mean.dtype == torch.float32


# --- the pass over the rows


def trainer(
    method: Any,
    source: Any = None,
    teacher: Any = None,
    width: int = 12,
    views: Any = None,
    **changes: Any,
) -> Any:
    source = source or rows()
    teacher = teacher or LocalTeacher("teacher", Net(width=12, seed=1), source.inputs[:2]).freeze()
    return Trainer(
        Runtime("cpu"),
        Net(width=width, seed=2),
        method,
        build_task("classification", 4),
        source,
        train_config(**changes),
        teachers={"teacher": teacher},
        views=views,
    )


def pooled(net: Any, inputs: Tensor) -> Tensor:
    features: Tensor = net.blocks(net.stem(inputs))
    return features


def test_means_are_of_all_rows_by_label_in_eval_mode() -> None:
    """A batch size that does not divide the rows, and a teacher with dropout."""
    source, net = rows(30), Net(width=12, dropout=0.5, seed=1)
    made = trainer(nd(), source, LocalTeacher("teacher", net, source.inputs[:2]).freeze(), batch_size=7)
    made.run(1)
    wanted = class_means(pooled(net, source.inputs), source.target, 4)
    torch.testing.assert_close(made.method.class_means, wanted)
    assert made.method.class_means.dtype == torch.float32


def test_they_are_found_once() -> None:
    made = trainer(nd())
    made.run(1)
    first = made.method.class_means.clone()
    for parameter in made.setup.teachers["teacher"].module.parameters():
        parameter.data.mul_(2)
    made.run(1)
    assert torch.equal(made.method.class_means, first)


@pytest.mark.parametrize("transform", ["eval", "train"])
def test_rows_are_as_evaluation_or_as_training_sees_them(transform: str) -> None:
    recipe = contract.recipe("nd") | {"method": {"name": "nd", "means_transform": transform}}
    assembly = assemble(load_recipe(recipe))
    made = assembly.trainer(None)
    made._prepare_once()
    batch = assembly.data.train.fetch(range(64))
    if transform == "train":
        batch = made.views(batch, torch.zeros(64, dtype=torch.int64))
    features = assembly.teachers["teacher"].outputs(batch, made.setup.taps.teachers["teacher"]).feature()
    assert batch.target is not None
    torch.testing.assert_close(made.method.class_means, class_means(features, batch.target, 10))


def test_a_class_without_rows_stops_the_run_before_the_first_step() -> None:
    source = rows()
    source.target[source.target == 2] = 1
    made = trainer(nd(), source)
    with pytest.raises(ValueError, match="1 of 4 classes have no rows: 2"):
        made.run()
    assert made.step == 0


class Masked(Rows):
    """Rows of class 3 do not count."""

    def fetch(self, positions: Any) -> Batch:
        batch = super().fetch(positions)
        assert batch.target is not None
        return batch.replace(mask=batch.target != 3)


def test_rows_that_do_not_count_are_left_out_of_the_means() -> None:
    source = rows()
    net = Net(width=12, seed=1)
    masked = Masked(source.inputs, source.target)
    made = trainer(nd(), masked, LocalTeacher("teacher", net, source.inputs[:2]).freeze())
    neutral = made.method.class_means[3].clone()
    made.run(2)
    wanted = class_means(pooled(net, source.inputs), source.target, 4)
    torch.testing.assert_close(made.method.class_means[:3], wanted[:3])
    torch.testing.assert_close(made.method.class_means[3], neutral)  # no loss reads it


def test_a_class_whose_mean_is_0_does_too() -> None:
    source, net = rows(), Net(width=12, seed=1)
    source.inputs[source.target == 3] = 0
    for parameter in net.parameters():
        parameter.data.mul_(parameter.dim() > 1)  # without biases features of 0 are 0
    made = trainer(nd(), source, LocalTeacher("teacher", net, source.inputs[:2]).freeze())
    with pytest.raises(ValueError, match="mean of class 3 is 0 or not finite"):
        made.run()


def test_what_is_measured() -> None:
    """Lengths and directions of both models' features over all training rows."""
    made = trainer(nd(kd_weight=0.0), steps=2)
    made.run()
    table = made.tables()["feature_norm_and_direction"]
    assert table.columns == ["features", "norm", "cosine"]
    source = rows()
    teacher = made.setup.teachers["teacher"].module.model
    for (name, norm, cosine), net in zip(table.rows, (made.student.model, teacher), strict=True):
        features = pooled(net.eval(), source.inputs)
        means = made.method.class_means[source.target]
        assert name == ("teacher" if net is teacher else "student")
        assert norm == pytest.approx(float(features.detach().norm(dim=1).mean()), rel=1e-5)
        assert cosine == pytest.approx(float(F.cosine_similarity(features, means).mean().detach()), rel=1e-5)


# --- lists of methods


@pytest.mark.parametrize("other", ["kd", "dkd", "dist"])
def test_it_stacks_on_methods_of_logits(other: str) -> None:
    """Their own terms, the feature term, and one label loss: that of the first."""
    made = trainer(Combined([make_method(other, {}), nd(kd_weight=0.0)]))
    alone, own = trainer(make_method(other, {})).dry_step(), trainer(nd()).dry_step()
    terms = made.dry_step()
    assert terms == pytest.approx(alone | {"nd": own["nd"]})
    before = made.method.methods[1].class_means.clone()
    made.run(1)
    assert not torch.equal(made.method.methods[1].class_means, before)


def test_it_stacks_on_reviewkd_by_recipe(tmp_path: Path) -> None:
    recipe = contract.recipe("nd") | {"method": [{"name": "nd", "kd_weight": 0.0}, {"name": "reviewkd"}]}
    result = distill(recipe, folder=tmp_path / "run", progress=False)
    lines = (tmp_path / "run" / "metrics.jsonl").read_text()
    assert result.result["status"] == "done"
    assert all(f'"{term}"' in lines for term in ("label", "nd", "review"))
    assert '"kd"' not in lines
    assert "feature_norm_and_direction" in result.result["tables"]


# --- stores


def stored(teacher: LocalTeacher, made: Trainer, rows_kept: range) -> StoredTeacher:
    taps = made.setup.taps.teachers["teacher"]
    store: Any = KeptRows(teacher, made.source.fetch(rows_kept), taps)
    return StoredTeacher(store)


def test_from_a_store_means_and_measures_are_the_same() -> None:
    live = trainer(nd(), steps=1)
    teacher: Any = live.setup.teachers["teacher"]
    kept = trainer(nd(), teacher=stored(teacher, live, range(32)), steps=1)
    for made in (live, kept):
        made.run()
    torch.testing.assert_close(kept.method.class_means, live.method.class_means)
    assert kept.tables()["feature_norm_and_direction"] == live.tables()["feature_norm_and_direction"]


def test_a_store_without_all_rows_or_of_other_views_is_refused() -> None:
    live = trainer(nd())
    teacher: Any = live.setup.teachers["teacher"]
    made = trainer(nd(), teacher=stored(teacher, live, range(30)))
    with pytest.raises(
        ValueError, match=r"over all training rows, and the stored teacher lacks some: 2 rows"
    ):
        made.run()
    views = Views((ViewConfig(name="noise"),), 0)
    made = trainer(nd(), teacher=stored(teacher, live, range(32)), views=views)
    with pytest.raises(ValueError, match=r"set method\.means_transform=train, or use a live teacher"):
        made.run()


# --- launches


def equal_widths(sharding: str) -> dict[str, Any]:
    return train("nd", {"warmup_epochs": 1}, sharding, student=Net(width=12, seed=2))


def projected(sharding: str) -> dict[str, Any]:
    return train("nd", {"warmup_epochs": 0, "projection_dropout": 0.0}, sharding)


@pytest.mark.parametrize("case", [equal_widths, projected])
@pytest.mark.parametrize("sharding", ["ddp", "fsdp"])
def test_two_ranks_give_the_losses_of_one(case: Any, sharding: str, pair: Any) -> None:
    alone = case("ddp")
    for found in pair.run(case, sharding):
        assert_same(alone, found)


def measured(sharding: str) -> list[Any]:
    made: Any = make_trainer("nd", {"projection_dropout": 0.0}, sharding)
    made.run()
    return made.tables()["feature_norm_and_direction"].rows  # type: ignore[no-any-return]


@pytest.mark.parametrize("sharding", ["ddp", "fsdp"])
def test_ranks_measure_the_same_as_one(sharding: str, pair: Any) -> None:
    alone = measured("ddp")
    for found in pair.run(measured, sharding):
        for one, other in zip(alone, found, strict=True):
            assert other[0] == one[0]
            assert other[1:] == pytest.approx(one[1:], rel=1e-4)


def uneven() -> Tensor:
    """Nine rows: the last batch of the pass gives the second rank none."""
    made: Any = make_trainer("nd", {"kd_weight": 0.0}, student=Net(width=12, seed=2), steps=1)
    made.setup.data.source = rows(9)
    made.setup.data.batch_size = 4
    made._prepare_once()
    assert made.tables()["feature_norm_and_direction"].rows[1][1] > 0
    means: Tensor = made.method.class_means.clone()
    return means


def test_ranks_share_the_pass_and_a_rank_may_have_no_row(pair: Any) -> None:
    alone = uneven()
    for found in pair.run(uneven):
        torch.testing.assert_close(found, alone)


def test_micro_batches_give_the_step_of_one_batch() -> None:
    whole, cut = (train("nd", student=Net(width=12, seed=2), accumulate=count) for count in (1, 4))
    assert_same(whole, cut, tolerance=1e-6)


# --- resume


def test_the_means_are_in_the_checkpoint(tmp_path: Path) -> None:
    first: Any = make_trainer("nd", student=Net(width=12, seed=2))
    first.checkpoints = _folder(tmp_path)
    first.run(2)
    first.save()
    second: Any = make_trainer("nd", student=Net(width=12, seed=2))
    second.checkpoints = _folder(tmp_path)
    assert second.restore()
    assert torch.equal(second.method.class_means, first.method.class_means)
    assert second.progress.prepared


def test_a_resume_with_another_teacher_is_refused(tmp_path: Path) -> None:
    first = trainer(nd())
    first.checkpoints = _folder(tmp_path)
    first.run(2)
    first.save()
    source = rows()
    other = LocalTeacher("teacher", Net(width=12, seed=3), source.inputs[:2]).freeze()
    second = trainer(nd(), teacher=other)
    second.checkpoints = _folder(tmp_path)
    with pytest.raises(
        CheckpointError, match=r"class means are those of another teacher: .* sha256 is \w{64}"
    ):
        second.restore()


def _folder(path: Path) -> CheckpointFolder:
    return CheckpointFolder(path / "checkpoints", keep=2)


# --- what is refused, and defaults


def test_distributions_are_refused_before_training() -> None:
    source = rows()
    soft = Rows(source.inputs, F.one_hot(source.target, 4).float())
    with pytest.raises(
        TypeError, match=r"one class a row; these targets have shape \[2, 4\]: switch mixup off"
    ):
        trainer(nd(), soft)


def test_one_row_a_micro_batch_is_refused_where_features_are_projected() -> None:
    narrow = trainer(nd(), width=8, batch_size=1)
    with pytest.raises(ValueError, match=r"nd's projection has a BatchNorm, .*raise train.batch_size"):
        narrow.dry_step()
    assert trainer(nd(), batch_size=1).dry_step()["nd"] > 0


class TwoHeads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.other = nn.Linear(6, 4), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.one(x) + self.other(x)
        return logits


def test_a_model_without_one_classifier_is_refused() -> None:
    with pytest.raises(ValueError, match="no single layer gives its logits"):
        Trainer(
            Runtime("cpu"),
            TwoHeads(),
            nd(),
            build_task("classification", 4),
            rows(),
            train_config(),
            teachers={"teacher": LocalTeacher("teacher", Net(), rows().inputs[:2]).freeze()},
        )


def test_card_defaults_needs_and_bounds() -> None:
    config = ND.Config(name="nd")
    assert (config.label_weight, config.kd_weight, config.loss_weight) == (1.0, 1.0, 1.0)
    assert (config.temperature, config.warmup_epochs, config.projection_dropout) == (4.0, 20, 0.5)
    assert (config.form, config.means_transform) == ("norm_direction", "eval")
    assert (ND.needs.teacher, ND.needs.teacher_taps, ND.needs.live) == ("frozen", True, False)
    assert nd().needs.logits == ("dense",)
    assert nd(kd_weight=0.0).needs.logits == ()
    for option in ({"temperature": 0}, {"form": "norm"}, {"means_transform": "test"}, {"kd_weight": -1}):
        with pytest.raises(ValidationError, match=next(iter(option))):
            nd(**option)
