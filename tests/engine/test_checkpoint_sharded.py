"""Checkpoints of sharded (FSDP2) runs on two gloo processes: kills, damage, other launches; and the plain student."""

from __future__ import annotations

import contextlib
import errno
import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from contract import tasks_of
from ranks import make
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from training import make_trainer

from killing import KillAt, Killed
from tutelage import catalogue
from tutelage.engine import sharded
from tutelage.engine.checkpoint import CheckpointError, CheckpointFolder, Snapshot
from tutelage.engine.distributed import whole
from tutelage.engine.loop import Trainer
from tutelage.engine.runtime import RankError, Runtime
from tutelage.models import build_model, load_model, save_model

STEPS = 6
OPTIONS: dict[str, dict[str, Any]] = {
    "fitnet": {"hint_layer": 1},
    "crd": {"negatives": 8},
}
PROBES = ["InsideBlock", "ThroughTeacher", "TrainedTeacher", "Memory"]
SHARDED = [
    name
    for name in catalogue.names()
    if catalogue.load(name).needs.sharding == "any" and catalogue.load(name).kind == "Method"
]
ADAM = {"name": "adamw", "lr": 0.01}


def trainer_in(folder: str | None, name: str, sharding: str = "fsdp", **changes: Any) -> Trainer:
    made = make_trainer(
        name, OPTIONS.get(name), sharding, steps=STEPS, checkpoint={"every": 2, "keep": 2}, **changes
    )
    if folder:
        made.checkpoints = CheckpointFolder(Path(folder), 2)
    return made


def state_of(trainer: Trainer) -> dict[str, Tensor]:
    """All that is trained or remembered, whole; a collective."""
    found = {name: whole(value.detach()).clone() for name, value in trainer.parameters.items()}
    found |= {f"buffer {name}": value.clone() for name, value in trainer.method.named_buffers()}
    return found | {f"ships {name}": value for name, value in trainer.finished().state_dict().items()}


# What runs in both processes of the pair; each gives what can be sent back.


def uninterrupted(name: str, changes: dict[str, Any]) -> dict[str, Tensor]:
    trainer = trainer_in(None, name, **changes)
    assert all(isinstance(p, DTensor) for p in trainer.parameters.values())
    trainer.fit()
    return state_of(trainer)


def killed(name: str, folder: str, step: int, changes: dict[str, Any]) -> None:
    trainer = trainer_in(folder, name, **changes)
    trainer.events.add(KillAt(step))
    try:
        trainer.fit()
    except Killed:
        return
    raise AssertionError("the run was not killed")


def resumed(
    name: str, folder: str, sharding: str, changes: dict[str, Any]
) -> tuple[int, dict[str, Tensor], list[str]]:
    """From which step it went on, how it ended, and what was said."""
    trainer = trainer_in(folder, name, sharding, **changes)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        trainer.restore()
    start = trainer.step
    trainer.fit()
    return start, state_of(trainer), [str(each.message) for each in said]


