"""What tests share: small rows, a small net, and a pair of gloo processes that serves every two-process test."""

from __future__ import annotations

import importlib
import os
import queue
import socket
import traceback
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.multiprocessing as mp
from torch import Tensor, nn

from tutelage.engine.loading import Source
from tutelage.engine.needs import Offers
from tutelage.engine.types import Batch, Outputs
from tutelage.recipe.schema import OptimizerConfig, ScheduleConfig, TrainConfig
from tutelage.teachers.store import MissingRowsError


class Rows:
    """A source over tensors in memory."""

    def __init__(self, inputs: Tensor, target: Tensor, mask: Tensor | None = None, **columns: Tensor) -> None:
        self.inputs, self.target, self.mask, self.columns = inputs, target, mask, columns
        self.fields = frozenset({"target", "index", *columns})
        self.fingerprint = "rows"

    def __len__(self) -> int:
        return len(self.inputs)

    def fetch(self, positions: Sequence[int]) -> Batch:
        rows = torch.as_tensor(list(positions))
        columns = {name: value[rows] for name, value in self.columns.items()}
        mask = None if self.mask is None else self.mask[rows]
        return Batch(self.inputs[rows], self.target[rows], index=rows, mask=mask, columns=columns)


class Sentences(Rows):
    """Rows of token ids in memory, as a language model gets them."""

    def fetch(self, positions: Sequence[int]) -> Batch:
        batch = super().fetch(positions)
        ids: Any = batch.inputs
        places = torch.arange(ids.shape[1]).expand_as(ids)
        return batch.replace(inputs={"input_ids": ids, "position_ids": places})


def rows(count: int = 32, width: int = 6, classes: int = 4, seed: int = 0) -> Rows:
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(count, width, generator=generator)
    return Rows(inputs, torch.randint(classes, (count,), generator=generator))


def fetched(source: Source, positions: Sequence[int]) -> dict[str, Tensor]:
    """Everything that a batch of keyword inputs holds, by name: inputs, target, index, mask and columns."""
    batch = source.fetch(positions)
    assert isinstance(batch.inputs, dict)
    fields = {"target": batch.target, "index": batch.index, "mask": batch.mask}
    return {
        **batch.inputs,
        **batch.columns,
        **{name: value for name, value in fields.items() if value is not None},
    }


def pictures(count: int = 32, classes: int = 5, mask: Tensor | None = None) -> Rows:
    """One-channel images of 8 x 8, and their classes."""
    generator = torch.Generator().manual_seed(3)
    inputs = torch.rand(count, 1, 8, 8, generator=generator)
    return Rows(inputs, torch.arange(count) % classes, mask)


def sentences(count: int = 32, tokens: int = 11, length: int = 6, mask: Tensor | None = None) -> Sentences:
    """Random tokens of two sources; two to five of a row count, or none where ``mask [rows]`` leaves the row out."""
    ids = torch.randint(tokens, (count, length + 1), generator=torch.Generator().manual_seed(3))
    counted = torch.arange(length) < 2 + torch.arange(count)[:, None] % 4
    counted &= torch.ones(count, dtype=torch.bool)[:, None] if mask is None else mask[:, None]
    target = torch.where(counted, ids[:, 1:], -100)
    return Sentences(ids[:, :-1], target, counted, source=torch.arange(count) % 2)


def conv_net(*widths: int, classes: int = 5, seed: int = 0) -> nn.Module:
    """Stages of convolution, GroupNorm and ReLU, each half the size of the one before; pooled; a linear head. A row's
    logits depend on no other row and not on chance."""
    parts: OrderedDict[str, nn.Module] = OrderedDict()
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        for number, (narrow, wide) in enumerate(zip((1, *widths), widths, strict=False), start=1):
            convolution = nn.Conv2d(narrow, wide, 3, stride=1 if number == 1 else 2, padding=1)
            parts[f"layer{number}"] = nn.Sequential(convolution, nn.GroupNorm(2, wide), nn.ReLU())
        parts |= OrderedDict(pool=nn.AdaptiveAvgPool2d(1), flatten=nn.Flatten())
        parts["head"] = nn.Linear(widths[-1], classes)
    return nn.Sequential(parts)


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.up, self.act, self.down = nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(self.act(self.up(x)))


