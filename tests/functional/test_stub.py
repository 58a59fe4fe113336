"""The stub that setup.py puts into a wheel: a type checker sees every name of the flat namespace as what it is."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

import tutelage.functional

# torch's types are not the matter here, and reading them takes a minute.
SETTINGS = "[mypy]\nfollow_imports = skip\n[mypy-tutelage.*]\nfollow_imports = silent\n"


@pytest.fixture(scope="module")
def setup(repository: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("setup", repository / "setup.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_it_names_everything(setup: ModuleType, repository: Path) -> None:
    lines = setup.stub(repository / "src" / "tutelage").splitlines()
    for name in tutelage.functional.__all__:
        home = getattr(tutelage.functional, name).__module__
        assert f"from {home} import {name} as {name}" in lines


def test_mypy_resolves_names_through_it(setup: ModuleType, repository: Path, tmp_path: Path) -> None:
    package, source = tmp_path / "tutelage", repository / "src" / "tutelage"
    for path in [*source.glob("functional/*.py"), *source.glob("methods/*/functional.py")]:
        target = package / path.relative_to(source)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, target)
    (package / "__init__.py").touch()
    (package / "functional" / "__init__.pyi").write_text(setup.stub(package))
    (tmp_path / "mypy.ini").write_text(SETTINGS)
    (tmp_path / "user.py").write_text(
        "from tutelage.functional import nkd_loss, scan\nreveal_type(nkd_loss)\nreveal_type(scan)\n"
        "from tutelage.functional import nkd_los\n"
    )
    result = subprocess.run(
        [sys.executable, "-m", "mypy", "user.py"], cwd=tmp_path, capture_output=True, text=True, timeout=120
    )
    loss, scan, misspelt, _ = result.stdout.splitlines()
    assert "student_logits:" in loss
    assert "gamma: float | int =" in loss
    assert "def (root: pathlib.Path) -> dict[str, str]" in scan
    assert 'has no attribute "nkd_los"' in misspelt
