"""Mixed rows: what must hold for any of them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tutelage.functional import mixup


def rows(count: int = 5, classes: int = 3, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(count, 2, 4, generator=generator), torch.randint(classes, (count,), generator=generator)


@given(st.integers(1, 8), st.integers(0, 100))
def test_targets_stay_distributions(count: int, seed: int) -> None:
    inputs, target = rows(count, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(count, generator=generator)
    weight = torch.rand(count, generator=generator)
    mixed, labels = mixup(inputs, target, order, weight, num_classes=3)
    torch.testing.assert_close(labels.sum(1), torch.ones(count))
    wide = weight[:, None, None]
    torch.testing.assert_close(mixed, wide * inputs + (1 - wide) * inputs[order])
    again, soft = mixup(inputs, torch.nn.functional.one_hot(target, 3).float(), order, weight[:, None])
    assert torch.equal(again, mixed)
    assert torch.equal(soft, labels)


def test_a_weight_of_1_gives_the_first_rows_and_0_the_partners() -> None:
    inputs, target = rows()
    order, base = torch.tensor([4, 3, 2, 1, 0]), torch.tensor([1, 2, 3, 4, 0])
    first, labels = mixup(inputs, target, order, 1.0, base=base, num_classes=3)
    assert torch.equal(first, inputs[base])
    assert torch.equal(labels.argmax(1), target[base])
    assert torch.equal(mixup(inputs, target, order, 0, num_classes=3)[0], inputs[order])


def test_half_precision_inputs_keep_wide_labels() -> None:
    inputs, target = rows()
    mixed, labels = mixup(inputs.bfloat16(), target, torch.arange(5), 0.3, num_classes=3)
    assert (mixed.dtype, labels.dtype) == (torch.bfloat16, torch.float32)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"inputs": torch.zeros(5, 2, dtype=torch.uint8)}, "must be floating point; got torch.uint8"),
        ({"weight": 1.5}, r"lies in \[0, 1\]"),
        ({"weight": torch.full((5,), float("nan"))}, r"lies in \[0, 1\]"),
        ({"weight": torch.rand(4)}, r"a number, \[5\] or \[5, 1\]; got shape \[4\]"),
        ({"num_classes": None}, "no num_classes"),
        ({"num_classes": 2, "target": torch.tensor([0, 1, 2, 0, 1])}, "target 2 names none of the 2 classes"),
        ({"target": torch.full((5, 3), 0.5)}, "sums to 1"),
        ({"permutation": torch.arange(4)}, r"permutation must hold one position a row, \[5\]"),
        ({"base": torch.arange(6)}, r"base must hold one position a row, \[5\]"),
    ],
)
def test_bad_input(change: dict[str, Any], message: str) -> None:
    inputs, target = rows()
    given: dict[str, Any] = {
        "inputs": inputs,
        "target": target,
        "permutation": torch.arange(5),
        "weight": 0.5,
        "num_classes": 3,
    } | change
    with pytest.raises(ValueError, match=message):
        mixup(**given)
