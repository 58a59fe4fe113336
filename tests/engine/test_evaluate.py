"""evaluate(): every row once, whatever the batches and ranks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchmetrics.functional.classification import multiclass_accuracy, multiclass_calibration_error

from tutelage.data.source import TensorSource
from tutelage.engine.evaluate import evaluate
from tutelage.engine.runtime import Runtime
from tutelage.engine.types import Batch, Outputs
from tutelage.tasks import build_task

CLASSES = 7


def source(rows: int, *, image: bool = False) -> TensorSource:
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(rows, 5, generator=generator)
    if image:
        inputs = torch.randint(0, 256, (rows, 5), dtype=torch.uint8, generator=generator)
    target = torch.randint(0, CLASSES, (rows,), generator=generator)
    columns = {"sex": torch.arange(rows) % 3 % 2, "year": torch.arange(rows) // 4 + 1990}
    return TensorSource(inputs, target, columns=columns, names={"sex": ("Female", "Male")})


def model(seed: int, outputs: int = CLASSES) -> nn.Linear:
    torch.manual_seed(seed)
    return nn.Linear(5, outputs)


def predict(seed: int, outputs: int = CLASSES):
    linear = model(seed, outputs)
    return lambda batch: Outputs(linear(batch.inputs))


def run(rows: int = 23, batch_size: int = 4, **options: object) -> dict[str, float]:
    task = build_task("classification", CLASSES)
    return evaluate(predict(0), source(rows), task, batch_size=batch_size, device="cpu", **options)


def test_figures_equal_those_of_all_rows_at_once():
    data = source(23)
    logits, target = model(0)(data._inputs).detach(), data.target
    found = run()
    assert list(found) == ["accuracy", "top5", "calibration_error", "loss"]
    assert all(type(value) is float for value in found.values())
    expected = {
        "accuracy": multiclass_accuracy(logits, target, CLASSES, average="micro"),
        "top5": multiclass_accuracy(logits, target, CLASSES, average="micro", top_k=5),
        "calibration_error": multiclass_calibration_error(logits.softmax(1), target, CLASSES, n_bins=15),
        "loss": nn.functional.cross_entropy(logits, target),
    }
    assert found == pytest.approx({name: float(value) for name, value in expected.items()}, abs=1e-6)


@pytest.mark.parametrize("batch_size", [1, 5, 23, 100])
def test_batch_size_does_not_matter(batch_size):
    assert run(batch_size=batch_size) == pytest.approx(run(batch_size=3), abs=1e-7)


def test_agreement_is_given_where_there_is_a_teacher():
    teacher = predict(3)
    inputs = source(23)._inputs
    same = (model(0)(inputs).argmax(1) == model(3)(inputs).argmax(1)).float().mean()
    assert run(teacher=teacher)["agreement"] == pytest.approx(float(same))
    assert run(teacher=predict(0))["agreement"] == 1
    assert "agreement" not in run(names=("accuracy", "agreement"))
    with pytest.raises(ValueError, match="agreement can only be had with a teacher"):
        run(names=("agreement",))


def test_groups_are_named_by_their_values_and_add_up():
    found = run(names=("accuracy", "loss"), group_by="sex")
    assert list(found) == [
        "accuracy",
        "loss",
        "accuracy[sex=Female]",
        "loss[sex=Female]",
        "accuracy[sex=Male]",
        "loss[sex=Male]",
    ]
    male = int((source(23).columns["sex"] == 1).sum())
    mean = (found["loss[sex=Male]"] * male + found["loss[sex=Female]"] * (23 - male)) / 23
    assert mean == pytest.approx(found["loss"], abs=1e-7)
    assert "accuracy[year=1990]" in run(group_by="year")


def test_masked_rows_do_not_count():
    class Masked(TensorSource):
        def fetch(self, positions: Sequence[int]) -> Batch:
            batch = super().fetch(positions)
            keep = batch.index < 11
            return batch.replace(mask=keep, target=torch.where(keep, batch.target, -7))

    data = source(23)
    masked = Masked(data._inputs, data.target, columns=data.columns, names=data.names)
    task = build_task("classification", CLASSES)
    options = {"batch_size": 4, "device": "cpu", "group_by": "sex"}
    first = TensorSource(
        data._inputs[:11],
        data.target[:11],
        columns={n: c[:11] for n, c in data.columns.items()},
        names=data.names,
    )
    expected = evaluate(predict(0), first, task, **options)
    assert evaluate(predict(0), masked, task, **options) == pytest.approx(expected)


def test_bytes_reach_the_model_as_floats_without_gradients():
    seen: list[Tensor] = []

    def student(batch: Batch) -> Outputs:
        seen.append(batch.inputs)
        logits = model(0)(batch.inputs)
        assert not logits.requires_grad
        return Outputs(logits)

    evaluate(
        student, source(6, image=True), build_task("classification", CLASSES), batch_size=4, device="cpu"
    )
    assert [tuple(inputs.shape) for inputs in seen] == [(4, 5), (2, 5)]
    assert seen[0].dtype == torch.float32
    assert float(seen[0].max()) <= 1


def test_a_metric_that_is_not_defined_for_a_group_is_left_out():
    generator = torch.Generator().manual_seed(0)
    data = TensorSource(
        torch.randn(5, 5, generator=generator),
        torch.randn(5, generator=generator),
        columns={"site": torch.tensor([0, 0, 0, 0, 9])},
    )
    options = {"batch_size": 2, "device": "cpu", "group_by": "site"}
    found = evaluate(predict(0, 1), data, build_task("regression", 1), **options)
    assert {"r2", "r2[site=0]", "mae[site=9]"} <= set(found)
    assert "r2[site=9]" not in found


def test_errors_name_what_is_there():
    with pytest.raises(ValueError, match=r"group_by is 'age'.*sex, year"):
        run(group_by="age")
    with pytest.raises(ValueError, match=r"no metric 'acuracy'.*did you mean 'accuracy'"):
        run(names=("acuracy",))
    with pytest.raises(ValueError, match="no rows"):
        run(rows=0)


def on_a_rank(rows: int) -> tuple[dict[str, float], int]:
    """The figures that this rank gets, and how often it ran the student."""
    runtime, student, calls = Runtime("cpu"), predict(0), []

    def counted(batch: Batch) -> Outputs:
        calls.append(len(batch))
        return student(batch)

    found = evaluate(
        counted,
        source(rows),
        build_task("classification", CLASSES),
        group_by="year",
        batch_size=2,
        device="cpu",
        rank=runtime.rank,
        world=runtime.world,
        teacher=predict(3),
    )
    return found, len(calls)


@pytest.mark.parametrize("rows", [9, 1])
def test_two_ranks_give_the_figures_of_one(rows: int, pair: Any):
    one = run(rows=rows, batch_size=2, group_by="year", teacher=predict(3))
    (first, first_calls), (second, second_calls) = pair.run(on_a_rank, rows)
    assert first == second
    assert first == pytest.approx(one, abs=1e-7)
    assert list(first) == list(one)
    assert first_calls == second_calls  # a sharded model's forward is a collective
