"""What becomes of the ratios over a run: a ratio that collapses to 0 or 1 has stopped saying anything."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from tutelage.engine.types import Plot, Table

COLUMNS = [
    "epoch",
    "mean_ratio",
    "least_ratio",
    "largest_ratio",
    "entropy",
    "ratio_where_teacher_right",
    "ratio_where_teacher_wrong",
]
Gather = Callable[[Tensor], Tensor]


class RatioRecord(nn.Module):
    """Sums over an epoch of the ratios that the student was trained with, and a row of figures for each epoch.

    A step's own sums wait in ``pending`` until all ranks' are taken together, so a checkpoint holds the whole of them.
    """

    pending: Tensor
    pending_ends: Tensor
    sums: Tensor
    ends: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[list[float | None]] = []
        for name in ("pending", "sums"):
            self.register_buffer(name, torch.zeros(5))
        for name in ("pending_ends", "ends"):
            self.register_buffer(name, torch.ones(2))

    @torch.no_grad()
    def add(self, ratio: Tensor, right: Tensor) -> None:
        """Take up a micro-batch: ratios ``[rows]``, and whether the teacher is right ``[rows]``."""
        ratio, right = ratio.detach().float(), right.float()
        entropy = torch.special.entr(ratio) + torch.special.entr(1 - ratio)
        parts = [torch.ones_like(ratio), ratio, entropy, right, right * ratio]
        self.pending += torch.stack(parts).sum(1)
        if len(ratio):
            self.pending_ends.copy_(
                torch.minimum(self.pending_ends, torch.stack([ratio.min(), 1 - ratio.max()]))
            )

    def take(self, gather: Gather) -> None:
        """After a step: add what all ranks have pending."""
        self.sums += gather(self.pending[None]).sum(0)
        self.ends.copy_(torch.minimum(self.ends, gather(self.pending_ends[None]).amin(0)))
        self.pending.zero_()
        self.pending_ends.fill_(1)

    def close(self, epoch: int) -> None:
        """End an epoch: its figures become a row."""
        count, ratio, entropy, right, ratio_right = self.sums.tolist()
        least, above = self.ends.tolist()
        self.sums.zero_()
        self.ends.fill_(1)
        if count:
            self.rows.append([
                epoch, ratio / count, least, 1 - above, entropy / count,
                ratio_right / right if right else None,
                (ratio - ratio_right) / (count - right) if count > right else None,
            ])  # fmt: skip

    def table(self) -> Table:
        by_teacher = tuple(name for name in COLUMNS if name.startswith("ratio_where"))
        drawn = (Plot("epoch", tuple(COLUMNS[1:4])), Plot("epoch", ("entropy",)), Plot("epoch", by_teacher))
        return Table(COLUMNS, self.rows, drawn)

    def get_extra_state(self) -> Any:
        return {"rows": self.rows}

    def set_extra_state(self, state: Any) -> None:
        self.rows = state["rows"]
