"""Steps from a stream: cut as rows at hand are, and gone on with exactly."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any

import pytest
import torch

from tutelage.data.source import TensorSource
from tutelage.engine.streaming import StreamLoader
from tutelage.engine.types import Batch


@dataclass
class Window:
    source: TensorSource
    number: int
    state: dict[str, Any]


class Numbers:
    """Windows of ten rows: 0 to 9, 10 to 19, …"""

    def __init__(self, epoch_rows: int = 16, rows: int = 10) -> None:
        self.epoch_rows, self.rows = epoch_rows, rows

    def windows(self, state: Mapping[str, Any] | None = None) -> Iterator[Window]:
        number = 0 if state is None else state["number"]
        while True:
            first = number * self.rows
            rows = torch.arange(first, first + self.rows)
            yield Window(TensorSource(rows[:, None].float(), index=rows), number, {"number": number})
            number += 1


class Passes(Numbers):
    """Windows of ten, ten and three rows, over and over: the rest of a pass fills no step of four."""

    def windows(self, state: Mapping[str, Any] | None = None) -> Iterator[Window]:
        number = 0 if state is None else state["number"]
        while True:
            first, rows = 10 * (number % 3), 3 if number % 3 == 2 else 10
            values = torch.arange(first, first + rows)
            yield Window(TensorSource(values[:, None].float(), index=values), number, {"number": number})
            number += 1


def ids(steps: Iterator[list[Batch]], count: int) -> list[list[list[int]]]:
    return [[batch.index.tolist() for batch in step] for step in islice(steps, count)]  # type: ignore[union-attr]


def test_every_row_of_a_window_that_fills_a_step_is_seen_once_and_in_random_order() -> None:
    seen = ids(StreamLoader(Numbers(), batch_size=4, seed=1).steps(0), 4)
    flat = [number for step in seen for batch in step for number in batch]
    assert len(set(flat)) == 16
    assert all(number < 10 for number in flat[:8])
    assert all(10 <= number < 20 for number in flat[8:])
    assert flat[:8] != sorted(flat[:8])
    assert seen != ids(StreamLoader(Numbers(), batch_size=4, seed=2).steps(0), 4)


@pytest.mark.parametrize("done", [1, 2, 3, 5])
def test_a_resumed_loader_gives_the_steps_that_are_left(done: int) -> None:
    whole = ids(StreamLoader(Numbers(), batch_size=4).steps(0), 8)
    first = StreamLoader(Numbers(), batch_size=4)
    assert ids(first.steps(0), done) == whole[:done]
    kept = json.loads(json.dumps(first.state_dict()))
    again = StreamLoader(Numbers(), batch_size=4)
    again.load_state_dict(kept)
    assert ids(again.steps(done), 8 - done) == whole[done:]


@pytest.mark.parametrize("done", [0, 3, 4, 5])
def test_what_is_left_of_a_pass_fills_no_step_and_ends_nothing(done: int) -> None:
    whole = ids(StreamLoader(Passes(), batch_size=4).steps(0), 12)
    assert {number for step in whole for batch in step for number in batch} <= set(range(20))
    first = StreamLoader(Passes(), batch_size=4)
    assert ids(first.steps(0), done) == whole[:done]
    again = StreamLoader(Passes(), batch_size=4)
    again.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert ids(again.steps(done), 12 - done) == whole[done:]


def test_ranks_and_micro_batches_share_the_steps_of_one_process() -> None:
    one = ids(StreamLoader(Numbers(), batch_size=4).steps(0), 4)
    ranks = [ids(StreamLoader(Numbers(), batch_size=4, rank=rank, world=2).steps(0), 4) for rank in (0, 1)]
    parts = ids(StreamLoader(Numbers(), batch_size=4, accumulate=2).steps(0), 4)
    for step, (whole, *shares) in enumerate(zip(one, *ranks, strict=True)):
        assert whole[0] == [number for share in shares for number in share[0]]
        assert whole[0] == [number for batch in parts[step] for number in batch]


def test_what_cannot_be_cut_is_refused() -> None:
    with pytest.raises(ValueError, match="epoch_rows is 3"):
        StreamLoader(Numbers(epoch_rows=3), batch_size=4)
    with pytest.raises(ValueError, match="does not divide"):
        StreamLoader(Numbers(), batch_size=4, world=3)
    with pytest.raises(ValueError, match=r"data\.window"):
        next(StreamLoader(Numbers(rows=2), batch_size=4).steps(0))
    with pytest.raises(ValueError, match="step 0; step 3"):
        next(StreamLoader(Numbers(), batch_size=4).steps(3))