def assert_bits(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    assert [name for name, value in one.items() if not torch.equal(value, other[name])] == []


CASES = [
    *[(name, {}) for name in PROBES],
    ("none", {"optimizer": ADAM, "ema": 0.9}),
    ("fitnet", {"optimizer": ADAM}),
]


@pytest.mark.parametrize(("name", "changes"), CASES, ids=lambda value: str(value) if value else "sgd")
def test_killed_and_resumed_gives_the_same_bits(
    name: str, changes: dict[str, Any], pair: Any, tmp_path: Path
) -> None:
    first, second = pair.run(uninterrupted, name, changes)
    assert_bits(first, second)
    pair.run(killed, name, str(tmp_path), 5, changes)
    for start, found, said in pair.run(resumed, name, str(tmp_path), "fsdp", changes):
        assert start == 4
        assert not said
        assert_bits(first, found)


def differing(name: str, folder: str) -> list[str]:
    """What differs between a run and one of the same method that was killed and resumed."""
    trainers = [make(name, "fsdp", task=tasks_of(name)[0]) for _ in range(3)]
    for trainer in trainers[1:]:
        trainer.checkpoints = CheckpointFolder(Path(folder), 2)
    trainers[1].events.add(KillAt(3))
    states = []
    for trainer in trainers:
        with contextlib.suppress(Killed):
            trainer.fit()
        states.append(state_of(trainer))
    assert trainers[1].step == 3
    return [key for key, value in states[0].items() if not same(value, states[2][key])]


def same(one: Tensor, other: Tensor) -> bool:
    """Bit for bit; what is not known yet (NaN) equals itself."""
    return torch.equal(one.isnan(), other.isnan()) and torch.equal(one.nan_to_num(), other.nan_to_num())


@pytest.mark.parametrize("name", [*SHARDED, "kd+dist+fitnet"])
def test_every_method_goes_on_sharded(name: str, pair: Any, tmp_path: Path) -> None:
    """With micro-batches, a moving average and validation; from the checkpoint before the last step."""
    assert pair.run(differing, name, str(tmp_path)) == [[], []]
    assert (tmp_path / "step-00000002" / "sharded").is_dir()


def test_a_folder_holds_safetensors_and_json_alone(pair: Any, tmp_path: Path) -> None:
    """Every file is in the manifest, and each rank wrote a part of the sharded tensors."""
    pair.run(killed, "TrainedTeacher", str(tmp_path), 5, {"optimizer": ADAM})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000002", "step-00000004"]
    step = tmp_path / "step-00000004"
    files = {str(path.relative_to(step)) for path in step.rglob("*") if path.is_file()}
    listed = json.loads((step / "manifest.json").read_text())["files"]
    assert set(listed) == files - {"manifest.json"}
    assert {Path(name).suffix for name in files} == {".safetensors", ".json"}
    shards = sorted((step / "sharded").iterdir())
    assert [path.name[:11] for path in shards] == ["shard-00001", "shard-00002"]
    layout = json.loads((step / "sharded.json").read_text())
    assert layout["student"]["stem.weight"] == {"shape": [8, 6], "dtype": "float32", "axis": 0}
    assert "teacher.teacher" in layout
    for path in shards:
        part = load_file(path)
        assert part["student/stem.weight"].shape == (4, 6)
        assert part["optimizer.student/student.stem.weight/exp_avg"].shape == (4, 6)
        for content in path.read_bytes(), *[other.read_bytes() for other in step.glob("*.json")]:
            assert not content.startswith((b"\x80", b"PK")), "a pickle, or torch's own format"


# -- other launches -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_one_process_goes_on_with_what_two_wrote(optimizer: str, pair: Any, tmp_path: Path) -> None:
    changes = {"optimizer": {"name": optimizer, "lr": 0.01}, "ema": 0.9}
    pair.run(killed, "TrainedTeacher", str(tmp_path), 5, changes)
    start, found, said = resumed("TrainedTeacher", str(tmp_path), "single", changes)
    assert start == 4
    assert len(said) == 1
    assert "written by 2 ranks (fsdp), this run has 1 (single)" in said[0]
    assert "bits may differ" in said[0]
    wanted = uninterrupted_alone("TrainedTeacher", changes)
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("sharding", ["fsdp", "ddp"])
def test_two_go_on_with_what_one_wrote(sharding: str, pair: Any, tmp_path: Path) -> None:
    changes = {"optimizer": ADAM, "ema": 0.9}
    killed("TrainedTeacher", str(tmp_path), 5, changes)
    wanted = uninterrupted_alone("TrainedTeacher", changes)
    for start, found, said in pair.run(resumed, "TrainedTeacher", str(tmp_path), sharding, changes):
        assert start == 4
        assert f"written by 1 ranks (single), this run has 2 ({sharding})" in said[0]
        for name, value in wanted.items():
            torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-5)


def test_replicas_go_on_with_what_shards_wrote(pair: Any, tmp_path: Path) -> None:
    pair.run(killed, "none", str(tmp_path), 5, {"optimizer": ADAM})
    wanted = uninterrupted_alone("none", {"optimizer": ADAM})
    for start, found, said in pair.run(resumed, "none", str(tmp_path), "ddp", {"optimizer": ADAM}):
        assert (start, len(said)) == (4, 1)
        for name, value in wanted.items():
            torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-5)


def uninterrupted_alone(name: str, changes: dict[str, Any]) -> dict[str, Tensor]:
    trainer = trainer_in(None, name, **changes)
    trainer.fit()
    return state_of(trainer)


# -- damage and disks that refuse ---------------------------------------------------------------------------------


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def restored(folder: str) -> tuple[int, list[str]]:
    trainer = trainer_in(folder, "none")
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        trainer.restore()
    return trainer.step, [str(each.message) for each in said]


def refused(folder: str) -> tuple[str, bool]:
    """The error, and whether anything was loaded before it."""
    trainer = trainer_in(folder, "none")
    before = state_of(trainer)
    try:
        trainer.restore()
    except (CheckpointError, RankError) as error:
        after = state_of(trainer)
        return str(error), all(torch.equal(value, after[name]) for name, value in before.items())
    return "not refused", True


@pytest.mark.parametrize("victim", ["sharded/shard-00002*", "sharded.json", "state.json"])
def test_a_damaged_newest_one_is_passed_over_by_all(victim: str, pair: Any, tmp_path: Path) -> None:
    pair.run(killed, "none", str(tmp_path), 5, {})
    (found,) = (tmp_path / "step-00000004").glob(victim)
    flip(found)
    (first, said), (second, _) = pair.run(restored, str(tmp_path))
    assert first == second == 2
    assert len(said) == 1
    assert "step-00000004 is damaged" in said[0]
    assert "going back to step 2" in said[0]


def test_where_all_are_damaged_every_rank_stops(pair: Any, tmp_path: Path) -> None:
    pair.run(killed, "none", str(tmp_path), 5, {})
    for path in tmp_path.glob("step-*/sharded/shard-00001*"):
        path.write_bytes(path.read_bytes()[:-5])
    for error, unchanged in pair.run(refused, str(tmp_path)):
        assert "Start the run anew" in error
        assert unchanged, "loaded before the checksums were held against the files"


