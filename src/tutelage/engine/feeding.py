"""Which rows a Trainer sees: by its method's sampler, shuffled, or as a stream brings them."""

from __future__ import annotations

import torch

from tutelage.engine.loading import Loader, Sampler, ShuffleSampler, Source
from tutelage.engine.method import Method
from tutelage.engine.needs import PairingError
from tutelage.engine.runtime import Runtime
from tutelage.engine.streaming import RowStream, StreamLoader
from tutelage.recipe.schema import TrainConfig


def feed(
    runtime: Runtime,
    method: Method,
    source: Source,
    stream: RowStream | None,
    config: TrainConfig,
    workers: int,
) -> tuple[Sampler, Loader | StreamLoader]:
    """What chooses the rows, and what cuts them into steps.

    Raises:
        PairingError: a method that chooses rows, and a stream.
        ValueError: rows that do not make a step.
    """
    sampler = method.sampler(source, config)
    if stream is None:
        sampler = sampler or ShuffleSampler(len(source), config.seed)
        return sampler, make_loader(runtime, source, sampler, config, workers=workers, device=runtime.device)
    if sampler is not None:
        raise PairingError(
            f"`{method.config.name}` chooses the rows of a step, which a stream gives as they come; set "
            "data.stream=false"
        )
    loader = StreamLoader(
        stream,
        batch_size=config.batch_size,
        accumulate=config.accumulate,
        rank=runtime.rank,
        world=runtime.world,
        seed=config.seed,
    )
    return loader, loader


def make_loader(
    runtime: Runtime,
    source: Source,
    sampler: Sampler,
    config: TrainConfig,
    *,
    workers: int = 0,
    device: torch.device | None = None,
) -> Loader:
    """Steps of a source's rows, cut as the recipe's ``train`` says; ``device`` as `Loader` takes it."""
    return Loader(
        source,
        sampler,
        batch_size=config.batch_size,
        accumulate=config.accumulate,
        rank=runtime.rank,
        world=runtime.world,
        workers=workers,
        seed=config.seed,
        device=device,
    )
