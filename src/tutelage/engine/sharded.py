"""Checkpoints of several ranks: rank 0 writes what all of them hold, and every rank its own shards, by torch's
distributed checkpointing in safetensors. (Its usual metadata file is a pickle; its safetensors writer makes none.)"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard, distribute_tensor

from tutelage.engine.checkpoint import CheckpointFolder, Draft, Snapshot, prepared, unsaved
from tutelage.engine.checkpoint_files import (
    STORABLE,
    CheckpointError,
    FileRecord,
    Manifest,
    Tensors,
    read_json,
    synced,
    write_json,
)
from tutelage.engine.runtime import Runtime

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

T = TypeVar("T")
Shards = dict[str, dict[str, DTensor]]

SHARDS = "sharded"
"""Folder of the ranks' files in a checkpoint."""
LAYOUT = "sharded.json"
"""What lies in them: file stem → name → shape, dtype, and the axis that is cut (null: whole on every rank)."""


def save_together(
    checkpoints: CheckpointFolder, snapshot: Snapshot, runtime: Runtime, *, best: bool = False
) -> None:
    """`CheckpointFolder.save` by all ranks; each calls this with its own snapshot.

    Raises:
        CheckpointError, RankError: on every rank, where any fails; earlier checkpoints are untouched.
    """
    plain, shards = _split(snapshot)
    if not shards:
        runtime.on_main(lambda: str(checkpoints.save(snapshot, best=best)))
        return
    with ExitStack() as held:

        def begin() -> str:
            ready, layout = prepared(plain), _layout(shards)
            draft = held.enter_context(checkpoints.draft(snapshot.step, best=best))
            drafts.append(draft)
            draft.write(ready)
            draft.files |= write_json(draft.path, LAYOUT, layout)
            return str(draft.path)

        def end() -> None:
            for files in written:
                drafts[0].files |= files
            _check_complete(drafts[0])
            held.close()

        drafts: list[Draft] = []
        folder = Path(runtime.on_main(begin)) / SHARDS
        final = checkpoints.folder / f"step-{snapshot.step:08d}"
        try:
            written = _write_shards(folder, shards, runtime)
        except _Failed as error:
            raise unsaved(snapshot.step, final, error) from error
        runtime.on_main(end)


def load_together(
    checkpoints: CheckpointFolder, runtime: Runtime, mesh: DeviceMesh | None
) -> Snapshot | None:
    """The newest whole checkpoint, on every rank; none where nothing was saved. Rank 0 holds the checksums against the
    files before any rank reads one.

    Args:
        mesh: what sharded tensors are spread over; none: they come whole.

    Raises:
        CheckpointError, RankError: see `CheckpointFolder.newest`.
    """
    step = runtime.on_main(checkpoints.newest)
    if step is None:
        return None
    try:
        return _on_every_rank(runtime, lambda: checkpoints.load(step, mesh=mesh, verified=True))
    except _Failed as error:
        raise CheckpointError(str(error)) from error


def mesh_of(tensors: Iterable[Tensor]) -> DeviceMesh | None:
    """The mesh that sharded tensors are spread over; none where no tensor is sharded."""
    return next((tensor.device_mesh for tensor in tensors if isinstance(tensor, DTensor)), None)


def placed_like(value: Tensor, live: Any) -> Tensor:
    """A restored tensor, spread over ranks as the live one is, or whole where that is whole. A collective where either
    is a DTensor."""
    if isinstance(value, DTensor):
        return value if isinstance(live, DTensor) else value.full_tensor()
    if not isinstance(live, DTensor) or value.dim() == 0:
        return value
    placements = live.placements if value.shape == live.shape else [Replicate()]
    return distribute_tensor(value.to(live.device), live.device_mesh, placements, src_data_rank=None)


def read_shards(folder: Path, manifest: Manifest, mesh: DeviceMesh | None) -> Tensors:
    """The sharded tensors of a checkpoint, spread over ``mesh``, or whole. Every rank reads what it needs, however many
    wrote; ranks need not come together for it.

    Raises:
        ValueError: the files are not what the layout says.
    """
    if LAYOUT not in manifest.files:
        return {}
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
    from torch.distributed.checkpoint.state_dict_loader import load

    tensors: Tensors = {
        stem: {name: _empty(entry, mesh) for name, entry in group.items()}
        for stem, group in read_json(folder, LAYOUT).items()
    }
    flat = {_key(stem, name): value for stem, group in tensors.items() for name, value in group.items()}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # it is told not to use it
        try:
            load(flat, storage_reader=HuggingFaceStorageReader(str(folder / SHARDS)), no_dist=True)
        except CheckpointException as error:
            raise ValueError(_told(error)) from error
    return tensors


