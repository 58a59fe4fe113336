"""CRD's memories: one embedding of each model a training row, and which rows a row is told from."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from tutelage.functional.contrastive import moved_rows


class RowMemory(nn.Module):
    """Embeddings of all training rows by both models. Everything is a buffer, so that it is checkpointed.

    How many rows there are is known only once the data or a checkpoint is: until then it is empty.

    Attributes:
        ids: the rows' ids, ascending, ``[rows]``; a row's place among them is its place in the memories.
        classes: class of each row, ``[rows]``.
        student, teacher: ``[rows, width]``.
        z_student, z_teacher: the normalisers; 0 before the first batch.
    """

    ids: Tensor
    classes: Tensor
    student: Tensor
    teacher: Tensor
    z_student: Tensor
    z_teacher: Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width
        for name in ("ids", "classes"):
            self.register_buffer(name, torch.empty(0, dtype=torch.int64))
        for name in ("student", "teacher"):
            self.register_buffer(name, torch.empty(0, width))
        for name in ("z_student", "z_teacher"):
            self.register_buffer(name, torch.zeros(()))
        self._negatives: int | None = None
        self.register_load_state_dict_pre_hook(_make_room)  # type: ignore[no-untyped-call]

    def __len__(self) -> int:
        return len(self.ids)

    def fill(self, ids: Tensor, classes: Tensor) -> None:
        """Start anew with these rows, each once, embeddings drawn uniformly from ``±1/√(width/3)``."""
        device = self.ids.device
        self.ids, place = torch.unique(ids.to(device), return_inverse=True)
        self.classes = torch.empty_like(self.ids).scatter_(0, place, classes.to(device))
        bound = 1 / math.sqrt(self.width / 3)
        for name in ("student", "teacher"):
            # Drawn on the CPU: the same on every device and every rank.
            setattr(self, name, torch.empty(len(self), self.width).uniform_(-bound, bound).to(device))
        for z in (self.z_student, self.z_teacher):
            z.zero_()
        self._negatives = None

    def negatives(self) -> int:
        """How many rows of other classes every row has at least."""
        if self._negatives is None:
            self._negatives = len(self) - int(torch.unique(self.classes, return_counts=True)[1].max())
        return self._negatives

    def places(self, index: Tensor) -> Tensor:
        """Where rows of these ids are in the memories.

        Raises:
            ValueError: an id that is none of the training rows' (looked at on the CPU only).
        """
        places = torch.searchsorted(self.ids, index).clamp(max=len(self) - 1)
        if index.device.type == "cpu" and not torch.equal(self.ids[places], index):
            stray = index[self.ids[places] != index][0]
            raise ValueError(f"crd: row {int(stray)} is none of the {len(self)} training rows it remembers")
        return places

    def draw(self, places: Tensor, keys: Tensor, negatives: int, *, relax: bool) -> Tensor:
        """Which rows each row is told from: ``[batch, 1 + negatives]``, the positive first.

        Negatives are rows of other classes, without replacement, those of each row drawn on their own. The positive is
        the row itself, or with ``relax`` any row of its class.

        Args:
            keys: uniform numbers ``[batch, rows]``, from which the draw follows; overwritten.
        """
        same = self.classes[places, None] == self.classes
        positive = keys.masked_fill(~same, torch.inf).argmin(1) if relax else places
        others = keys.masked_fill_(same, torch.inf).topk(negatives, largest=False, sorted=False).indices
        return torch.cat([positive[:, None], others], dim=1)

    @torch.no_grad()
    def update(self, places: Tensor, student: Tensor, teacher: Tensor, momentum: float) -> None:
        """Move these rows' memories towards their embeddings."""
        for memory, embedding in ((self.student, student), (self.teacher, teacher)):
            memory.index_copy_(0, places, moved_rows(memory, places, embedding, momentum))


def _make_room(memory: RowMemory, state: Mapping[str, Any], prefix: str, *rest: Any) -> None:
    for name, buffer in memory.named_buffers():
        if prefix + name in state:
            setattr(memory, name, buffer.new_empty(state[prefix + name].shape))
    memory._negatives = None
