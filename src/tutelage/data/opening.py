"""From a recipe's ``data`` to sources."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tutelage.data.digits import Digits
from tutelage.data.imbalance import long_tailed
from tutelage.data.label_noise import WrongLabels
from tutelage.data.origin import Origin, Reading
from tutelage.data.source import DataError, NoisySource, RowSource, digest
from tutelage.data.splits import Rows, choose_rows
from tutelage.data.tables import Tables
from tutelage.engine.loading import Source
from tutelage.engine.types import Batch
from tutelage.engine.views import to_float
from tutelage.recipe.schema import DataConfig

_MEASURED = 2000
_PIXELS = 2**23
"""Values a channel that are looked at for mean and standard deviation: large images would take long to decode."""


@dataclass(frozen=True)
class DataInfo:
    """What models, methods and messages need to know of the data.

    Attributes:
        input_shape: of one row.
        outputs: classes, labels or target columns.
        class_names: in the order of the ids, where they have names.
        mean, std: of training inputs by channel (by column, where rows are numbers), inputs in [0, 1].
        fields: what a batch carries beside its inputs.
    """

    input_shape: tuple[int, ...]
    outputs: int
    class_names: list[str] | None
    mean: tuple[float, ...] | None
    std: tuple[float, ...] | None
    fields: frozenset[str]


@dataclass(frozen=True)
class Data:
    """Sources for training and evaluation. ``origin`` says where the rows come from."""

    train: Source
    validation: Source | None
    test: Source | None
    info: DataInfo
    origin: dict[str, str | None]

    def describe(self) -> dict[str, Any]:
        """Where the rows come from, how many there are, and one fingerprint of all; plain JSON values."""
        parts = {"train": self.train, "validation": self.validation, "test": self.test}
        found = {name: source for name, source in parts.items() if source is not None}
        return {
            **self.origin,
            "rows": {name: len(source) for name, source in found.items()},
            "input_shape": list(self.info.input_shape),
            "outputs": self.info.outputs,
            "fingerprint": digest({name: source.fingerprint for name, source in found.items()}),
        }


def open_data(config: DataConfig, task: str) -> Data:
    """Find the rows that a recipe names, split them and read what has to be in memory.

    Only a name that is no local path asks the hub. Held-out rows never train; which they are depends on ``config.seed``
    and the split alone.

    Raises:
        DataError: anything about the data that cannot be used, named by row, column and split.
    """
    origin: Origin = Digits(config, task) if config.path == "digits" else Tables(config, task)
    chosen = choose_rows(config, origin.sizes).parts()
    reading = origin.read([rows.split for rows in chosen.values()], config.train)
    sources = {part: _source(reading, rows, config) for part, rows in chosen.items()}
    if config.label_noise:
        sources["train"] = _wrong_labels(sources["train"], reading.outputs, chosen["train"], config, task)
    if config.imbalance is not None:
        sources["train"] = long_tailed(sources["train"], config.imbalance, reading.outputs, config.seed)
    return Data(
        train=sources["train"],
        validation=sources.get("validation"),
        test=sources.get("test"),
        info=describe_rows(sources["train"], reading.outputs, reading.class_names),
        origin={"path": config.path, "config": config.config, "revision": config.revision},
    )


def _source(reading: Reading, rows: Rows, config: DataConfig) -> RowSource:
    source = reading.source(rows)
    if config.noise == 0:
        return source
    return NoisySource(source, config.noise, scale=reading.scale, seed=config.seed, split=rows.split)


def _wrong_labels(source: RowSource, classes: int, rows: Rows, config: DataConfig, task: str) -> RowSource:
    if task != "classification":
        raise DataError(f"data.label_noise replaces one class by another; the task is {task}: leave it out")
    return WrongLabels(
        source,
        config.label_noise,
        classes,
        among=config.label_noise_classes,
        seed=config.seed,
        split=rows.split,
    )


def describe_rows(source: Source, outputs: int, class_names: tuple[str, ...] | None = None) -> DataInfo:
    """Shape, mean and standard deviation of rows: of at most 2000, evenly spread, fewer where images are large.

    Raises:
        DataError: inputs that are not finite.
    """
    first = source.fetch([0])
    if isinstance(first.inputs, dict):
        return DataInfo((), outputs, _listed(class_names), None, None, source.fields)
    shape = tuple(first.inputs.shape[1:])
    wanted = max(128, min(_MEASURED, _PIXELS // max(1, first.inputs[0, 0].numel())))
    positions = torch.linspace(0, len(source) - 1, min(wanted, len(source))).round().long().tolist()
    mean, std = _moments(source, positions)
    return DataInfo(shape, outputs, _listed(class_names), mean, std, source.fields)


def _moments(source: Source, positions: list[int]) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation by channel; 1 in place of a deviation of 0."""
    sums: list[Tensor] = []
    count = 0
    for start in range(0, len(positions), 128):
        values = _by_channel(to_float(source.fetch(positions[start : start + 128])))
        count += values.shape[1]
        sums.append(torch.stack([values.sum(1), values.square().sum(1)]))
    mean, square = torch.stack(sums).sum(0) / count
    if not bool(torch.isfinite(square).all()):
        raise DataError("training inputs hold NaN or an infinity; allowed: finite numbers")
    std = (square - mean.square()).clamp(min=0).sqrt()
    std = torch.where(std <= 1e-6 * mean.abs(), 1.0, std)
    return tuple(mean.tolist()), tuple(std.tolist())


def _by_channel(batch: Batch) -> Tensor:
    assert isinstance(batch.inputs, Tensor)
    inputs = batch.inputs.double()
    return (
        inputs.reshape(len(inputs), inputs.shape[1] if inputs.dim() > 1 else 1, -1).transpose(0, 1).flatten(1)
    )


def _listed(names: tuple[str, ...] | None) -> list[str] | None:
    return None if names is None else list(names)
