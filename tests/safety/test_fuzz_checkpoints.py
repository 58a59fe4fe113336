"""Damaged checkpoints: what was saved comes out, bit for bit, or `CheckpointError`; never other weights."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from damage import altered, fuzzed
from hypothesis import strategies as st

from support import Net, rows, train_config
from tutelage.engine.checkpoint import CheckpointError, CheckpointFolder, Snapshot
from tutelage.engine.checkpoint_files import MANIFEST, STATE, checksum, synced
from tutelage.engine.loop import Trainer
from tutelage.engine.optim_names import OptimError
from tutelage.engine.runtime import Runtime
from tutelage.methods.baselines.method import PlainTraining, PlainTrainingConfig
from tutelage.tasks import build_task

TENSORS = {
    "student": {"w": torch.arange(6.0).view(2, 3), "b": torch.ones(3)},
    "method": {"m": torch.zeros(2, 2)},
}
STATES = {"progress": {"step": 3}, "list": [1, 2.5, None, "x"]}


def same(found: Snapshot) -> bool:
    """Whether it is what was saved, bit for bit."""
    names = {stem: set(group) for stem, group in TENSORS.items()}
    return (
        found.step == 3
        and found.state == STATES
        and {stem: set(group) for stem, group in found.tensors.items()} == names
        and all(torch.equal(found.tensors[s][n], t) for s, group in TENSORS.items() for n, t in group.items())
    )


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    return CheckpointFolder(folder, 2).save(Snapshot(3, TENSORS, STATES))


FILES = (MANIFEST, STATE, "student.safetensors", "method.safetensors")


@st.composite
def accidents(draw: st.DrawFn) -> Callable[[Path], None]:
    """Something that happens to a checkpoint's folder."""
    name, other = draw(st.permutations(FILES))[:2]
    how = draw(st.sampled_from(["damage", "swap", "copy", "remove", "folder", "extra", "link"]))
    seed = draw(st.randoms(use_true_random=False))
    extra = draw(st.binary(max_size=32))

    def happen(folder: Path) -> None:
        file = folder / name
        if how == "damage":
            content = bytearray(file.read_bytes())
            for _ in range(seed.randint(1, 3)):
                content[seed.randrange(len(content))] ^= 1 << seed.randrange(8)
            file.write_bytes(
                bytes(content[: seed.choice([len(content), seed.randrange(len(content))])]) + extra
            )
        elif how == "swap":
            mine, theirs = file.read_bytes(), (folder / other).read_bytes()
            file.write_bytes(theirs)
            (folder / other).write_bytes(mine)
        elif how == "copy":
            file.write_bytes((folder / other).read_bytes())
        elif how == "extra":
            (folder / "further.safetensors").write_bytes(extra)
        else:
            file.unlink()
            if how == "folder":
                file.mkdir()
            elif how == "link":
                file.symlink_to(folder)

    return happen


def read_damaged(accident: Callable[[Path], None], saved: Path) -> None:
    folder = saved.parent.parent / "damaged"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(saved, folder / saved.name)
    accident(folder / saved.name)
    with suppress(CheckpointError):
        assert same(CheckpointFolder(folder, 2).load(3))
    with suppress(CheckpointError), warnings.catch_warnings(action="ignore"):
        found = CheckpointFolder(folder, 2).latest()
        assert found is not None
        assert same(found)


def read_sealed(content: Any, saved: Path) -> None:
    """A manifest of anything, with the checksum that belongs to it."""
    folder = saved.parent.parent / "sealed"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(saved, folder / saved.name)
    if isinstance(content, dict):
        with suppress(ValueError):
            content = content | {"checksum": checksum(content)}
    (folder / saved.name / MANIFEST).write_text(json.dumps(content))
    for read in (lambda: CheckpointFolder(folder, 2).load(3), CheckpointFolder(folder, 2).latest):
        with suppress(CheckpointError):
            read()
    with suppress(CheckpointError):
        CheckpointFolder(folder, 2).best()


MANIFEST_LIKE = {
    "format": 2,
    "step": 3,
    "best": None,
    "files": {name: {"bytes": 10, "sha256": "0" * 64} for name in FILES[1:]},
}
test_damaged_checkpoints, test_damaged_checkpoints_long = fuzzed(read_damaged, 120, accident=accidents())
test_sealed_manifests, test_sealed_manifests_long = fuzzed(read_sealed, 80, content=altered(MANIFEST_LIKE))


@pytest.fixture(scope="module")
def checkpointed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the checkpoint of a real Trainer."""
    folder = tmp_path_factory.mktemp("trainer")
    trainer(folder).run(4)
    return folder


def trainer(folder: Path) -> Trainer:
    return Trainer(
        Runtime("cpu"),
        Net(width=4, blocks=1),
        PlainTraining(PlainTrainingConfig(name="none")),
        build_task("classification", outputs=4),
        rows(16),
        train_config(steps=4, optimizer={"name": "adamw", "lr": 0.1}, ema=0.9),
        folder=folder,
    )


def state_of(folder: Path) -> Any:
    return json.loads((folder / "step-00000004" / STATE).read_text())


def restore_altered(data: Any, checkpointed: Path) -> None:
    """The state of a Trainer as nobody wrote it, with the checksums that belong to it."""
    folder = checkpointed.parent / "altered"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(checkpointed, folder)
    path = folder / "step-00000004"
    (path / STATE).write_text(json.dumps(data.draw(altered(state_of(checkpointed)))))
    content = json.loads((path / MANIFEST).read_text())
    del content["checksum"]
    content["files"][STATE] = synced(path / STATE).model_dump()
    (path / MANIFEST).write_text(json.dumps(content | {"checksum": checksum(content)}))
    with suppress(CheckpointError, OptimError), warnings.catch_warnings(action="ignore"):
        trainer(folder).restore()


test_altered_states, test_altered_states_long = fuzzed(restore_altered, 60, data=st.data())
