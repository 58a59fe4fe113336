"""Rows kept on the device: the same batches, decoded once. The device here is the CPU, told to keep them."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn

from support import rows, train_config
from tutelage.data import NoisySource, TensorSource, TorchSource, subset
from tutelage.engine.loading import Loader, ShuffleSampler, Source
from tutelage.engine.loop import Trainer
from tutelage.engine.resident import SHARE, Resident
from tutelage.engine.runtime import Runtime
from tutelage.engine.transfer import free_memory, send
from tutelage.engine.types import Batch
from tutelage.engine.views import Views
from tutelage.methods.baselines.method import PlainTraining, PlainTrainingConfig
from tutelage.procedures.stages import Relabelled
from tutelage.recipe.schema import ViewConfig
from tutelage.tasks import build_task

ROWS, CPU = 22, torch.device("cpu")


class Counting(TensorSource):
    """Remembers which rows were fetched."""

    fetched: list[int]

    def fetch(self, positions: Sequence[int]) -> Batch:
        self.fetched = [*getattr(self, "fetched", []), *positions]
        return super().fetch(positions)


def images() -> Counting:
    generator = torch.Generator().manual_seed(0)
    return Counting(
        torch.randint(256, (ROWS, 3, 4, 4), generator=generator, dtype=torch.uint8),
        torch.randint(4, (ROWS,), generator=generator),
        index=torch.randperm(1000, generator=generator)[:ROWS],
        columns={"age": torch.rand(ROWS, generator=generator)},
    )


def loader(source: Source, *, keep: bool, workers: int = 0, free: int = 2**30) -> Loader:
    made = Loader(
        source, ShuffleSampler(len(source), 3), batch_size=8, accumulate=2, workers=workers, device=CPU
    )
    assert made.resident is None, "on the CPU rows are where they are needed"
    if keep:
        made.resident = Resident(len(source), CPU, lambda device: free)
    return made


def epochs(made: Loader, count: int = 5) -> list[Batch]:
    steps = itertools.islice(made.steps(1), count * made.steps_per_epoch)
    return list(itertools.chain.from_iterable(steps))


def assert_same(found: list[Batch], wanted: list[Batch]) -> None:
    for mine, other in zip(found, wanted, strict=True):
        assert mine.columns.keys() == other.columns.keys()
        for name in ("inputs", "target", "index"):
            left, right = getattr(mine, name), getattr(other, name)
            assert left.dtype == right.dtype
            assert torch.equal(left, right), name
        assert all(torch.equal(mine.columns[name], column) for name, column in other.columns.items())


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_are_bit_equal(workers: int) -> None:
    kept = loader(images(), keep=True, workers=workers)
    assert_same(epochs(kept), epochs(loader(images(), keep=False)))
    assert kept.resident is not None
    assert kept.resident.holds(range(ROWS))


def test_every_row_is_decoded_until_it_is_there_and_never_again() -> None:
    source = images()
    kept = loader(source, keep=True)
    epochs(kept, 12)
    seen = len(source.fetched)
    epochs(kept, 3)
    assert len(source.fetched) == seen


@pytest.mark.parametrize(("spare", "fits"), [(0, True), (-1, False)])
def test_rows_take_a_bounded_share_of_the_memory(spare: int, fits: bool) -> None:
    row = 3 * 4 * 4 + 8 + 8 + 4  # pixels, target, id, column
    source = images()
    kept = loader(source, keep=True, free=int(row * ROWS / SHARE) + spare)
    assert_same(epochs(kept), epochs(loader(images(), keep=False)))
    assert kept.resident is not None
    assert kept.resident.fits is fits
    assert kept.resident.holds([0]) is fits


def test_ids_stay_on_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    """Views are drawn from them there."""
    moved: list[torch.dtype] = []

    def to(batch: Batch, device: torch.device) -> Batch:
        moved.extend(tensor.dtype for tensor in (batch.inputs, batch.index) if isinstance(tensor, Tensor))
        return batch

    monkeypatch.setattr(Batch, "to", to)
    source = images()
    batch = source.fetch([1, 2])
    found = Resident(ROWS, CPU, lambda device: 2**30).keep([1, 2], batch)
    assert moved == [torch.uint8]
    assert found.index is batch.index


def test_only_rows_that_never_change_are_kept() -> None:
    source = images()
    dataset = TorchSource([(torch.rand(2), 0)] * 3)  # type: ignore[arg-type]
    assert source.constant
    assert subset(source, [1, 2]).constant
    assert NoisySource(source, 0.1, scale=torch.ones(()), seed=0, split="train").constant
    assert Relabelled(source, torch.arange(4)).constant
    assert not dataset.constant
    assert not subset(dataset, [1]).constant


def test_batches_of_named_tensors_are_passed_on() -> None:
    resident = Resident(4, CPU, lambda device: 2**30)
    batch = Batch({"ids": torch.arange(4)}, index=torch.arange(4))
    assert resident.keep(range(4), batch).inputs == batch.inputs
    assert resident.fits is False


def test_a_run_is_the_same_with_its_rows_on_the_device() -> None:
    def losses(keep: bool) -> list[float]:
        source = images()
        trainer = Trainer(
            Runtime("cpu"),
            nn.Sequential(nn.Flatten(), nn.Linear(48, 4, bias=False)).requires_grad_(True),
            PlainTraining(PlainTrainingConfig(name="none")),
            build_task("classification", outputs=4),
            source,
            train_config(steps=12),
            views=Views([ViewConfig(name="crop", padding=1), ViewConfig(name="noise")], 0),
        )
        trainer.student.load_state_dict(
            {"model.1.weight": torch.linspace(-1, 1, 192).view(4, 48)}, strict=False
        )
        trainer.loader.resident = Resident(len(source), CPU, lambda device: 2**30) if keep else None
        found = []
        for _ in range(12):
            trainer.run(1)
            found += [float(value) for value in trainer.last[0].values()]
        return found

    assert losses(keep=True) == losses(keep=False)


def test_a_tensor_that_lies_there_is_not_copied() -> None:
    tensor = rows(4).inputs
    assert send(tensor, "cpu") is tensor
    assert free_memory(CPU) == 0


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_on_a_gpu_rows_stay_there_and_batches_are_bit_equal() -> None:
    source, device = images(), torch.device("cuda")
    kept = Loader(source, ShuffleSampler(ROWS, 3), batch_size=8, accumulate=2, device=device)
    found = epochs(kept)
    assert kept.resident is not None
    assert kept.resident.fits
    assert all(batch.inputs.device.type == "cuda" for batch in found if isinstance(batch.inputs, Tensor))
    assert all(batch.index is not None and batch.index.device.type == "cpu" for batch in found)
    assert_same([batch.to("cpu") for batch in found], epochs(loader(images(), keep=False)))
