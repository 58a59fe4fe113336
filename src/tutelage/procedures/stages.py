"""What procedures of several stages share: relabelled and few rows, predictions over a source, models that pass weights
on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from tutelage.engine.loading import Source
from tutelage.engine.types import Batch, Outputs
from tutelage.engine.views import to_float


class Relabelled:
    """A source whose class ids are mapped: id ``c`` becomes ``mapping[c]``."""

    def __init__(self, source: Source, mapping: Tensor) -> None:
        self.source, self.mapping = source, mapping
        self.fields, self.fingerprint = source.fields, source.fingerprint
        self.constant = getattr(source, "constant", False)

    def __len__(self) -> int:
        return len(self.source)

    def fetch(self, positions: Sequence[int]) -> Batch:
        batch = self.source.fetch(positions)
        if batch.target is None or batch.target.is_floating_point():
            raise ValueError("class ids are needed to relabel rows; this data has none")
        return batch.replace(target=self.mapping[batch.target])


class Predictions(NamedTuple):
    """Over a source, in its order: logits ``[rows, classes]`` and targets ``[rows]``, on the CPU."""

    logits: Tensor
    target: Tensor


def predictions(
    predict: Callable[[Batch], Outputs], source: Source, device: torch.device, batch_size: int
) -> Predictions:
    """Logits and targets of every row.

    Raises:
        ValueError: the source has no rows or no labels.
    """
    if len(source) == 0:
        raise ValueError("there are no rows to predict")
    logits, targets = [], []
    for start in range(0, len(source), batch_size):
        batch = to_float(source.fetch(range(start, min(start + batch_size, len(source)))).to(device))
        if batch.target is None:
            raise ValueError("rows without labels cannot be scored")
        logits.append(predict(batch).logits.float().cpu())
        targets.append(batch.target.cpu())
    return Predictions(torch.cat(logits), torch.cat(targets))


def rows_of(targets: Tensor, classes: range) -> list[int]:
    """Positions whose class lies in a range of ids."""
    return ((targets >= classes.start) & (targets < classes.stop)).nonzero().flatten().tolist()


def share_of_each(labels: Tensor, share: float, generator: torch.Generator) -> list[int]:
    """Positions of a random share of every class's rows, at least one of each, ascending: class ids ``labels``
    ``[rows]``, ``share`` in (0, 1]. A larger share keeps the same rows and more."""
    order = torch.randperm(len(labels), generator=generator)
    order = order[labels[order].argsort(stable=True)]  # by class, at random within
    counts = labels.bincount()
    place = torch.arange(len(labels)) - (counts.cumsum(0) - counts)[labels[order]]
    kept = (counts * share).round().clamp(min=1)[labels[order]]
    chosen: list[int] = order[place < kept].sort().values.tolist()
    return chosen


def copy_weights(source: nn.Module, target: nn.Module, *, leave_out: str) -> None:
    """Copy every weight and buffer but those under the path ``leave_out``.

    Raises:
        KeyError: the models differ elsewhere.
    """
    weights = {k: v for k, v in source.state_dict().items() if not k.startswith(leave_out + ".")}
    found = target.load_state_dict(weights, strict=False)
    left = [name for name in found.missing_keys if not name.startswith(leave_out + ".")]
    if left or found.unexpected_keys:
        raise KeyError(f"the models differ in {left + found.unexpected_keys}")
