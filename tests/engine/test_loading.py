"""Which rows a step sees."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from support import rows
from tutelage.engine.loading import Loader, ShuffleSampler, Stream
from tutelage.engine.types import Batch


def loader(count: int = 40, **options: int) -> Loader:
    return Loader(rows(count), ShuffleSampler(count, 3), **{"batch_size": 8, **options})


def ids(steps: Sequence[list[Batch]]) -> list[list[int]]:
    return [[int(i) for batch in step for i in batch.index] for step in steps]


def take(made: Loader, start: int, count: int) -> list[list[Batch]]:
    return list(itertools.islice(made.steps(start), count))


@given(start=st.integers(0, 12), accumulate=st.sampled_from([1, 2, 4]))
@settings(max_examples=20, deadline=None)
def test_any_start_gives_the_same_steps(start: int, accumulate: int) -> None:
    whole = ids(take(loader(), 0, 20))
    assert ids(take(loader(accumulate=accumulate), start, 20 - start)) == whole[start:]


@pytest.mark.parametrize("accumulate", [1, 2])
def test_ranks_share_every_micro_batch(accumulate: int) -> None:
    """Together they have those of one process; each rank's are those of one process with twice as many."""

    def micro(**options: int) -> list[list[list[int]]]:
        return [[batch.index.tolist() for batch in step] for step in take(loader(**options), 0, 6)]

    first, second = (micro(rank=rank, world=2, accumulate=accumulate) for rank in range(2))
    for ours, theirs, whole, finer in zip(
        first, second, micro(accumulate=accumulate), micro(accumulate=2 * accumulate), strict=True
    ):
        assert [a + b for a, b in zip(ours, theirs, strict=True)] == whole
        assert [part for pair in zip(ours, theirs, strict=True) for part in pair] == finer


def test_an_epoch_visits_every_row_once() -> None:
    seen = list(itertools.chain.from_iterable(ids(take(loader(), 0, 5))))
    assert sorted(seen) == list(range(40))
    assert ids(take(loader(), 0, 5)) != ids(take(loader(), 5, 5))


@pytest.mark.parametrize("start", [0, 3, 7])
def test_workers_change_nothing(start: int) -> None:
    assert ids(take(loader(workers=2), start, 5)) == ids(take(loader(), start, 5))


def test_a_stream_goes_on_where_it_was() -> None:
    first = Stream(loader, torch.device("cpu"))
    drawn = [next(first).index.tolist() for _ in range(9)]
    second = Stream(loader, torch.device("cpu"))
    second.seek(4)
    assert [next(second).index.tolist() for _ in range(5)] == drawn[4:]
    assert second.drawn == 9


def test_a_step_that_does_not_divide() -> None:
    with pytest.raises(ValueError, match="does not divide into 3 ranks"):
        loader(world=3)
