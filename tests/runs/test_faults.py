"""Disks that refuse, damaged files, folders of another version: as the command line says it, and what is left."""

from __future__ import annotations

import errno
import io
import json
import os
import resource
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file, save_model
from torch import Tensor
from typer.testing import CliRunner, Result

from killing import stop_after
from tutelage.cli.app import app
from tutelage.engine import checkpoint_files
from tutelage.models import folder as model_folder
from tutelage.runs import distill

STEPS = 30
RECIPE: dict[str, Any] = {
    "data": {"path": "digits", "limit": 96, "validation": 32, "test": 100},
    "teacher": {"model": "digits:mlp-16"},
    "student": {"model": "digits:mlp-64"},
    "method": "kd",
    "train": {
        "steps": STEPS,
        "batch_size": 32,
        "device": "cpu",
        "threads": 1,
        "checkpoint": {"every": 5, "keep": 2},
    },
    "evaluation": {"every": 100},
    "output": {"report": False},
}
"""Its last step is evaluated, and is then the best: till then every fifth step is kept, two at a time."""


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tensor]:
    return student(distill(RECIPE, folder=tmp_path_factory.mktemp("whole") / "run", progress=False).folder)


def student(folder: Path) -> dict[str, Tensor]:
    found: dict[str, Tensor] = load_file(folder / "student" / "model.safetensors")
    return found


def killed(folder: Path, step: int = 12, values: dict[str, Any] = RECIPE) -> Path:
    stop_after(step, lambda kill: distill(values, folder=folder, progress=False, callbacks=[kill]))
    return folder


def typed(*words: str) -> Result:
    with warnings.catch_warnings():
        warnings.simplefilter("default")
        return CliRunner().invoke(
            app, [*words, "--no-progress"], prog_name="tutelage", env={"COLUMNS": "200"}
        )


def assert_failed(done: Result, code: int, *words: str) -> None:
    """One message, and no traceback."""
    assert done.exit_code == code, done.output
    assert isinstance(done.exception, SystemExit), "a traceback"
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    for word in words:
        assert word in done.stderr, done.stderr


