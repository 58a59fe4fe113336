"""Long-tailed training rows."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tutelage.data import open_data
from tutelage.data.imbalance import long_tailed
from tutelage.data.source import DataError, TensorSource
from tutelage.recipe.schema import DataConfig, ImbalanceConfig


def rows(counts: list[int]) -> TensorSource:
    target = torch.cat([torch.full((count,), c) for c, count in enumerate(counts)])
    target = target[torch.randperm(len(target), generator=torch.Generator().manual_seed(0))]
    return TensorSource(torch.arange(len(target)).float()[:, None], target)


def counts(source: object, classes: int) -> list[int]:
    return torch.bincount(source.target, minlength=classes).tolist()  # type: ignore[attr-defined]


def test_cifar_lt_counts() -> None:
    """The field's CIFAR-10-LT of ratio 100 (Cui et al. 2019)."""
    kept = long_tailed(rows([5000] * 10), ImbalanceConfig(ratio=100), 10, seed=0)
    assert counts(kept, 10) == [5000, 2997, 1796, 1077, 645, 387, 232, 139, 83, 50]


@given(
    st.lists(st.integers(20, 200), min_size=2, max_size=6),
    st.floats(1, 20),
    st.sampled_from(["ids", "random"]),
)
def test_every_class_has_enough_and_the_fall_is_kept(have: list[int], ratio: float, order: str) -> None:
    config = ImbalanceConfig(ratio=ratio, order=order)
    kept = sorted(counts(long_tailed(rows(have), config, len(have), seed=3), len(have)), reverse=True)
    assert kept[0] <= max(have)
    for place, count in enumerate(kept):
        wanted = kept[0] * ratio ** (-place / (len(have) - 1))
        assert wanted - 1 <= count <= (kept[0] + 1) * ratio ** (-place / (len(have) - 1)) + 1e-6


def test_the_rows_depend_on_the_seed_alone_and_a_stronger_fall_keeps_a_part() -> None:
    source = rows([100] * 4)
    mild, same, strong = (
        long_tailed(source, ImbalanceConfig(ratio=ratio), 4, seed=1) for ratio in (2, 2, 10)
    )
    assert torch.equal(mild.positions, same.positions)
    assert set(strong.positions.tolist()) < set(mild.positions.tolist())
    assert not torch.equal(mild.positions, long_tailed(source, ImbalanceConfig(ratio=2), 4, seed=2).positions)


def test_an_order_of_its_own_for_every_seed() -> None:
    config = ImbalanceConfig(ratio=10, order="random")
    first = {counts(long_tailed(rows([50] * 5), config, 5, seed), 5).index(50) for seed in range(20)}
    assert len(first) > 2


def test_held_out_rows_stay() -> None:
    plain = DataConfig(path="digits", test=500, validation=200)
    data = open_data(plain.model_copy(update={"imbalance": ImbalanceConfig(ratio=10)}), "classification")
    whole = open_data(plain, "classification")
    assert data.test is not None
    assert whole.test is not None
    assert data.test.fingerprint == whole.test.fingerprint
    kept = torch.bincount(data.train.target).tolist()  # type: ignore[attr-defined]
    assert kept[0] >= 9 * kept[9] > 0
    assert data.train.fingerprint != whole.train.fingerprint


def test_what_cannot_be_long_tailed() -> None:
    with pytest.raises(DataError, match="leaves no row of class 1"):
        long_tailed(rows([5, 5, 5]), ImbalanceConfig(ratio=1000), 3, seed=0)
    with pytest.raises(DataError, match="class ids of at least two classes"):
        long_tailed(TensorSource(torch.zeros(3, 1), torch.rand(3, 2)), ImbalanceConfig(ratio=10), 2, seed=0)
