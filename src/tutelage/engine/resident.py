"""Training rows kept on the accelerator: decoded and copied once, then gathered there."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from tutelage.engine.transfer import free_memory, send
from tutelage.engine.types import Batch

SHARE = 0.25
"""Of the free memory before the first step, that rows may take; the rest is for what training needs later."""


class Resident:
    """Rows of one source as they pass by on their way to a device, kept there as they are (uint8 images as uint8).

    Ids stay on the host: random views are drawn from them there. Whether all rows fit is known with the first batch;
    where they do not, nothing is kept.

    Args:
        rows: of the source.
        device: where rows are kept.
        free: bytes that are free there.
    """

    def __init__(
        self, rows: int, device: torch.device, free: Callable[[torch.device], int] = free_memory
    ) -> None:
        self.rows, self.device, self.free = rows, device, free
        self.fits: bool | None = None
        """None before the first batch."""
        self._kept = torch.zeros(rows, dtype=torch.bool)
        self._tables: dict[str, Tensor] = {}

    def holds(self, positions: Sequence[int]) -> bool:
        """Whether every one of these rows is here."""
        return bool(self._kept[torch.as_tensor(positions)].all())

    def keep(self, positions: Sequence[int], batch: Batch) -> Batch:
        """Keep the rows of a batch that lies on the host; gives the batch on the device."""
        if self.fits is None:
            self._make_room(batch)
        moved = batch.replace(index=None).to(self.device).replace(index=batch.index)
        if self.fits:
            rows = torch.as_tensor(positions)
            places = send(rows, self.device)
            for name, tensor in _tensors(moved).items():
                self._tables[name].index_copy_(0, rows if name == "index" else places, tensor)
            self._kept[rows] = True
        return moved

    def fetch(self, positions: Sequence[int]) -> Batch:
        """Rows that are all here: a gather on the device, and the ids on the host."""
        rows = torch.as_tensor(positions)
        places = send(rows, self.device)
        found = {
            name: table.index_select(0, rows if name == "index" else places)
            for name, table in self._tables.items()
        }
        inputs, target, index = found.pop("inputs"), found.pop("target", None), found.pop("index", None)
        columns = {name.removeprefix("columns."): tensor for name, tensor in found.items()}
        return Batch(inputs, target, index=index, columns=columns)

    def _make_room(self, batch: Batch) -> None:
        tensors = _tensors(batch)
        needed = sum(tensor[0].nbytes for tensor in tensors.values()) * self.rows
        plain = isinstance(batch.inputs, Tensor) and batch.mask is batch.view is batch.teacher_inputs is None
        self.fits = plain and not batch.views and needed <= SHARE * self.free(self.device)
        if self.fits:
            self._tables = {
                name: torch.empty(
                    (self.rows, *tensor.shape[1:]),
                    dtype=tensor.dtype,
                    device="cpu" if name == "index" else self.device,
                )
                for name, tensor in tensors.items()
            }


def _tensors(batch: Batch) -> dict[str, Tensor]:
    """What a source gives of its rows, by name."""
    found = {"inputs": batch.inputs, "target": batch.target, "index": batch.index}
    found |= {f"columns.{name}": column for name, column in batch.columns.items()}
    return {name: tensor for name, tensor in found.items() if isinstance(tensor, Tensor)}
