"""The walls of `.importlinter` stand in the tree, and each falls where someone walks through it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

BREACHES = {
    # file: what is added to it; what import-linter then prints
    "engine/step.py": (
        "import tutelage.methods.nkd.method",
        "tutelage.engine.step -> tutelage.methods.nkd.method",
    ),
    "catalogue.py": ("import tutelage.cli", "tutelage.catalogue -> tutelage.cli"),
    "tasks/__init__.py": ("import tutelage.models", "tutelage.tasks -> tutelage.models"),
    "functional/divergences.py": ("import numpy", "tutelage.functional.divergences -> numpy"),
    "methods/wa/functional.py": ("import torch, einops", "tutelage.methods.wa.functional -> einops"),
    "methods/wa/__init__.py": ("import torch", "tutelage.methods.wa -> torch"),
    "report/records.py": ("import tutelage.runs", "tutelage.report.records -> tutelage.runs"),
    "methods/nkd/method.py": (
        "import tutelage.methods.wa.functional",
        "tutelage.methods.nkd.method -> tutelage.methods.wa",
    ),
}
CONTRACTS = 6


def lint(root: Path) -> subprocess.CompletedProcess[str]:
    command = [
        sys.executable,
        "-c",
        "from importlinter.cli import lint_imports_command as run; run()",
        "--no-cache",
        "--no-logo",
    ]
    environment = {**os.environ, "PYTHONPATH": str(root / "src"), "COLUMNS": "1000"}
    return subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=120)


@pytest.fixture
def copy(repository: Path, tmp_path: Path) -> Path:
    """The tree's own copy of all that import-linter reads."""
    for folder in ("src/tutelage", "tools"):
        shutil.copytree(repository / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(repository / ".importlinter", tmp_path)
    return tmp_path


def test_the_tree_keeps_every_wall(repository: Path) -> None:
    result = lint(repository)
    assert result.returncode == 0, result.stdout + result.stderr
    assert f"Contracts: {CONTRACTS} kept, 0 broken." in result.stdout


def test_each_wall_falls_where_it_is_breached(copy: Path) -> None:
    for name, (line, _) in BREACHES.items():
        file = copy / "src" / "tutelage" / name
        file.write_text(f"{file.read_text()}\n{line}\n")
    result = lint(copy)
    assert result.returncode == 1, result.stdout + result.stderr
    assert f"Contracts: 0 kept, {CONTRACTS} broken." in result.stdout
    for _, printed in BREACHES.values():
        assert printed in result.stdout


def test_a_new_room_has_to_be_given_its_place(copy: Path) -> None:
    (copy / "src" / "tutelage" / "attic").mkdir()
    (copy / "src" / "tutelage" / "attic" / "__init__.py").touch()
    result = lint(copy)
    assert result.returncode == 1
    assert "attic" in result.stdout
