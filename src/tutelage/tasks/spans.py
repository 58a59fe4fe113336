"""Entities that tags of single tokens spell: O outside, B-KIND at the first token of one, I-KIND inside."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

_TAG = re.compile(r"[BI]-(.+)|O")


class _Read(NamedTuple):
    """Of each token ``[rows, tokens]``: its entity's kind (0: none), whether one starts there, and the place behind the
    one that starts there."""

    kind: Tensor
    starts: Tensor
    end: Tensor


class SpanTags:
    """Which entities a row's tags spell, as conlleval reads them (Tjong Kim Sang and De Meulder 2003): one starts at
    B-KIND, and at I-KIND behind a token of another kind or of none; it goes on over I-KIND of its own kind.

    Args:
        kinds: by class id; none: outside.
        begins: by class id: whether it is a B.
    """

    def __init__(self, kinds: Sequence[str | None], begins: Sequence[bool]) -> None:
        names = sorted({kind for kind in kinds if kind is not None})
        self.kinds = torch.tensor([0 if kind is None else 1 + names.index(kind) for kind in kinds])
        self.begins = torch.tensor(begins)

    @classmethod
    def of(cls, class_names: Sequence[str]) -> SpanTags | None:
        """None where a class name is no such tag, or all are O."""
        found = [_TAG.fullmatch(name) for name in class_names]
        if any(match is None for match in found) or not any(match and match[1] for match in found):
            return None
        return cls(
            [match[1] if match else None for match in found], [name.startswith("B-") for name in class_names]
        )

    def counts(self, answer: Tensor, target: Tensor, counted: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Entities of each row, ``[rows]`` each: those of the answer that are the target's, with the same first and
        last token and kind; all of the answer; all of the target. Tokens that do not count are passed over.

        Args:
            answer, target: class ids ``[rows, tokens]``; any where a token does not count.
            counted: bool ``[rows, tokens]``.
        """
        ours, theirs = self._read(answer, counted), self._read(target, counted)
        same = ours.starts & theirs.starts & (ours.kind == theirs.kind) & (ours.end == theirs.end)
        return same.sum(1), ours.starts.sum(1), theirs.starts.sum(1)

    def _read(self, tags: Tensor, counted: Tensor) -> _Read:
        tags = torch.where(counted, tags, 0)
        kind, begins = self.kinds.to(tags.device)[tags], self.begins.to(tags.device)[tags]
        places = torch.arange(tags.shape[1], device=tags.device).expand_as(tags)
        # The last token that counts before each; -1 where there is none.
        last = torch.where(counted, places, -1).cummax(1).values.roll(1, 1)
        last[:, :1] = -1
        before = torch.where(last >= 0, kind.gather(1, last.clamp(min=0)), 0)
        starts = counted & (kind > 0) & (begins | (before != kind))
        stops = counted & (starts | (kind == 0))
        # The nearest stop behind each token; the row's length where there is none.
        nearest = torch.where(stops, places, tags.shape[1]).flip(1).cummin(1).values.flip(1)
        end = torch.nn.functional.pad(nearest[:, 1:], (0, 1), value=tags.shape[1])
        return _Read(kind, starts, end)