def assert_ends_well(folder: Path, whole: dict[str, Tensor]) -> str:
    """Resumed, it ends with the bits of a run that nothing happened to; what was said meanwhile."""
    done = typed("resume", str(folder))
    assert done.exit_code == 0, done.output
    found = student(folder)
    assert [name for name, value in whole.items() if not torch.equal(value, found[name])] == []
    steps = [json.loads(line)["step"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert steps == sorted(steps)
    assert hidden(folder) == [".lock"]
    return done.stderr


def hidden(folder: Path) -> list[str]:
    return [path.name for path in folder.rglob(".*")]


# -- a disk that is full ------------------------------------------------------------------------------------------


class HalfWritten(io.TextIOWrapper):
    """Takes half of what is written, then the disk is full."""

    def write(self, text: str) -> int:
        super().write(text[: len(text) // 2])
        self.flush()
        raise OSError(errno.ENOSPC, "No space left on device")


@pytest.fixture
def fill(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], None]]:
    """Let the disk be full once a file of this name is written."""
    with monkeypatch.context() as patch:

        def full(name: str) -> None:
            opened = Path.open

            def refuse(self: Path, mode: str = "r", *arguments: Any, **options: Any) -> Any:
                if self.name.removeprefix(".tmp-") == name and mode in ("w", "a"):
                    return HalfWritten(opened(self, f"{mode}b"), encoding="utf-8")
                return opened(self, mode, *arguments, **options)

            def half(tensors: Any, path: Path | str) -> None:
                if Path(path).name == name:
                    Path(path).write_bytes(b"half")
                    raise SafetensorError("I/O error: No space left on device (os error 28)")
                save_file(tensors, path)

            def half_model(model: Any, path: str) -> None:
                half({}, path) if Path(path).name == name else save_model(model, path)

            patch.setattr(Path, "open", refuse)
            patch.setattr(checkpoint_files, "save_file", half)
            patch.setattr(model_folder, "save_safetensors", half_model)

        full.undo = patch.undo  # type: ignore[attr-defined]
        yield full


@pytest.mark.parametrize(
    ("name", "left"),
    [
        ("student.safetensors", [5, 10]),
        ("optimizer.main.safetensors", [5, 10]),
        ("metrics.jsonl", [5, 10]),
        ("environment.json", [5, 10]),
        ("model.safetensors", [25, 30]),
        ("tutelage.json", [25, 30]),
        ("result.json", [25, 30]),
    ],
)
def test_a_full_disk(name: str, left: list[int], fill: Any, whole: dict[str, Tensor], tmp_path: Path) -> None:
    """Whatever file it is that the disk does not take: the run says which, keeps what it has, and goes on later."""
    folder = killed(tmp_path / "run")
    fill(name)
    done = typed("resume", str(folder))
    saying = "student" if name in ("model.safetensors", "tutelage.json") else name
    if name.startswith(("student.", "optimizer.")):
        saying = "the checkpoint of step 15 could not be saved"
    assert_failed(done, 1, saying, "No space left on device", "ree disk space", "resume")
    kept = sorted(path.name for path in (folder / "checkpoints").iterdir())
    assert kept == [f"step-{step:08d}" for step in left]
    assert hidden(folder) == [".lock"], "something half-written is left"
    assert not (folder / "student").exists() or name == "result.json"
    fill.undo()
    assert_ends_well(folder, whole)


def test_a_full_disk_at_the_very_start(fill: Any, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(RECIPE))
    fill("recipe.yaml")
    done = typed("run", str(recipe), "--dir", str(tmp_path / "run"))
    assert_failed(done, 1, "run/recipe.yaml could not be written", "No space left on device")
    fill.undo()
    assert typed("run", str(recipe), "--dir", str(tmp_path / "run")).exit_code == 0, "nothing is in the way"


def test_a_file_that_may_not_grow(whole: dict[str, Tensor], tmp_path: Path) -> None:
    """The system's own limit, in a process of its own."""
    folder = killed(tmp_path / "run")
    limit = 12_000  # above every file but those of the student's weights
    done = subprocess.run(
        [sys.executable, "-m", "tutelage", "resume", str(folder), "--no-progress"],
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY)),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 1, done.stderr
    assert done.stderr.count("\n") == 1, done.stderr
    assert "error: the checkpoint of step 15 could not be saved" in done.stderr
    assert "File too large" in done.stderr
    assert hidden(folder) == [".lock"]
    assert_ends_well(folder, whole)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 256 KiB; the test is skipped where none may be mounted."""
    place = tmp_path / "disk"
    place.mkdir()
    if mount(place, "size=256k").returncode:
        pytest.skip("mounting a tmpfs is not allowed here")
    yield place
    subprocess.run(["umount", "--lazy", str(place)], check=True)  # files may be mapped still


def mount(place: Path, options: str) -> subprocess.CompletedProcess[bytes]:
    try:
        return subprocess.run(
            ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(place)], capture_output=True, check=False
        )
    except OSError:
        return subprocess.CompletedProcess([], 1)


def test_a_small_file_system(small_disk: Path, whole: dict[str, Tensor]) -> None:
    """Each further byte is refused, whatever it is for."""
    folder = killed(small_disk / "run")
    (small_disk / "other").write_bytes(bytes(free(small_disk)))
    assert_failed(typed("resume", str(folder)), 1, "No space left on device", str(folder))
    assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == [
        "step-00000005",
        "step-00000010",
    ]
    (small_disk / "other").unlink()
    assert_ends_well(folder, whole)


def free(place: Path) -> int:
    found = os.statvfs(place)
    return found.f_bavail * found.f_frsize


# -- a folder that may not be written -----------------------------------------------------------------------------


def test_a_read_only_file_system(small_disk: Path, whole: dict[str, Tensor]) -> None:
    folder = killed(small_disk / "run")
    assert mount(small_disk, "remount,ro").returncode == 0
    assert_failed(typed("resume", str(folder)), 2, f"cannot write {folder}", "Read-only file system")
    assert mount(small_disk, "remount,rw").returncode == 0
    assert_ends_well(folder, whole)


def test_a_folder_that_turns_read_only(
    monkeypatch: pytest.MonkeyPatch, whole: dict[str, Tensor], tmp_path: Path
) -> None:
    """As it happens to a disk with errors, in the middle of a run."""
    folder = killed(tmp_path / "run")
    mkdir = Path.mkdir

    def refuse(self: Path, *arguments: Any, **options: Any) -> None:
        if self.name.startswith(".tmp-"):
            raise OSError(errno.EROFS, "Read-only file system", str(self))
        mkdir(self, *arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "mkdir", refuse)
        assert_failed(typed("resume", str(folder)), 1, "step 15 could not be saved", "Read-only file system")
    assert_ends_well(folder, whole)


# -- damage -------------------------------------------------------------------------------------------------------


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


@pytest.mark.parametrize("damage", [flip, cut, Path.unlink])
@pytest.mark.parametrize("name", ["student.safetensors", "state.json", "manifest.json"])
def test_a_damaged_newest_checkpoint_falls_back_and_says_so(
    name: str, damage: Callable[[Path], None], whole: dict[str, Tensor], tmp_path: Path
) -> None:
    folder = killed(tmp_path / "run")
    damage(folder / "checkpoints" / "step-00000010" / name)
    said = assert_ends_well(folder, whole)
    assert said.count("step-00000010 is damaged") == 1
    assert name in said
    assert "going back to step 5" in said


def test_all_checkpoints_damaged(tmp_path: Path) -> None:
    folder = killed(tmp_path / "run")
    for path in (folder / "checkpoints").glob("*/state.json"):
        flip(path)
    done = typed("resume", str(folder))
    assert_failed(done, 1, "no checkpoint in", "step-00000005", "step-00000010", "Start the run anew")


# -- another version, another recipe, another machine -------------------------------------------------------------


def test_a_checkpoint_of_a_newer_version(whole: dict[str, Tensor], tmp_path: Path) -> None:
    folder = killed(tmp_path / "run")
    path = folder / "checkpoints" / "step-00000010" / "manifest.json"
    before = path.read_bytes()
    content = json.loads(before) | {"format": checkpoint_files.FORMAT + 1}
    del content["checksum"]
    path.write_text(json.dumps(content | {"checksum": checkpoint_files.checksum(content)}))
    assert_failed(typed("resume", str(folder)), 1, "step-00000010 has format 3", "Install a newer tutelage")
    path.write_bytes(before)
    assert_ends_well(folder, whole)


def test_a_checkpoint_of_the_version_before(whole: dict[str, Tensor], tmp_path: Path) -> None:
    folder = killed(tmp_path / "run")
    for path in (folder / "checkpoints").glob("*/manifest.json"):
        content = json.loads(path.read_text()) | {"format": 1}
        del content["checksum"]
        path.write_text(json.dumps(content | {"checksum": checkpoint_files.checksum(content)}))
    assert "warning" not in assert_ends_well(folder, whole)


def test_a_recipe_of_a_newer_version(tmp_path: Path) -> None:
    folder = killed(tmp_path / "run")
    saved = folder / "recipe.yaml"
    saved.write_text(saved.read_text().replace("version: 1", "version: 2"))
    assert_failed(typed("resume", str(folder)), 2, "recipe.yaml", "version: got 2")


def test_a_student_of_a_newer_version(tmp_path: Path) -> None:
    folder = distill(RECIPE, folder=tmp_path / "run", progress=False).folder
    card = folder / "student" / "tutelage.json"
    card.write_text(json.dumps(json.loads(card.read_text()) | {"format": 2}))
    kept = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert_failed(typed("resume", str(folder)), 2, "has format 2; this version reads 1")
    assert kept == {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_recipe_that_changed_since(whole: dict[str, Tensor], tmp_path: Path) -> None:
    folder = killed(tmp_path / "run")
    changed = tmp_path / "recipe.yaml"
    changed.write_text(yaml.safe_dump(RECIPE | {"train": RECIPE["train"] | {"seed": 1}}))
    done = typed("run", str(changed), "--dir", str(folder), "--resume")
    assert_failed(done, 2, "a run of another recipe (train.seed differs)", "another output.dir")
    assert_ends_well(folder, whole)


def test_a_run_that_goes_on_elsewhere_says_that_bits_may_differ(
    whole: dict[str, Tensor], tmp_path: Path
) -> None:
    folder = killed(tmp_path / "run")
    path = folder / "environment.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"cpu": "another", "threads": 64}))
    said = assert_ends_well(folder, whole)
    assert said.count("this run goes on elsewhere (cpu was another, is ") == 1
    assert "threads was 64, is 1); bits may differ" in said
