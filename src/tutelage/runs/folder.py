"""A run's folder: what was asked for, what happened, and an OS lock that a killed run does not leave behind."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

import tutelage.recipe as recipes
from tutelage.engine.checkpoint import FolderLock
from tutelage.engine.runtime import Runtime
from tutelage.engine.writing import write_whole
from tutelage.recipe.schema import Recipe
from tutelage.runs.result import read_result
from tutelage.untrusted import read_object

_PACKAGES = (
    "torch",
    "torchvision",
    "timm",
    "transformers",
    "accelerate",
    "datasets",
    "torchmetrics",
    "numpy",
)


class FolderError(RuntimeError):
    """A folder that this run cannot use."""


class RunFolder:
    """A run's files. Rank 0 alone looks and writes; what it finds wrong stops every rank. Used as a context manager it
    holds the folder's lock.

    Raises:
        FolderError: the folder cannot be written, holds another recipe, or a run that is finished or under way while
            ``resume`` is off.
        RunLockedError: another run works in it.
    """

    def __init__(self, path: Path, recipe: Recipe, runtime: Runtime, *, resume: bool) -> None:
        self.path, self.recipe, self.runtime, self.may_resume = path, recipe, runtime, resume
        self.lock = FolderLock(path)
        runtime.on_main(self._check)

    def __enter__(self) -> RunFolder:
        self.runtime.on_main(self._open)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.runtime.is_main:
            self.lock.__exit__(kind, error, trace)

    def finished(self) -> dict[str, Any] | None:
        """``result.json`` of the run that ended here, else None."""
        found = self.runtime.on_main(lambda: read_result(self.path))
        return found if found is not None and found["status"] == "done" else None

    def write_text(self, name: str, text: str) -> None:
        """Written beside and renamed: complete or absent.

        Raises:
            UnwrittenError: the disk refuses.
        """
        if self.runtime.is_main:
            write_whole(self.path / name, text)

    def write_json(self, name: str, value: Mapping[str, Any]) -> None:
        self.write_text(name, json.dumps(value, indent=1))

    def note_environment(self, device: torch.device) -> None:
        """Write ``environment.json``; a run that goes on elsewhere is told that bits may differ."""
        if not self.runtime.is_main:
            return
        path, now = self.path / "environment.json", environment(device)
        change = differing_machine(read_object(path), now) if path.exists() else None
        if change:
            warnings.warn(
                f"this run goes on elsewhere ({change}); bits may differ from those of a run that was never stopped",
                stacklevel=2,
            )
        self.write_json(path.name, now)

    def _check(self) -> None:
        found = self.path / "recipe.yaml"
        with self._explained():
            if self.path.exists() and not self.path.is_dir():
                raise FolderError(f"output.dir {self.path} is a file; give a folder")
            if not found.exists():
                self._check_free()
                return
        difference = differing_field(recipes.load_recipe(found), self.recipe)
        if difference:
            raise FolderError(
                f"{self.path} holds a run of another recipe ({difference} differs); give another output.dir"
            )
        if not self.may_resume:
            raise FolderError(
                f"{self.path} already holds this run; `tutelage resume {self.path}` goes on with it, "
                "another output.dir starts anew"
            )

    def _check_free(self) -> None:
        """Nothing lies here, and a folder can be made; it is not made yet."""
        if self.path.is_dir() and any(
            not child.name.startswith((".lock", ".tmp-")) for child in self.path.iterdir()
        ):
            raise FolderError(f"{self.path} is not empty and holds no run; give another output.dir")
        nearest = next(place for place in (self.path, *self.path.absolute().parents) if place.exists())
        if not nearest.is_dir():
            raise FolderError(f"{self.path} cannot be made: {nearest} is a file; give another output.dir")
        if not os.access(nearest, os.W_OK | os.X_OK):
            raise FolderError(f"no permission to write in {nearest}; give another output.dir")

    def _open(self) -> None:
        with self._explained():
            self.lock.__enter__()
            try:
                self._check()  # again: until now another process might have begun here
                for leftover in self.path.glob(".tmp-*"):  # of a killed one
                    shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
                if not (self.path / "recipe.yaml").exists():
                    self.write_text("recipe.yaml", recipes.dump(self.recipe))
            except BaseException:
                self.lock.__exit__(None, None, None)
                raise

    @contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise FolderError(f"cannot write {self.path}: {error}; give another output.dir") from error


def differing_field(found: Recipe, wanted: Recipe) -> str | None:
    """Path of the first field in which two recipes differ; where the run is written does not count."""
    left, right = found.model_dump(mode="json"), wanted.model_dump(mode="json")
    left.pop("output"), right.pop("output")
    return _differing(left, right, "")


def _differing(left: Any, right: Any, path: str) -> str | None:
    if isinstance(left, dict) and isinstance(right, dict):
        for key in {**left, **right}:
            inner = _differing(left.get(key), right.get(key), f"{path}.{key}" if path else str(key))
            if inner:
                return inner
        return None
    return None if left == right else path


def differing_machine(before: Mapping[str, Any], now: Mapping[str, Any]) -> str | None:
    """In what two environments differ of all that bits depend on; none where they agree."""
    fields = ("cpu", "device", "torch", "threads")
    changes = [
        f"{name} was {before[name]}, is {now[name]}"
        for name in fields
        if name in before and before[name] != now[name]
    ]
    return ", ".join(changes) or None


def environment(device: torch.device) -> dict[str, Any]:
    """What a run ran on. Bits repeat on the same CPU, torch and thread count only."""
    packages = {}
    for name in _PACKAGES:
        try:
            packages[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "python": platform.python_version(),
        "tutelage": importlib.metadata.version("tutelage"),
        "torch": torch.__version__,
        "platform": platform.platform(),
        "cpu": _cpu_name(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "threads": torch.get_num_threads(),
        "commit": _commit(),
        "packages": packages,
    }


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _commit() -> str | None:
    """Commit of the checkout that this code runs from; none where it is installed."""
    here = Path(__file__).parent
    try:
        found = subprocess.run(
            ["git", "rev-parse", "HEAD"], cwd=here, capture_output=True, text=True, check=False, timeout=10
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return found.stdout.strip() or None if found.returncode == 0 else None
