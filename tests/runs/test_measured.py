"""A teacher's outputs that are kept while a split is measured."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tutelage.engine.types import Batch, Head, Outputs
from tutelage.runs import measured
from tutelage.runs.measured import Remembered


class Gathering:
    """A teacher whose head is another copy at every call, as that of a sharded one is."""

    def __init__(self) -> None:
        self.calls = 0

    def outputs(self, batch: Batch) -> Outputs:
        self.calls += 1
        assert isinstance(batch.inputs, torch.Tensor)
        return Outputs(hidden=batch.inputs * 2, head=Head(torch.arange(12.0).reshape(3, 4)))


def batch(first: int) -> Batch:
    index = torch.arange(first, first + 2)
    return Batch(inputs=torch.randn(2, 5, 4, generator=torch.Generator().manual_seed(first)), index=index)


def test_hidden_states_are_kept_and_one_head() -> None:
    teacher: Any = Gathering()
    remembered = Remembered(teacher)
    fresh = [remembered(batch(first)) for first in (0, 2)]
    kept = [remembered(batch(first)) for first in (0, 2)]
    assert teacher.calls == 2
    assert kept[0].head is kept[1].head
    for mine, theirs in zip(kept, fresh, strict=True):
        assert mine.hidden is theirs.hidden
        assert torch.equal(mine.logits, theirs.logits)


def test_what_is_too_large_is_computed_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measured, "_REMEMBERED", batch(0).inputs.nbytes)  # type: ignore[union-attr]
    teacher: Any = Gathering()
    remembered = Remembered(teacher)
    for first in (0, 2, 0, 2):
        assert torch.equal(remembered(batch(first)).logits, Gathering().outputs(batch(first)).logits)
    assert teacher.calls == 3
