"""There and back: what each form keeps of a teacher's outputs, and that draws are unbiased."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tutelage.engine.philox import Counter
from tutelage.engine.types import Outputs, Sampled, TopK
from tutelage.teachers.forms import Layout, sample, top_k
from tutelage.teachers.manifest import FormPart, StoreError
from tutelage.teachers.measuring import ErrorMeter

ROWS, CLASSES = 24, 11


def logits(rows: int = ROWS, classes: int = CLASSES, scale: float = 4.0, seed: int = 0) -> Tensor:
    return scale * torch.randn(rows, classes, generator=torch.Generator().manual_seed(seed))


def layout(classes: int = CLASSES, taps: dict[str, tuple[int, ...]] | None = None, **form: Any) -> Layout:
    values = {
        "form": "dense",
        "k": None,
        "scale": "raw",
        "dtype": "float32",
        "draw_temperature": 1.0,
        "seed": 0,
    }
    part = FormPart(**(values | form))
    return Layout(part, None if part.form == "none" else (classes,), taps or {})


def there_and_back(found: Layout, outputs: Outputs, first: int = 0) -> Outputs:
    rows = len(outputs.logits)
    index = torch.arange(first, first + rows)
    columns = found.encode(outputs, index, torch.zeros_like(index))
    declared = {name: (column.dtype, (rows, *column.shape)) for name, column in found.columns.items()}
    assert {name: (column.dtype, tuple(column.shape)) for name, column in columns.items()} == declared
    return found.decode(columns, tuple(found.taps))


@pytest.mark.parametrize(
    ("dtype", "bound"),
    [
        ("float32", 0.0),
        ("float16", 2.0**-11),
        ("bfloat16", 2.0**-8),
        ("float8_e4m3fn", 2.0**-4),
        ("int8", 0.5 / 127),
    ],
)
def test_the_error_of_each_type_is_its_rounding(dtype: str, bound: float) -> None:
    """Relative to a row's largest value."""
    given = logits()
    features = {
        "a.b": torch.randn(ROWS, 3, 4, 5),
        "a.b:in": 1e3 * torch.randn(ROWS, 7),
        "flat": torch.zeros(ROWS, 2),
    }
    taps = {tap: tuple(tensor.shape[1:]) for tap, tensor in features.items()}
    found = there_and_back(layout(dtype=dtype, taps=taps), Outputs(given, features=features))
    for wanted, stored in [(given, found.logits), *((features[tap], found.features[tap]) for tap in taps)]:
        assert stored.dtype == torch.float32
        largest = wanted.flatten(1).abs().amax(1).view(-1, *[1] * (wanted.dim() - 1))
        assert bool(((stored - wanted).abs() <= bound * largest * 1.0001).all())
    assert bound == 0 or not torch.equal(found.logits, given)


def test_log_probabilities_come_back_as_such() -> None:
    found = there_and_back(layout(scale="log_probs"), Outputs(logits())).logits
    torch.testing.assert_close(found, logits().log_softmax(1))


def test_the_largest_k_and_the_mass_of_the_rest() -> None:
    given = torch.cat([logits(), torch.tensor([[1e4, *[-1e4] * (CLASSES - 1)]])])
    found = there_and_back(layout(form="topk", k=4), Outputs(given)).stored_logits
    assert isinstance(found, TopK)
    probabilities = given.double().softmax(1)
    kept = probabilities.gather(1, found.ids)
    assert torch.equal(found.ids, probabilities.topk(4).indices)
    torch.testing.assert_close(found.log_probs[:-1].exp().double(), kept[:-1], rtol=2e-2, atol=1e-7)
    torch.testing.assert_close(found.tail.double() + kept.sum(1), torch.ones(ROWS + 1).double())
    assert bool(found.log_probs.isfinite().all())


def test_a_small_tail_keeps_its_digits() -> None:
    given = torch.tensor([[30.0, 0.0, 0.0]])
    tail = top_k(given, 1).tail
    torch.testing.assert_close(tail, torch.tensor([2 * math.exp(-30)]), rtol=1e-5, atol=0)


@pytest.mark.parametrize(("classes", "bytes_an_entry"), [(1000, 4), (65_536, 4), (65_537, 6)])
@pytest.mark.parametrize("form", ["topk", "sampled"])
def test_an_entry_takes_six_bytes_at_most(form: str, classes: int, bytes_an_entry: int) -> None:
    found = layout(classes, form=form, k=50)
    assert found.row_bytes == 50 * bytes_an_entry + 4
    given = torch.zeros(1, classes)
    given[0, classes - 1] = 50.0
    kept = there_and_back(found, Outputs(given)).stored_logits
    assert isinstance(kept, TopK | Sampled)
    assert int(kept.ids[0, 0]) == classes - 1


