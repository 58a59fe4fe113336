"""Sums over a vocabulary that lies here whole, or spread over processes."""

from __future__ import annotations

import math

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.distributed import ProcessGroup

__all__: list[str] = []


class Vocabulary:
    """The last axis of logits ``[rows, vocabulary]``. With a process group each rank holds its part of every row, in
    the order of the ranks, and whatever is summed, compared or looked up here is that of the whole row, on every rank.

    Attributes:
        size: entries on this rank.
        total: entries on all ranks.
        offset: id of this rank's first entry.
    """

    def __init__(
        self, size: int, group: ProcessGroup | None = None, device: torch.device | str = "cpu"
    ) -> None:
        self.size, self.total, self.offset, self.group = size, size, 0, group
        self._sizes = [size]
        if group is not None:
            found = torch.zeros(dist.get_world_size(group), dtype=torch.int64, device=device)
            found[dist.get_rank(group)] = size
            self._sizes = self.sum_(found).tolist()
            self.total, self.offset = sum(self._sizes), sum(self._sizes[: dist.get_rank(group)])

    def sum_(self, values: Tensor) -> Tensor:
        """In place, the sum over ranks."""
        if self.group is not None:
            dist.all_reduce(values, group=self.group)
        return values

    def total_of(self, entries: Tensor) -> Tensor:
        """Sum of each row, ``[rows]``."""
        return self.sum_(entries.sum(-1))

    def dot(self, left: Tensor, right: Tensor) -> Tensor:
        """Sum of each row's products, ``[rows]``."""
        return self.sum_(torch.linalg.vecdot(left, right))

    def exponentials_(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """In place, ``exp(logits - largest)`` of each row; with it the sums, and the largest, ``[rows]``. A row of
        nothing but -inf becomes zeros."""
        largest = logits.amax(-1)
        if self.group is not None:
            dist.all_reduce(largest, dist.ReduceOp.MAX, group=self.group)
        largest = largest.masked_fill(largest == -math.inf, 0.0)
        logits.sub_(largest[:, None]).exp_()
        return self.total_of(logits), largest

    def log_softmax_(self, logits: Tensor) -> Tensor:
        """In place, the log-probabilities of each row."""
        if self.group is None:
            return torch.log_softmax(logits, -1, out=logits)
        sums, largest = self.exponentials_(logits.clone())
        return logits.sub_((largest + sums.log())[:, None])

    def look_up(self, entries: Tensor, ids: Tensor) -> Tensor:
        """Entries of each row by id, ``[rows, k]``."""
        places, here = self._places(ids)
        found = entries.gather(-1, places)
        return found if here is None else self.sum_(found.masked_fill(~here, 0.0))

    def add_(self, entries: Tensor, ids: Tensor, values: Tensor) -> None:
        """Add values ``[rows, k]`` to the entries of these ids, in place."""
        places, here = self._places(ids)
        entries.scatter_add_(-1, places, values if here is None else values.masked_fill(~here, 0.0))

    def whole(self, entries: Tensor) -> Tensor:
        """Rows of non-negative entries with those of all ranks, ``[rows, total]`` or longer: zeros fill up."""
        if self.group is None:
            return entries
        padded = F.pad(entries, (0, max(self._sizes) - self.size))
        parts = [torch.empty_like(padded) for _ in self._sizes]
        dist.all_gather(parts, padded, group=self.group)
        return torch.cat(parts, -1)

    def _places(self, ids: Tensor) -> tuple[Tensor, Tensor | None]:
        if self.group is None:
            return ids, None
        places = ids - self.offset
        here = (places >= 0) & (places < self.size)
        return places.masked_fill(~here, 0), here