class Net(nn.Module):
    """Stem, blocks, head; no BatchNorm and no dropout unless asked for."""

    def __init__(
        self, width: int = 8, blocks: int = 2, classes: int = 4, dropout: float = 0.0, seed: int = 0
    ) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.stem = nn.Linear(6, width)
            self.blocks = nn.Sequential(*[Block(width) for _ in range(blocks)])
            self.drop = nn.Dropout(dropout)
            self.head = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.drop(self.blocks(self.stem(x))))


def llama(width: int, layers: int = 1, tokens: int = 11, seed: int = 0) -> nn.Module:
    """A small causal transformer, in the default type."""
    from tutelage.models import build_model
    from tutelage.recipe.schema import ModelConfig

    sizes = {"hidden_size": width, "intermediate_size": 2 * width, "num_hidden_layers": layers}
    config = ModelConfig(model="config:llama", options=sizes | {"num_attention_heads": 2})
    built = build_model(config, outputs=tokens, input_shape=(8,), seed=seed, task="language-model")
    return built.module.to(torch.get_default_dtype())


def train_config(**changes: Any) -> TrainConfig:
    values: dict[str, Any] = {
        "steps": 4,
        "batch_size": 8,
        "optimizer": OptimizerConfig(name="sgd", lr=0.1),
        "schedule": ScheduleConfig(name="constant"),
        "device": "cpu",
    }
    values |= changes
    if values.get("epochs"):
        values.pop("steps")
    return TrainConfig(**values)


class KeptRows:
    """What `StoredTeacher` asks of a store, in memory: a teacher's answers to the rows of one batch, as view 0."""

    def __init__(self, teacher: Any, batch: Batch, taps: tuple[str, ...] = ()) -> None:
        self.spec, self.index = teacher.spec, batch.index
        self.offers = Offers(live=False, input_gradient=False, trainable=False, taps=bool(taps))
        self.outputs = teacher.outputs(batch, taps)

    def read(
        self, index: Tensor, view: Tensor, taps: tuple[str, ...] = (), *, logits: bool = True
    ) -> Outputs:
        assert self.index is not None
        found = index[:, None] == self.index
        missing = ~found.any(1) | (view != 0)
        if missing.any():
            raise MissingRowsError(f"{int(missing.sum())} rows were never stored")
        places = found.int().argmax(1)
        features = {tap: self.outputs.features[tap][places] for tap in taps}
        return Outputs(self.outputs.logits[places] if logits else None, features=features)


class Losses:
    """A callback that keeps every step's terms, whole and over all ranks."""

    def __init__(self) -> None:
        self.steps: list[dict[str, float]] = []

    def on_step_end(self, trainer: Any) -> None:
        from tutelage.engine.metrics import step_record

        record = trainer.record or step_record(trainer, *trainer.last)
        self.steps.append(record["terms"])


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def _serve(rank: int, port: int, jobs: Any, results: Any) -> None:
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": "2",
        "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
    }
    torch.set_num_threads(1)
    while True:
        job = jobs.get()
        if job is None:
            return
        module, name, args = job
        try:
            results.put((rank, getattr(importlib.import_module(module), name)(*args), None))
        except BaseException:  # the parent raises it again, with this traceback
            results.put((rank, None, traceback.format_exc()))


class Pair:
    """Two processes under gloo. ``run(function, *args)`` runs a module-level function in both."""

    def __init__(self) -> None:
        context = mp.get_context("spawn")
        self.results = context.Queue()
        self.jobs = [context.Queue() for _ in range(2)]
        port = free_port()
        self.processes = [
            context.Process(target=_serve, args=(rank, port, self.jobs[rank], self.results), daemon=True)
            for rank in range(2)
        ]
        for process in self.processes:
            process.start()

    def run(self, function: Callable[..., Any], *args: Any, timeout: float = 120) -> list[Any]:
        """What the function gave in rank 0 and in rank 1."""
        for jobs in self.jobs:
            jobs.put((function.__module__, function.__name__, args))
        found: dict[int, Any] = {}
        errors = []
        for _ in range(2):
            try:
                rank, value, error = self.results.get(timeout=timeout)
            except queue.Empty:
                raise AssertionError(f"a rank did not answer; had {sorted(found)}, errors {errors}") from None
            found[rank] = value
            errors += [f"rank {rank}:\n{error}"] if error else []
        assert not errors, "\n".join(errors)
        return [found[0], found[1]]

    def close(self) -> None:
        for jobs in self.jobs:
            jobs.put(None)
        for process in self.processes:
            process.join(timeout=10)
            if process.is_alive():
                process.kill()
