"""From a recipe's ``data`` to sources."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tutelage.data.corpus import ReadCorpus, limited
from tutelage.data.digits import Digits
from tutelage.data.encoded import ReadEncoded, ReadTagged
from tutelage.data.imbalance import long_tailed
from tutelage.data.label_noise import WrongLabels
from tutelage.data.markov import Markov
from tutelage.data.origin import Origin, Reading
from tutelage.data.source import DataError, NoisySource, RowSource, digest
from tutelage.data.splits import Rows, choose_rows
from tutelage.data.streams import StreamedCorpus, TokenStream
from tutelage.data.tables import Tables
from tutelage.data.texts import check_text, text_columns
from tutelage.data.tokenizer import OwnTokenizer, Tokenizer
from tutelage.data.tokens import TokenSource
from tutelage.engine.loading import Source
from tutelage.engine.types import Batch
from tutelage.engine.views import to_float
from tutelage.recipe.schema import DataConfig

_ORIGINS: dict[str, type[Digits | Markov | Tables]] = {"digits": Digits, "markov": Markov}
"""What is made on the spot, by its path."""
_MEASURED = 2000
_PIXELS = 2**23
"""Values a channel that are looked at for mean and standard deviation: large images would take long to decode."""


@dataclass(frozen=True)
class DataInfo:
    """What models, methods and messages need to know of the data.

    Attributes:
        input_shape: of one row; of packed tokens their number; empty where rows have unequal lengths.
        outputs: classes, labels, target columns or tokens of the vocabulary.
        class_names: in the order of the ids, where they have names.
        mean, std: of training inputs by channel (by column, where rows are numbers), inputs in [0, 1].
        fields: what a batch carries beside its inputs.
        tokenizer: that made the inputs, where rows are text.
    """

    input_shape: tuple[int, ...]
    outputs: int
    class_names: list[str] | None
    mean: tuple[float, ...] | None
    std: tuple[float, ...] | None
    fields: frozenset[str]
    tokenizer: Tokenizer | None = None


@dataclass(frozen=True)
class Data:
    """Sources for training and evaluation. ``origin`` says where the rows come from. Where there is a ``stream``, it is
    what is trained on, and ``train`` holds the rows of its first window: an example of them."""

    train: Source
    validation: Source | None
    test: Source | None
    info: DataInfo
    origin: dict[str, str | None]
    stream: TokenStream | None = None

    def describe(self) -> dict[str, Any]:
        """Where the rows come from, how many there are (of a stream, in an epoch), and one fingerprint of all; plain
        JSON values. Of a stream, tokens are those of the first window."""
        parts = {"train": self.train, "validation": self.validation, "test": self.test}
        found = {name: source for name, source in parts.items() if source is not None}
        rows, marked = {name: len(source) for name, source in found.items()}, dict[str, Any](found)
        if self.stream is not None:
            rows["train"], marked["train"] = self.stream.epoch_rows, self.stream
        return {
            **self.origin,
            "rows": rows,
            **_describe_tokens(found, self.info.tokenizer),
            "input_shape": list(self.info.input_shape),
            "outputs": self.info.outputs,
            "fingerprint": digest({name: source.fingerprint for name, source in marked.items()}),
        }


def open_data(config: DataConfig, task: str, tokenizer: OwnTokenizer | None = None) -> Data:
    """Find the rows that a recipe names, split them and read what has to be in memory.

    Only a name that is no local path asks the hub. Held-out rows never train; which they are depends on ``config.seed``
    and the split alone. For language models documents are held out, and limits count the rows that they are packed in.

    Args:
        tokenizer: the student's own, for text of which the recipe names none.

    Raises:
        DataError: anything about the data that cannot be used, named by row, column and split.
    """
    if config.path != "markov":
        check_text(config, task)
    where = {"path": config.path, "config": config.config, "revision": config.revision}
    if config.stream and config.path not in _ORIGINS:
        return _open_stream(config, tokenizer, where)
    origin: Origin = _ORIGINS.get(config.path, Tables)(config, task)
    chosen = choose_rows(_of_documents(config, task), origin.sizes).parts()
    reading = _read(origin, chosen, config, task, tokenizer)
    sources = {part: _source(reading, rows, part, config) for part, rows in chosen.items()}
    if config.label_noise:
        sources["train"] = _wrong_labels(sources["train"], reading.outputs, chosen["train"], config, task)
    if config.imbalance is not None:
        sources["train"] = long_tailed(sources["train"], config.imbalance, reading.outputs, config.seed)
    return Data(
        train=sources["train"],
        validation=sources.get("validation"),
        test=sources.get("test"),
        info=describe_rows(sources["train"], reading.outputs, reading.class_names, reading.tokenizer),
        origin=where,
    )


def _open_stream(config: DataConfig, tokenizer: OwnTokenizer | None, where: dict[str, str | None]) -> Data:
    corpus = StreamedCorpus(config, tokenizer)
    first = next(corpus.train.windows()).source
    return Data(
        train=first,
        validation=corpus.source("validation"),
        test=corpus.source("test"),
        info=describe_rows(first, corpus.tokenizer.size, tokenizer=corpus.tokenizer),
        origin=where,
        stream=corpus.train,
    )


def _of_documents(config: DataConfig, task: str) -> DataConfig:
    """The settings by which documents are split: packed rows are limited later."""
    if task != "language-model":
        return config
    return config.model_copy(update={"limit": None, "evaluation_limit": None})


def _read(
    origin: Origin, chosen: dict[str, Rows], config: DataConfig, task: str, tokenizer: OwnTokenizer | None
) -> Reading:
    if not text_columns(config):
        return origin.read([rows.split for rows in chosen.values()], config.train)
    assert isinstance(origin, Tables)
    readers: dict[str, type[ReadCorpus | ReadTagged]] = {
        "language-model": ReadCorpus,
        "token-classification": ReadTagged,
    }
    return readers.get(task, ReadEncoded)(origin, chosen, tokenizer)


def _source(reading: Reading, rows: Rows, part: str, config: DataConfig) -> RowSource:
    source = reading.source(rows)
    if isinstance(source, TokenSource):
        return limited(source, part, rows.split, config)
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


def describe_rows(
    source: Source,
    outputs: int,
    class_names: tuple[str, ...] | None = None,
    tokenizer: Tokenizer | None = None,
) -> DataInfo:
    """Shape, mean and standard deviation of rows: of at most 2000, evenly spread, fewer where images are large.

    Raises:
        DataError: inputs that are not finite.
    """
    first = source.fetch([0])
    if isinstance(first.inputs, dict):
        length = (source.layout.max_length,) if isinstance(source, TokenSource) else ()
        return DataInfo(length, outputs, _listed(class_names), None, None, source.fields, tokenizer)
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


def _describe_tokens(sources: Mapping[str, Source], tokenizer: Tokenizer | None) -> dict[str, Any]:
    """Tokens of each part, how full its rows are, what was cut off, and which tokeniser it was."""
    packed = {name: source for name, source in sources.items() if isinstance(source, TokenSource)}
    found: dict[str, Any] = {} if tokenizer is None else {"tokenizer": tokenizer.fingerprint}
    if packed:
        found["tokens"] = {name: source.tokens for name, source in packed.items()}
        found["fill"] = {name: round(source.fill, 4) for name, source in packed.items()}
        found["lost_tokens"] = {name: source.lost for name, source in packed.items()}
    return found