@pytest.mark.parametrize("temperature", [0.8, 1.0, 2.0])
def test_the_mean_gradient_over_draws_is_the_dense_gradient(temperature: float) -> None:
    """Of the cross-entropy -Σ p log s, through the store's own rounding; within 5 standard errors everywhere."""
    draws, k = 20_000, 5
    teacher = logits(1, scale=1.5)
    form = layout(form="sampled", k=k, draw_temperature=temperature)
    found = there_and_back(form, Outputs(teacher.expand(draws, -1).contiguous())).stored_logits
    assert isinstance(found, Sampled)
    assert found.ids.shape == (draws, k)
    assert bool((found.weights >= 0).all())
    student = logits(1, seed=1).double().requires_grad_()
    dense = -(teacher.double().softmax(1) * student.log_softmax(1)).sum()
    (wanted,) = torch.autograd.grad(dense, student)
    # By row: softmax · Σw - Σ w · onehot(id).
    picked = torch.zeros(draws, CLASSES).double().scatter_add_(1, found.ids, found.weights.double())
    gradients = student.detach().softmax(1) * picked.sum(1, keepdim=True) - picked
    error = gradients.std(0) / math.sqrt(draws)
    assert bool(((gradients.mean(0) - wanted[0]).abs() <= 5 * error + 1e-5).all())
    assert bool((gradients.std(0) > 1e-3).all())


def test_draws_depend_on_seed_row_and_view_alone() -> None:
    given = logits(6)

    def drawn(rows: slice, view: int = 0, seed: int = 0) -> Tensor:
        index = np.arange(6)[rows]
        return sample(given[rows], 64, 1.0, Counter(index, np.full_like(index, view), seed)).ids

    whole = drawn(slice(None))
    assert torch.equal(torch.cat([drawn(slice(0, 1)), drawn(slice(1, 6))]), whole)
    assert not torch.equal(drawn(slice(None), view=1), whole)
    assert not torch.equal(drawn(slice(None), seed=1), whole)
    alike = sample(
        given[:1].expand(2, -1), 64, 1.0, Counter(np.array([0, 1]), np.zeros(2, dtype=np.int64), 0)
    )
    assert not torch.equal(alike.ids[0], alike.ids[1])


def test_a_class_without_probability_is_never_drawn() -> None:
    given = torch.tensor([[-1e4, 0.0, -1e4, 0.0, -1e4]])
    counter = Counter(np.zeros(1, dtype=np.int64), np.zeros(1, dtype=np.int64), 0)
    found = sample(given, 1000, 1.0, counter)
    assert set(found.ids.flatten().tolist()) == {1, 3}
    torch.testing.assert_close(found.weights, torch.full((1, 1000), 1e-3))


def test_sequences_have_a_distribution_a_token() -> None:
    given = torch.randn(3, 5, CLASSES)
    values = {"form": "topk", "k": 2, "scale": "raw", "dtype": "float32", "draw_temperature": 1.0, "seed": 0}
    for form in ("topk", "sampled"):
        found = Layout(FormPart(**(values | {"form": form})), (5, CLASSES), {})  # type: ignore[arg-type]
        kept = there_and_back(found, Outputs(given)).stored_logits
        assert isinstance(kept, TopK | Sampled)
        assert kept.ids.shape == (3, 5, 2)


@pytest.mark.parametrize(
    "form", [{}, {"form": "topk", "k": 2}, {"form": "sampled", "k": 2}, {"dtype": "int8"}]
)
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_an_output_that_is_not_finite_is_refused(form: dict[str, Any], value: float) -> None:
    given = logits()
    given[3, 2] = value
    with pytest.raises(StoreError, match=r"the teacher's logits of row 103, view 0, cannot be stored"):
        there_and_back(layout(**form), Outputs(given), first=100)


def test_what_a_type_cannot_hold_is_refused_and_not_made_infinite() -> None:
    given = logits()
    features = {"a": torch.full((ROWS, 2), 1e5)}
    with pytest.raises(
        StoreError, match=r"the teacher's a of row 0.*float16 ends at 65504; take bfloat16 or float32"
    ):
        there_and_back(layout(dtype="float16", taps={"a": (2,)}), Outputs(given, features=features))


def test_the_measured_error_is_the_error() -> None:
    given, features = logits(), {"a": torch.randn(ROWS, 3)}
    outputs, found = Outputs(given, features=features), layout(dtype="int8", taps={"a": (3,)})
    meter = ErrorMeter(found, "classification")
    index = torch.arange(ROWS)
    for rows in (slice(0, 5), slice(5, ROWS)):
        part = Outputs(given[rows], features={"a": features["a"][rows]})
        meter.update(part, found.encode(part, index[rows], torch.zeros_like(index[rows])))
    back = there_and_back(found, outputs)
    apart = (back.logits - given).abs()
    divergence = torch.nn.functional.kl_div(
        back.logits.double().log_softmax(1),
        given.double().log_softmax(1),
        reduction="batchmean",
        log_target=True,
    )
    assert meter.result() == pytest.approx(
        {
            "logits.max": float(apart.max()),
            "logits.mean": float(apart.mean()),
            "kl": float(divergence),
            "a.max": float((back.features["a"] - features["a"]).abs().max()),
            "a.mean": float((back.features["a"] - features["a"]).abs().mean()),
        }
    )
    for sparse, name in ((layout(form="topk", k=3), "tail"), (layout(form="sampled", k=64), "mass")):
        meter = ErrorMeter(sparse, "classification")
        meter.update(outputs, sparse.encode(outputs, index, torch.zeros_like(index)))
        assert 0 < meter.result()[name] < 1.5