def with_a_full_disk(folder: str, rank: int, where: str) -> tuple[str, str]:
    """Kind and text of the error; the disk of one rank is full."""
    from torch.distributed.checkpoint.filesystem import FileSystem

    def fail(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    trainer = trainer_in(folder, "none")
    trainer.run(3)
    with pytest.MonkeyPatch.context() as patch:
        if Runtime("cpu").rank == rank:
            owner: Any = {"create_stream": FileSystem, "synced": sharded}.get(where, CheckpointFolder)
            patch.setattr(owner, where, fail)
        try:
            trainer.save()
        except (CheckpointError, RankError) as error:
            return type(error).__name__, str(error)
    return "none", ""


@pytest.mark.parametrize(
    ("rank", "where"), [(0, "create_stream"), (1, "create_stream"), (1, "synced"), (0, "_place")]
)
def test_a_full_disk_of_one_rank_stops_all(rank: int, where: str, pair: Any, tmp_path: Path) -> None:
    for kind, text in pair.run(with_a_full_disk, str(tmp_path), rank, where):
        assert kind in ("CheckpointError", "RankError")
        assert "No space left on device" in text
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000002"]
    assert [step for step, _ in pair.run(restored, str(tmp_path))] == [2, 2]


def test_what_no_file_can_hold_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    class Alone:
        world, rank, is_main, sharding = 1, 0, True, "single"

        def on_main(self, make: Any) -> Any:
            return make()

    odd = Snapshot(1, {"student": {"w": torch.ones(2, dtype=torch.complex128)}})
    with pytest.raises(CheckpointError, match="complex128"):
        sharded.save_together(CheckpointFolder(tmp_path / "new", 1), odd, Alone())  # type: ignore[arg-type]
    assert not (tmp_path / "new").exists()


# -- what ships ---------------------------------------------------------------------------------------------------


def shipped(name: str, folder: str, changes: dict[str, Any]) -> dict[str, Any]:
    """Train a named model sharded; evaluate it so, and save it plain."""
    built = build_model("digits:cnn-4-6", outputs=4, input_shape=(1, 8, 8), seed=3)
    trainer = make_trainer(name, OPTIONS.get(name), "fsdp", student=Flat(built.module), steps=3, **changes)
    trainer.fit()
    predicted = trainer.predict(trainer.example).logits
    plain = trainer.finished()
    assert isinstance(plain, Flat)
    if trainer.runtime.is_main:
        save_model(built._replace(module=plain.model), Path(folder))
    trainer.runtime.barrier()
    teachers = trainer.plain_teachers()
    return {
        "sharded": [n for n, p in plain.named_parameters() if isinstance(p, DTensor)],
        "teachers": [
            n for t in teachers.values() for n, p in t.named_parameters() if isinstance(p, DTensor)
        ],
        "predicted": predicted.clone(),
        "plain": plain(trainer.example.inputs).detach(),
        "inputs": trainer.example.inputs,
        "same": [
            n for n, p in trainer.student.model.named_parameters()
            if not torch.equal(whole(p.detach()), dict(plain.named_parameters())[n])
        ],
    }  # fmt: skip


class Flat(nn.Module):
    """A model of images under rows of six numbers."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, rows: Tensor) -> Tensor:
        logits: Tensor = self.model(nn.functional.pad(rows, (0, 58)).view(-1, 1, 8, 8))
        return logits


@pytest.mark.parametrize("ema", [None, 0.5])
def test_the_student_of_a_sharded_run_is_plain(ema: float | None, pair: Any, tmp_path: Path) -> None:
    found = pair.run(shipped, "kd", str(tmp_path / "student"), {"ema": ema})
    loaded = Flat(load_model(tmp_path / "student").module.eval())
    # Running statistics are each rank's own while training; those of rank 0 ship.
    torch.testing.assert_close(found[0]["predicted"], found[0]["plain"])
    for rank in found:
        assert rank["sharded"] == rank["teachers"] == []
        assert torch.equal(loaded(rank["inputs"]), rank["plain"]), "one process loads what two trained"
        assert bool(rank["same"]) == (ema is not None), "the average ships, where there is one"


def tied() -> dict[str, Any]:
    """A student of which two layers share their weight."""
    trainer = make_trainer("none", None, "fsdp", student=Tied(), steps=2)
    trainer.fit()
    plain = trainer.finished()
    assert isinstance(plain, Tied)
    return {"tied": plain.body[0].weight is plain.body[2].weight, "buffer": plain.seen.item()}


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.body, self.head = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6)), nn.Linear(6, 4)
        self.body[2].weight = self.body[0].weight
        self.seen: Tensor
        self.register_buffer("seen", torch.zeros(()), persistent=False)

    def forward(self, rows: Tensor) -> Tensor:
        self.seen += 1
        logits: Tensor = self.head(self.body(rows))
        return logits


def test_tied_weights_stay_tied_and_unsaved_buffers_come_along(pair: Any) -> None:
    for found in pair.run(tied):
        assert found["tied"]
        assert found["buffer"] > 0
