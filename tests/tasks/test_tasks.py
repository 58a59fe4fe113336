"""Tasks: label losses against torch, gradients, checks that name the row, metrics against torchmetrics."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional
from torchmetrics.functional.classification import (
    multiclass_calibration_error,
    multilabel_accuracy,
    multilabel_average_precision,
    multilabel_f1_score,
)
from torchmetrics.functional.regression import mean_absolute_error, r2_score

from tutelage.engine.types import Batch, Outputs
from tutelage.tasks import Task, build_task

ROWS, WIDTH = 12, 4
TASKS = ["classification", "multilabel", "regression"]


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def target(name: str, rows: int = ROWS) -> Tensor:
    generator = torch.Generator().manual_seed(5)
    if name == "classification":
        return torch.randint(0, WIDTH, (rows,), generator=generator)
    if name == "multilabel":
        return torch.randint(0, 2, (rows, WIDTH), generator=generator).float()
    return draw(rows, WIDTH, seed=5)


def batch(name: str = "classification", rows: int = ROWS, **changes: object) -> Batch:
    fields = {"inputs": draw(rows, 3), "target": target(name, rows), "index": torch.arange(rows) + 100}
    return Batch(**(fields | changes))


def loss(task: Task, logits: Tensor, rows: Batch) -> Tensor:
    term = task.label_loss(Outputs(logits), rows)
    assert term.items == "rows"
    return term.mean


def measure(
    task: Task, name: str, logits: Tensor, rows: Batch, teacher: Tensor | None = None, cut: int = 5
) -> float | None:
    metric = task.metrics([name])[name]
    for start in range(0, len(rows), cut):
        part = slice(start, start + cut)
        compared = None if teacher is None else Outputs(teacher[part])
        metric.update(Outputs(logits[part]), rows.select(part), compared)
    return metric.compute()


REFERENCES = {
    "classification": functional.cross_entropy,
    "multilabel": functional.binary_cross_entropy_with_logits,
    "regression": functional.mse_loss,
}


@pytest.mark.parametrize("name", TASKS)
@pytest.mark.parametrize("mask", [None, "some"])
def test_label_loss_and_its_gradient_are_torchs(name, mask):
    task, logits = build_task(name, WIDTH), draw(ROWS, WIDTH, seed=1).requires_grad_()
    keep = None if mask is None else torch.arange(ROWS) % 3 != 0
    value = loss(task, logits, batch(name, mask=keep))
    chosen = slice(None) if keep is None else keep
    expected = REFERENCES[name](logits[chosen], target(name)[chosen])
    torch.testing.assert_close(value, expected)
    ours, theirs = torch.autograd.grad(value, logits)[0], torch.autograd.grad(expected, logits)[0]
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("name", TASKS)
def test_a_mask_without_rows_gives_zero_with_a_graph(name):
    logits = draw(ROWS, WIDTH).requires_grad_()
    value = loss(build_task(name, WIDTH), logits, batch(name, mask=torch.zeros(ROWS, dtype=torch.bool)))
    assert value.item() == 0
    value.backward()
    assert torch.equal(logits.grad, torch.zeros(ROWS, WIDTH))


@pytest.mark.parametrize("name", TASKS)
def test_what_stands_in_ignored_rows_does_not_matter(name):
    task, keep = build_task(name, WIDTH), torch.arange(ROWS) % 2 == 0
    logits = draw(ROWS, WIDTH, seed=1)
    broken = torch.where(keep[:, None], logits, torch.nan).requires_grad_()
    wrong = target(name).clone()
    wrong[~keep] = -100 if name == "classification" else torch.nan
    rows = batch(name, mask=keep, target=wrong)
    value = loss(task, broken, rows)
    torch.testing.assert_close(value, loss(task, logits, batch(name, mask=keep)))
    value.backward()
    assert bool(torch.isfinite(broken.grad).all())
    task.check(rows, Outputs(logits))
    for metric in set(task.default_metrics) - {"agreement"}:
        clean = measure(task, metric, logits[keep], batch(name).select(keep))
        assert measure(task, metric, logits, rows) == pytest.approx(clean, nan_ok=True)


@pytest.mark.parametrize("name", TASKS)
def test_loss_is_float32_under_autocast_and_finite_at_large_logits(name):
    task = build_task(name, WIDTH)
    with torch.autocast("cpu", torch.bfloat16):
        assert loss(task, draw(ROWS, WIDTH).bfloat16(), batch(name)).dtype == torch.float32
    assert loss(task, draw(ROWS, WIDTH).double(), batch(name)).dtype == torch.float64
    logits = (draw(1, WIDTH) * 1e4).requires_grad_()
    loss(task, logits, batch(name, 1)).backward()
    assert bool(torch.isfinite(logits.grad).all())


@given(smoothing=st.floats(0, 0.9), seed=st.integers(0, 50))
def test_ids_and_their_distributions_have_one_loss(smoothing, seed):
    task = build_task("classification", WIDTH, label_smoothing=smoothing)
    logits, ids = draw(ROWS, WIDTH, seed=seed), target("classification")
    hot = functional.one_hot(ids, WIDTH).float()
    by_ids = loss(task, logits, batch())
    torch.testing.assert_close(by_ids, loss(task, logits, batch(target=hot)))
    torch.testing.assert_close(by_ids, functional.cross_entropy(logits, ids, label_smoothing=smoothing))
    # the reported loss leaves the smoothing out
    assert measure(task, "loss", logits, batch()) == pytest.approx(
        float(functional.cross_entropy(logits, ids)), rel=1e-5
    )


def test_regression_takes_one_column_as_a_vector():
    task, predicted = build_task("regression", 1), draw(ROWS, 1)
    values = draw(ROWS, seed=2)
    torch.testing.assert_close(
        loss(task, predicted, batch(target=values)), functional.mse_loss(predicted[:, 0], values)
    )


@pytest.mark.parametrize("name", TASKS)
def test_metrics_are_torchmetrics_whatever_the_cut(name):
    task, logits, wanted = build_task(name, WIDTH), draw(ROWS, WIDTH, seed=1), target(name)
    mark = wanted.long() if name == "multilabel" else wanted
    expected = {
        "classification": {
            "accuracy": lambda: (logits.argmax(1) == wanted).float().mean(),
            "calibration_error": lambda: multiclass_calibration_error(
                logits.softmax(1), wanted, WIDTH, n_bins=15
            ),
        },
        "multilabel": {
            "average_precision": lambda: multilabel_average_precision(logits, mark, WIDTH),
            "f1": lambda: multilabel_f1_score(logits, mark, WIDTH),
            "accuracy": lambda: multilabel_accuracy(logits, mark, WIDTH),
        },
        "regression": {
            "mae": lambda: mean_absolute_error(logits, wanted),
            "r2": lambda: r2_score(logits, wanted),
        },
    }[name]
    for metric, value in expected.items():
        for cut in (1, 5, ROWS):
            assert measure(task, metric, logits, batch(name), cut=cut) == pytest.approx(
                float(value()), abs=1e-6
            )
    assert set(expected) | {"loss"} <= set(task.higher_is_better)
    assert measure(task, "loss", logits, batch(name)) == pytest.approx(
        float(REFERENCES[name](logits, wanted))
    )


def test_top5_and_agreement():
    task, logits = build_task("classification", 8), draw(200, 8)
    rows = Batch(
        inputs=draw(200, 3), target=torch.randint(0, 8, (200,), generator=torch.Generator().manual_seed(1))
    )
    by_hand = sum(
        int(row) in set(scores.argsort()[-5:].tolist())
        for row, scores in zip(rows.target, logits, strict=True)
    )
    assert measure(task, "top5", logits, rows) == pytest.approx(by_hand / 200)
    assert measure(task, "agreement", logits, rows, logits * 3 + 1) == 1
    teacher = draw(200, 8, seed=9)
    same = (teacher.argmax(1) == logits.argmax(1)).float().mean()
    assert measure(task, "agreement", logits, rows, teacher) == pytest.approx(float(same))
    several = build_task("multilabel", 8)
    assert measure(several, "agreement", logits, rows, logits) == 1
    assert measure(several, "agreement", logits, rows, -logits) == 0


def test_confidences_of_sure_models_are_calibrated_or_not():
    task, ids = build_task("classification", WIDTH), target("classification")
    sure = functional.one_hot(ids, WIDTH) * 1e4
    assert measure(task, "calibration_error", sure, batch()) == 0
    assert measure(task, "calibration_error", sure.roll(1, 1), batch()) == 1
    # logits that all lie in [0, 1] are logits, not probabilities
    assert measure(task, "calibration_error", sure / 1e4, batch()) == pytest.approx(
        1 - math.e / (math.e + 3), abs=1e-6
    )


def test_metrics_that_are_not_defined_are_none():
    regression = build_task("regression", 1)
    assert measure(regression, "r2", draw(1, 1), batch(rows=1, target=draw(1))) is None
    assert measure(regression, "r2", draw(3, 1), batch(rows=3, target=torch.ones(3))) is None
    several = build_task("multilabel", WIDTH)
    assert (
        measure(several, "average_precision", draw(3, WIDTH), batch(rows=3, target=torch.zeros(3, WIDTH)))
        is None
    )
    only_first = torch.zeros(3, WIDTH)
    only_first[0, 0] = 1
    logits = torch.zeros(3, WIDTH)
    logits[0, 0] = 1
    assert measure(several, "average_precision", logits, batch(rows=3, target=only_first)) == 1
    masked = batch(mask=torch.zeros(ROWS, dtype=torch.bool))
    assert measure(build_task("classification", WIDTH), "accuracy", draw(ROWS, WIDTH), masked) is None


def test_names_of_metrics():
    assert "top5" not in build_task("classification", 5).metrics()
    assert list(build_task("classification", 6).metrics()) == [
        "accuracy",
        "top5",
        "calibration_error",
        "loss",
        "agreement",
    ]
    with pytest.raises(ValueError, match="'top5' is not defined for 5 outputs"):
        build_task("classification", 5).metrics(["top5"])
    with pytest.raises(ValueError, match=r"no metric 'acurracy'; allowed: accuracy.*did you mean 'accuracy'"):
        build_task("classification", 5).metrics(["acurracy"])
    for name in TASKS:
        assert set(build_task(name, 9).known_metrics) == set(build_task(name, 9).higher_is_better)


def test_build_task_errors():
    with pytest.raises(ValueError, match=r"no task 'clasification'.*did you mean 'classification'"):
        build_task("clasification", 3)
    with pytest.raises(ValueError, match=r"label_smoothing is 0.1.*regression takes 0"):
        build_task("regression", 3, label_smoothing=0.1)


def changed(values: Tensor, position: tuple[int, ...], value: float) -> Tensor:
    values = values.clone()
    values[position] = value
    return values


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        (
            "classification",
            {"target": changed(target("classification"), (3,), 4)},
            r"row 103 is 4; allowed: 0 to 3",
        ),
        (
            "classification",
            {"target": changed(target("classification"), (2,), -1)},
            r"row 102 is -1; allowed: 0 to 3",
        ),
        ("classification", {"target": torch.full((ROWS, WIDTH), 0.26)}, r"row 100 sums to 1.04"),
        (
            "classification",
            {"target": torch.tensor([[1.5, -0.5, 0, 0]] * ROWS)},
            r"row 100 has the negative share -0.5",
        ),
        ("classification", {"target": torch.full((ROWS, 3), 1 / 3)}, r"over 3 classes, the task has 4"),
        ("classification", {"target": torch.zeros(ROWS)}, r"class ids.*float32 of shape \[12\]"),
        (
            "classification",
            {"inputs": changed(draw(ROWS, 3), (7, 1), math.nan)},
            r"inputs of row 107 holds nan",
        ),
        (
            "classification",
            {"inputs": {"ids": changed(draw(ROWS, 3), (7, 1), math.inf)}},
            r"ids of row 107 holds inf",
        ),
        (
            "multilabel",
            {"target": changed(target("multilabel"), (4, 2), 2)},
            r"label 2 of row 104 is 2; allowed: 0 to 1",
        ),
        ("multilabel", {"target": torch.zeros(ROWS)}, r"\[rows, 4\]; got shape \[12\]"),
        (
            "regression",
            {"target": changed(target("regression"), (5, 0), math.nan)},
            r"target of row 105 holds nan",
        ),
        ("regression", {"target": torch.zeros(ROWS)}, r"\[rows, 4\]; got shape \[12\]"),
    ],
)
def test_check_names_value_and_row(name, changes, message):
    task = build_task(name, WIDTH)
    task.check(batch(name), Outputs(draw(ROWS, WIDTH)))
    with pytest.raises(ValueError, match=message):
        task.check(batch(name, **changes), None)


def test_check_compares_the_width_of_logits():
    with pytest.raises(ValueError, match="gives 7 outputs, the task classification has 4"):
        build_task("classification", WIDTH).check(batch(), Outputs(draw(ROWS, 7)))
    build_task("classification", WIDTH).check(batch(target=None), Outputs(features={"x": draw(ROWS, 7)}))


def test_a_loss_without_target_says_where_it_comes_from():
    with pytest.raises(ValueError, match=r"needs a target.*data\.target"):
        loss(build_task("classification", WIDTH), draw(ROWS, WIDTH), batch(target=None))


def test_balanced_accuracy_is_the_mean_of_the_classes_own() -> None:
    task = build_task("classification", 3)
    assert "balanced_accuracy" not in task.metrics()
    metric = task.metrics(["balanced_accuracy"])["balanced_accuracy"]
    logits = torch.eye(3)[[0, 0, 0, 1, 1, 2]]
    batch = Batch(logits, target=torch.tensor([0, 0, 1, 0, 1, 0]), mask=torch.tensor([1, 1, 1, 1, 1, 0]))
    metric.update(Outputs(logits), batch)
    assert metric.compute() == pytest.approx((2 / 3 + 1 / 2) / 2)  # class 2 has no row
