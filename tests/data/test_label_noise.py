"""Wrong labels put in on purpose: how many, which, always the same, and never among held-out rows."""

from __future__ import annotations

import pytest
import torch
from pydantic import ValidationError

from tutelage.data import DataError, TensorSource, WrongLabels, open_data, subset, targets
from tutelage.recipe.schema import DataConfig

ROWS = 4000


def labelled(classes: int = 5) -> TensorSource:
    return TensorSource(torch.zeros(ROWS, 1), torch.arange(ROWS) % classes)


def noisy(share: float, classes: int = 5, seed: int = 0, **options: tuple[int, ...]) -> WrongLabels:
    return WrongLabels(labelled(classes), share, classes, seed=seed, split="train", **options)


def test_a_share_of_rows_gets_each_other_class_alike():
    clean, found = labelled().target, noisy(0.3).target
    wrong = found != clean
    assert wrong.double().mean().item() == pytest.approx(0.3, abs=0.03)
    steps = (found - clean)[wrong] % 5
    assert sorted(steps.unique().tolist()) == [1, 2, 3, 4]
    assert steps.bincount()[1:].double().div(len(steps)).tolist() == pytest.approx([0.25] * 4, abs=0.04)
    assert torch.equal(noisy(1.0).target == clean, torch.zeros(ROWS, dtype=torch.bool))
    assert torch.equal(noisy(0.0).target, clean)


def test_named_classes_are_mixed_among_themselves():
    clean, found = labelled().target, noisy(0.5, among=(3, 0, 1)).target
    wrong = found != clean
    assert set(clean[wrong].tolist()) == set(found[wrong].tolist()) == {0, 1, 3}
    assert wrong[clean == 3].double().mean().item() == pytest.approx(0.5, abs=0.05)


def test_it_is_the_same_by_row_however_it_is_read():
    source = noisy(0.3)
    whole = source.target
    assert torch.equal(source.fetch([17, 3, 17]).target, whole[[17, 3, 17]])
    assert torch.equal(targets(subset(source, [5, 9])), whole[[5, 9]])
    assert not torch.equal(noisy(0.3, seed=1).target, whole)
    assert noisy(0.3).fingerprint == source.fingerprint
    assert len({noisy(0.3, seed=1).fingerprint, noisy(0.2).fingerprint, source.fingerprint}) == 3


def test_held_out_rows_keep_their_labels():
    plain = open_data(DataConfig(path="digits", test=300, validation=200), "classification")
    found = open_data(DataConfig(path="digits", test=300, validation=200, label_noise=0.2), "classification")
    assert torch.equal(targets(found.validation), targets(plain.validation))
    assert torch.equal(targets(found.test), targets(plain.test))
    assert (targets(found.train) != targets(plain.train)).double().mean().item() == pytest.approx(
        0.2, abs=0.04
    )
    assert torch.equal(found.train.fetch([0]).inputs, plain.train.fetch([0]).inputs)


def test_what_is_refused():
    with pytest.raises(DataError, match="the task is regression: leave it out"):
        open_data(DataConfig(path="digits", label_noise=0.1), "regression")
    with pytest.raises(DataError, match="the data has 10 classes"):
        open_data(DataConfig(path="digits", label_noise=0.1, label_noise_classes=(0, 10)), "classification")
    for bad in ({"label_noise": 1.5}, {"label_noise": -0.1}, {"label_noise_classes": (3,)}):
        with pytest.raises(ValidationError):
            DataConfig(path="digits", **bad)
    soft = TensorSource(torch.zeros(2, 1), torch.rand(2, 3))
    with pytest.raises(DataError, match="needs class ids"):
        WrongLabels(soft, 0.5, 3, seed=0, split="train").fetch([0])
