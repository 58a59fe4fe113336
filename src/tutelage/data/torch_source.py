"""Any torch dataset as a source whose rows are pure functions of (seed, epoch, row)."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, default_collate

from tutelage.data.images import pixels_of, plain_mode
from tutelage.data.source import DataError, RowSource, digest, tensor_digest
from tutelage.engine.rng import derive_seed
from tutelage.engine.types import Batch, Inputs

_SAMPLED = 16
"""Rows that a fingerprint looks at."""


class TorchSource(RowSource):
    """A map-style dataset that gives ``(inputs, target)`` or a dict.

    Inputs may be tensors, arrays, numbers or PIL images (which become uint8 ``[channels, height, width]``). Python's,
    numpy's and torch's global generators are seeded by (seed, epoch, row) for each row and put back after: random
    transforms give the same row whatever the workers, the order or a resume.

    Args:
        dataset: the rows; a row's id is its position.
        inputs: where rows are dicts, the field with the inputs, or several, which become the model's keywords.
        target: where rows are dicts, the field with the target; None: rows without one. Other fields travel as columns.
        seed: of the rows' random transforms.
        fingerprint: what the rows are; left out: from the class, the length and 16 rows.

    Raises:
        DataError: no rows, rows of another kind, or a field that they do not have.
    """

    names: Mapping[str, Sequence[str]] = {}

    def __init__(
        self,
        dataset: Dataset[Any],
        *,
        inputs: str | Sequence[str] = "inputs",
        target: str | None = "target",
        seed: int = 0,
        fingerprint: str | None = None,
    ) -> None:
        if not hasattr(dataset, "__len__") or not hasattr(dataset, "__getitem__"):
            raise DataError(
                f"{type(dataset).__name__} is no map-style dataset: it needs __len__ and __getitem__"
            )
        if len(dataset) == 0:
            raise DataError(f"{type(dataset).__name__} has no rows")
        self.dataset: Any = dataset
        self.keywords = None if isinstance(inputs, str) else tuple(inputs)
        self.input_fields = (inputs,) if isinstance(inputs, str) else tuple(inputs)
        self.target_field, self.seed = target, seed
        # Shared memory, so that loader processes that outlive an epoch hear of the next one.
        self._epoch: Tensor = torch.zeros(1, dtype=torch.int64)
        self._epoch.share_memory_()  # type: ignore[no-untyped-call]
        first = self.fetch([0])
        self.fields = frozenset(
            {"index", *first.columns} | ({"target"} if first.target is not None else set())
        )
        self.fingerprint = fingerprint or self._sampled_fingerprint()

    @property
    def target(self) -> Tensor | None:
        return None

    @property
    def ids(self) -> Tensor | None:
        return torch.arange(len(self))

    def __len__(self) -> int:
        return len(self.dataset)

    def set_epoch(self, epoch: int) -> None:
        self._epoch.fill_(epoch)

    def fetch(self, positions: Sequence[int]) -> Batch:
        epoch = int(self._epoch)
        state = random.getstate(), np.random.get_state(), torch.get_rng_state()
        try:
            rows = [self._row(position, epoch) for position in positions]
        finally:
            random.setstate(state[0])
            np.random.set_state(state[1])
            torch.set_rng_state(state[2])
        fields = {name: value for name, value in default_collate(rows).items() if isinstance(value, Tensor)}
        return Batch(
            inputs=self._pick_inputs(fields),
            target=fields.pop(self.target_field, None) if self.target_field is not None else None,
            index=torch.as_tensor(positions, dtype=torch.int64),
            columns=fields,
        )

    def _row(self, position: int, epoch: int) -> dict[str, Any]:
        seed = derive_seed(self.seed, "row", epoch, position)
        random.seed(seed)
        np.random.seed(seed % 2**32)
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would reach for accelerators too
        row = self.dataset[position]
        if isinstance(row, tuple | list) and len(row) == 2 and self.keywords is None:
            row = {self.input_fields[0]: row[0]} | ({self.target_field: row[1]} if self.target_field else {})
        if not isinstance(row, Mapping):
            raise DataError(f"row {position} is a {type(row).__name__}; a row is (inputs, target) or a dict")
        return {str(name): _plain(value) for name, value in row.items()}

    def _pick_inputs(self, fields: dict[str, Tensor]) -> Inputs:
        for name in self.input_fields:
            if name not in fields:
                raise DataError(
                    f"rows have no tensor {name!r}; they have {', '.join(fields) or 'none'}: "
                    "name one by TorchSource(inputs=…)"
                )
        picked = {name: fields.pop(name) for name in self.input_fields}
        return picked if self.keywords is not None else picked[self.input_fields[0]]

    def _sampled_fingerprint(self) -> str:
        step = max(1, len(self) // _SAMPLED)
        batch = self.fetch(list(range(0, len(self), step))[:_SAMPLED])
        inputs = batch.inputs if isinstance(batch.inputs, dict) else {"inputs": batch.inputs}
        tensors = {**inputs, **batch.columns} | ({} if batch.target is None else {"target": batch.target})
        seen = {name: tensor_digest(tensor) for name, tensor in tensors.items()}
        return digest([type(self.dataset).__qualname__, len(self), self.seed, seen])


def _plain(value: Any) -> Any:
    """A PIL image as uint8 ``[channels, height, width]``, float64 numbers as float32; anything else as it is."""
    if hasattr(value, "getbands"):
        return torch.from_numpy(pixels_of(value, plain_mode(value)).copy())
    if isinstance(value, np.ndarray | np.generic):
        value = torch.from_numpy(np.asarray(value))
    if isinstance(value, Tensor):
        return value.float() if value.dtype == torch.float64 else value
    return torch.tensor(value, dtype=torch.float32) if isinstance(value, float) else value