class _Failed(Exception):
    """What failed on which rank; raised on all of them."""


def _split(snapshot: Snapshot) -> tuple[Snapshot, Shards]:
    """What every rank holds, and what is spread over them."""
    plain: Tensors = {}
    shards: Shards = {}
    for stem, group in snapshot.tensors.items():
        plain[stem] = {name: value for name, value in group.items() if not isinstance(value, DTensor)}
        sharded = {name: value for name, value in group.items() if isinstance(value, DTensor)}
        if sharded:
            shards[stem] = sharded
    return Snapshot(snapshot.step, plain, snapshot.state), shards


def _layout(shards: Shards) -> dict[str, Any]:
    return {
        stem: {name: _described(stem, name, value) for name, value in group.items()}
        for stem, group in shards.items()
    }


def _described(stem: str, name: str, value: DTensor) -> dict[str, Any]:
    dtype = str(value.dtype).removeprefix("torch.")
    placement = value.placements[0]
    simple = len(value.placements) == 1 and type(placement) in (Shard, Replicate)
    if not simple or dtype not in STORABLE:
        raise CheckpointError(
            f"tensor {name!r} of {stem} is {dtype} as {value.placements}; only tensors that are whole or cut along "
            "one axis, of a dtype that safetensors has, can be saved"
        )
    axis = placement.dim if isinstance(placement, Shard) else None
    return {"shape": list(value.shape), "dtype": dtype, "axis": axis}


def _empty(entry: dict[str, Any], mesh: DeviceMesh | None) -> Tensor:
    shape, dtype, axis = entry["shape"], STORABLE[entry["dtype"]], entry["axis"]
    if mesh is None:
        return torch.empty(shape, dtype=dtype)
    from torch.distributed.tensor import empty

    placement: Placement = Replicate() if axis is None else Shard(axis)
    return empty(shape, dtype=dtype, device_mesh=mesh, placements=[placement])


def _write_shards(folder: Path, shards: Shards, runtime: Runtime) -> list[dict[str, FileRecord]]:
    """Write this rank's part; what each rank wrote."""
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
    from torch.distributed.checkpoint.state_dict_saver import save

    writer = HuggingFaceStorageWriter(str(folder), save_distributed=True)
    try:
        save(_flat(shards), storage_writer=writer)
    except CheckpointException as error:
        raise _Failed(_told(error)) from error
    mine = f"shard-{runtime.rank + 1:05d}-*.safetensors"

    def records() -> dict[str, FileRecord]:
        return {f"{SHARDS}/{path.name}": synced(path) for path in folder.glob(mine)}

    return runtime.gather_objects(_on_every_rank(runtime, records))


def _flat(shards: Shards) -> dict[str, Any]:
    """By one key each; parameters that share memory are stored apart, as safetensors wants it."""
    seen: set[int] = set()
    flat: dict[str, Any] = {}
    for stem, group in shards.items():
        for name, value in group.items():
            address = value.to_local().untyped_storage().data_ptr()
            flat[_key(stem, name)] = value.clone() if address and address in seen else value
            seen.add(address)
    return flat


def _key(stem: str, name: str) -> str:
    return f"{stem}/{name}"


def _check_complete(draft: Draft) -> None:
    """What the ranks wrote must be what rank 0 sees."""
    there = {f"{SHARDS}/{path.name}" for path in (draft.path / SHARDS).iterdir()}
    if missing := {name for name in draft.files if name.startswith(f"{SHARDS}/")} ^ there:
        raise OSError(
            f"rank 0 does not see the same files as the ranks that wrote them ({', '.join(sorted(missing))}); "
            "output.dir must lie on storage that all machines share"
        )


def _on_every_rank(runtime: Runtime, make: Callable[[], T]) -> T:
    """What ``make`` gives on this rank; where it fails on one, all fail."""
    value, failure = None, None
    try:
        value = make()
    except Exception as error:
        failure = error
    told = None if failure is None else f"{type(failure).__name__}: {failure}"
    failed = {rank: text for rank, text in enumerate(runtime.gather_objects(told)) if text is not None}
    if runtime.world == 1 and failure is not None:
        raise failure
    if failed:
        raise _Failed("; ".join(f"on rank {rank} {text}" for rank, text in failed.items())) from failure
    return value  # type: ignore[return-value]


def _told(error: Any) -> str:
    """torch's summary of what failed on which rank, without its tracebacks."""
    return "; ".join(
        f"on rank {rank} {type(failure).__name__}: {failure}" for rank, (failure, _) in error.failures.items()
    )
