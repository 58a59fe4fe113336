"""Sources in memory, subsets, fixed noise, and torch datasets whose rows are pure functions."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from tutelage.data import (
    DataError,
    NoisySource,
    RowSource,
    SubsetSource,
    TensorSource,
    TorchSource,
    column,
    subset,
    targets,
)
from tutelage.engine.loading import Loader, ShuffleSampler, Source
from tutelage.engine.types import Batch


def source(rows: int = 20) -> TensorSource:
    return TensorSource(
        torch.arange(rows * 3.0).view(rows, 3),
        torch.arange(rows) % 4,
        index=torch.arange(rows) + 50,
        columns={"site": torch.arange(rows) % 2},
        names={"site": ("a", "b")},
    )


def test_a_tensor_source_gives_the_rows_asked_for():
    found = source()
    assert isinstance(found, Source)
    batch = found.fetch([3, 0, 3])
    assert torch.equal(batch.inputs[:, 0], torch.tensor([9.0, 0.0, 9.0]))
    assert batch.target.tolist() == [3, 0, 3]
    assert batch.index.tolist() == [53, 50, 53]
    assert batch.columns["site"].tolist() == [1, 0, 1]
    assert found.fields == {"target", "index", "site"}
    assert TensorSource(torch.zeros(2, 3)).fields == {"index"}
    assert len(found.fetch([]).inputs) == 0


def test_fingerprints_tell_rows_apart():
    marks = {source().fingerprint, source(19).fingerprint, subset(source(), [0, 1]).fingerprint}
    marks |= {subset(source(), [1, 0]).fingerprint, noisy().fingerprint, noisy(seed=1).fingerprint}
    marks |= {TensorSource(torch.zeros(4)).fingerprint, TensorSource(torch.zeros(2, 2)).fingerprint}
    assert len(marks) == 8
    assert source().fingerprint == source().fingerprint


def test_lengths_that_differ_are_refused():
    with pytest.raises(DataError, match="`target` has 2 rows, `index` has 3"):
        TensorSource(torch.zeros(3, 1), torch.zeros(2))
    with pytest.raises(DataError, match="inputs have 3 rows, `index` has 2"):
        TensorSource(torch.zeros(3, 1), index=torch.arange(2))


@given(st.lists(st.integers(0, 19), max_size=20), st.data())
def test_subsets_of_subsets_are_subsets(rows, data):
    first = subset(source(), rows)
    again = data.draw(st.lists(st.integers(0, max(0, len(rows) - 1)), max_size=5 if rows else 0))
    second = subset(first, again)
    assert isinstance(second, SubsetSource)
    assert isinstance(second.source, TensorSource)
    expected = source().fetch([rows[i] for i in again])
    found = second.fetch(list(range(len(again))))
    assert torch.equal(found.inputs, expected.inputs)
    assert torch.equal(found.index, expected.index)
    assert torch.equal(targets(second), expected.target)
    assert second.names == {"site": ("a", "b")}


def test_positions_outside_are_refused():
    with pytest.raises(DataError, match="row 20 of a source with 20 rows"):
        subset(source(), [3, 20])
    with pytest.raises(DataError, match="row -1"):
        subset(source(), [-1])


def test_targets_are_fetched_where_they_are_not_at_hand():
    class Plain:
        fields, fingerprint = frozenset({"target", "index"}), "plain"

        def __len__(self) -> int:
            return 700

        def fetch(self, positions: Any) -> Batch:
            rows = torch.as_tensor(positions)
            return Batch(inputs=rows[:, None].float(), target=rows * 2, index=rows)

    assert torch.equal(targets(Plain()), torch.arange(700) * 2)
    assert torch.equal(targets(subset(Plain(), [5, 2])), torch.tensor([10, 4]))
    with pytest.raises(DataError, match="no target"):
        targets(TensorSource(torch.zeros(2, 1)))


def test_a_column_of_all_rows_is_what_batches_carry():
    class Plain:
        fields, fingerprint = frozenset({"index", "site"}), "plain"

        def __len__(self) -> int:
            return 700

        def fetch(self, positions: Any) -> Batch:
            rows = torch.as_tensor(positions)
            return Batch(inputs=rows[:, None].float(), index=rows, columns={"site": rows % 3})

    assert torch.equal(column(Plain(), "site"), torch.arange(700) % 3)
    assert torch.equal(column(subset(Plain(), [5, 2, 6]), "site"), torch.tensor([2, 2, 0]))
    at_hand = source()
    assert torch.equal(column(at_hand, "site"), at_hand.fetch(range(20)).columns["site"])
    with pytest.raises(DataError, match=r"no column 'index'; name it in data\.columns"):
        column(Plain(), "index")


def noisy(
    base: RowSource | None = None, seed: int = 0, split: str = "train", scale: float = 1.0
) -> NoisySource:
    return NoisySource(base or source(), 0.5, scale=torch.tensor(scale), seed=seed, split=split)


def test_noise_belongs_to_the_row():
    whole = noisy().fetch(range(20)).inputs
    assert torch.equal(noisy().fetch([7, 2]).inputs, whole[[7, 2]])
    assert torch.equal(noisy(subset(source(), [7])).fetch([0]).inputs, whole[7:8])
    assert not torch.equal(noisy(seed=1).fetch(range(20)).inputs, whole)
    assert not torch.equal(noisy(split="test").fetch(range(20)).inputs, whole)
    assert torch.equal(targets(noisy()), targets(source()))


def test_noise_has_its_deviation_and_is_not_cut_off():
    images = TensorSource(torch.full((300, 1, 6, 6), 255, dtype=torch.uint8))
    found = noisy(images).fetch(range(300)).inputs
    assert found.dtype == torch.float32
    assert float(found.mean()) == pytest.approx(1, abs=0.02)
    assert float(found.std()) == pytest.approx(0.5, rel=0.03)
    wide = noisy(TensorSource(torch.zeros(300, 8)), scale=10.0).fetch(range(300)).inputs
    assert float(wide.std()) == pytest.approx(5, rel=0.05)


class Random(Dataset[Any]):
    """Rows that draw from all three global generators."""

    def __init__(self, kind: str = "tuple", rows: int = 12) -> None:
        self.kind, self.rows = kind, rows

    def __len__(self) -> int:
        return self.rows

    def __getitem__(self, row: int) -> Any:
        drawn = torch.tensor([row, random.random(), np.random.rand(), float(torch.rand(()))])
        if self.kind == "tuple":
            return drawn, row % 3
        return {"x": drawn, "mask": torch.ones(2), "y": row % 3, "site": np.float64(row / 4), "text": "words"}


def test_rows_of_a_torch_dataset_are_pure_functions():
    rows = TorchSource(Random())
    first = rows.fetch([4, 9]).inputs
    random.seed(3), np.random.seed(3), torch.manual_seed(3)
    states = random.getstate(), np.random.get_state()[1].copy(), torch.get_rng_state()
    assert torch.equal(rows.fetch([9, 4]).inputs, first.flip(0))
    assert random.getstate() == states[0]
    assert np.array_equal(np.random.get_state()[1], states[1])
    assert torch.equal(torch.get_rng_state(), states[2])
    rows.set_epoch(1)
    assert not torch.equal(rows.fetch([4, 9]).inputs[:, 1:], first[:, 1:])
    assert torch.equal(TorchSource(Random()).fetch([4, 9]).inputs, first)
    other = TorchSource(Random(), seed=1)
    assert bool((other.fetch([4, 9]).inputs[:, 1:] != first[:, 1:]).all())
    assert other.fingerprint != rows.fingerprint


@pytest.mark.parametrize("wrap", [lambda rows: rows, lambda rows: subset(rows, range(12))])
def test_loader_processes_give_the_same_rows_in_every_epoch(wrap):
    def steps(workers: int) -> list[Tensor]:
        rows = wrap(TorchSource(Random()))
        loader = Loader(rows, ShuffleSampler(12, 0), batch_size=6, workers=workers)
        taken = loader.steps(0)
        return [next(taken)[0].inputs for _ in range(4)]

    for ours, theirs in zip(steps(0), steps(2), strict=True):
        assert torch.equal(ours, theirs)


def test_a_process_that_outlives_an_epoch_hears_of_the_next():
    rows = TorchSource(Random())
    loader = DataLoader(
        _Fetched(rows), batch_sampler=[[0, 1]], num_workers=1, collate_fn=lambda x: x, persistent_workers=True
    )
    first = next(iter(loader)).inputs
    rows.set_epoch(5)
    assert torch.equal(next(iter(loader)).inputs, rows.fetch([0, 1]).inputs)
    assert not torch.equal(first, rows.fetch([0, 1]).inputs)


class _Fetched(Dataset[Batch]):
    def __init__(self, rows: TorchSource) -> None:
        self.rows = rows

    def __getitems__(self, positions: list[int]) -> Batch:
        return self.rows.fetch(positions)


def test_dict_rows_name_their_fields():
    rows = TorchSource(Random("dict"), inputs="x", target="y")
    batch = rows.fetch([5, 6])
    assert batch.target.tolist() == [2, 0]
    assert rows.fields == {"target", "index", "mask", "site"}
    assert batch.columns["site"].dtype == torch.float32
    several = TorchSource(Random("dict"), inputs=("x", "mask"), target="y").fetch([5])
    assert set(several.inputs) == {"x", "mask"}
    with pytest.raises(DataError, match=r"no tensor 'inputs'; they have x, mask, y, site"):
        TorchSource(Random("dict"))


def test_images_and_arrays_become_tensors():
    class Pictures(Dataset[Any]):
        def __init__(self, mode: str) -> None:
            self.mode = mode

        def __len__(self) -> int:
            return 2

        def __getitem__(self, row: int) -> Any:
            return Image.new(self.mode, (5, 4)), np.float64(row)

    for mode, channels in (("RGB", 3), ("L", 1), ("P", 3), ("1", 1)):
        batch = TorchSource(Pictures(mode)).fetch([0, 1])
        assert batch.inputs.shape == (2, channels, 4, 5)
        assert batch.inputs.dtype == torch.uint8
        assert batch.target.dtype == torch.float32


def test_datasets_that_cannot_serve_are_refused():
    with pytest.raises(DataError, match="no rows"):
        TorchSource(Random(rows=0))
    with pytest.raises(DataError, match="no map-style dataset"):
        TorchSource(iter([1]))

    class Bare(Random):
        def __getitem__(self, row: int) -> Any:
            return torch.zeros(3)

    with pytest.raises(DataError, match=r"row 0 is a Tensor; a row is \(inputs, target\) or a dict"):
        TorchSource(Bare())
