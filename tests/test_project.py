"""The project's own files agree with each other: versions, pins, hooks, what a wheel holds, what an install refuses."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

APACHE_2 = "cfc7749b96f63bd31c3c42b5c471bf756814053e847c10f3eb003417bc523d30"


@pytest.fixture(scope="module")
def project(repository: Path) -> dict[str, Any]:
    return tomllib.loads((repository / "pyproject.toml").read_text())["project"]


@pytest.fixture(scope="module")
def pins(repository: Path) -> dict[str, str]:
    lines = (repository / "constraints.txt").read_text().splitlines()
    pairs = [line.split("==") for line in lines if line and not line.startswith("#")]
    assert all(len(pair) == 2 for pair in pairs), "constraints.txt holds plain name==version lines"
    return dict(pairs)


def test_every_requirement_is_pinned_within_its_bounds(project: dict[str, Any], pins: dict[str, str]) -> None:
    listed = [
        *project["dependencies"],
        *(line for lines in project["optional-dependencies"].values() for line in lines),
    ]
    for requirement in map(Requirement, listed):
        version = pins[canonicalize_name(requirement.name)]
        assert requirement.specifier.contains(version), f"{requirement} against {version}"


def test_pins_are_public_versions(pins: dict[str, str]) -> None:
    assert "tutelage" not in pins
    for name, version in pins.items():
        assert re.fullmatch(r"[0-9][0-9a-z.]*", version), f"{name}=={version}"


def test_dev_installs_whatever_the_other_extras_name(project: dict[str, Any]) -> None:
    extras = project["optional-dependencies"]
    others = {line for name, lines in extras.items() if name != "dev" for line in lines}
    assert others <= set(extras["dev"]), "`make test` installs dev alone"


def test_citation_and_changelog_name_the_version(repository: Path, project: dict[str, Any]) -> None:
    citation = yaml.safe_load((repository / "CITATION.cff").read_text())
    assert citation["version"] == project["version"]
    assert citation["license"] == project["license"]
    assert project["version"] in (repository / "CHANGELOG.md").read_text()


def test_licence_is_apache_2_word_for_word(repository: Path) -> None:
    assert hashlib.sha256((repository / "LICENSE").read_bytes()).hexdigest() == APACHE_2
    assert "Copyright" in (repository / "NOTICE").read_text()


def test_hooks_run_from_the_virtual_environment(repository: Path) -> None:
    config = yaml.safe_load((repository / ".pre-commit-config.yaml").read_text())
    assert {entry["repo"] for entry in config["repos"]} == {"local"}
    hooks = [hook for entry in config["repos"] for hook in entry["hooks"]]
    assert {hook["id"] for hook in hooks} == {"ruff", "ruff-format", "mypy", "lint-imports"}
    assert all(hook["language"] == "system" and hook["entry"].startswith(".venv/bin/") for hook in hooks)


def test_every_named_file_of_the_documents_exists(repository: Path) -> None:
    documents = [
        *repository.glob("*.md"),
        *(repository / "docs").glob("*.md"),
        *repository.glob("examples/**/*.md"),
    ]
    assert len(documents) >= 5
    for document in documents:
        for target in re.findall(r"\]\(([^)#\s]+)", document.read_text()):
            if "://" not in target:
                assert (document.parent / target).exists(), f"{document.name} names {target}"


def test_a_wheel_holds_what_the_package_reads(repository: Path, tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(
        repository / "src", source / "src", ignore=shutil.ignore_patterns("*.egg-info", "__pycache__")
    )
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE", "NOTICE"):
        shutil.copy(repository / name, source)
    build = "import sys; from setuptools import build_meta; build_meta.build_wheel(sys.argv[1])"
    command = [sys.executable, "-c", build, str(tmp_path)]
    subprocess.run(command, cwd=source, check=True, capture_output=True, timeout=120)
    (wheel,) = tmp_path.glob("*.whl")
    held = set(zipfile.ZipFile(wheel).namelist())
    data = {".yaml", ".md", ".j2", ".css", ".js", ".svg", ".typed", ".py"}
    package = source / "src"
    wanted = {
        path.relative_to(package).as_posix()
        for path in package.rglob("*")
        if path.suffix in data or path.name == "py.typed"
    }
    assert "tutelage/py.typed" in wanted
    assert wanted <= held, f"left out: {sorted(wanted - held)}"
    assert "tutelage/functional/__init__.pyi" in held, "setup.py writes it"
    assert {Path(name).name for name in held if "/licenses/" in name} == {"LICENSE", "NOTICE"}


class TestInstall:
    """tools/install.sh says in plain words what is missing, before it makes anything."""

    def run(
        self, repository: Path, folder: Path, path: Path, **environment: str
    ) -> subprocess.CompletedProcess[str]:
        (folder / "tools").mkdir()
        shutil.copy(repository / "tools" / "install.sh", folder / "tools")
        variables = {"PATH": f"{path}{os.pathsep}/usr/bin{os.pathsep}/bin", **environment}
        script = str(folder / "tools" / "install.sh")
        return subprocess.run([script], env=variables, capture_output=True, text=True, timeout=60)

    def fake(self, folder: Path, name: str, body: str) -> Path:
        folder.mkdir(parents=True)
        (folder / name).write_text(f"#!/bin/sh\n{body}\n")
        (folder / name).chmod(0o755)
        return folder

    def test_no_python(self, repository: Path, tmp_path: Path) -> None:
        result = self.run(repository, tmp_path, tmp_path, PYTHON="python-that-is-nowhere")
        assert result.returncode == 1
        assert "needs Python 3.11 or newer" in result.stderr
        assert "python-that-is-nowhere" in result.stderr
        assert not (tmp_path / ".venv").exists()

    def test_python_too_old(self, repository: Path, tmp_path: Path) -> None:
        body = 'case "$1" in --version) echo Python 3.9.2;; *) exit 1;; esac'
        path = self.fake(tmp_path / "bin", "python-old", body)
        result = self.run(repository, tmp_path, path, PYTHON="python-old")
        assert result.returncode == 1
        assert "Too old: python-old (Python 3.9.2)" in result.stderr

    def test_python_without_venv(self, repository: Path, tmp_path: Path) -> None:
        path = self.fake(tmp_path / "bin", "python-bare", 'case "$2" in *venv*) exit 1;; esac')
        result = self.run(repository, tmp_path, path, PYTHON="python-bare")
        assert result.returncode == 1
        assert "Without venv: python-bare" in result.stderr
        assert "python3-venv" in result.stderr

    def test_an_index_that_is_out_of_reach(self, repository: Path, tmp_path: Path) -> None:
        self.fake(
            tmp_path / ".venv" / "bin",
            "python",
            'case "$*" in *"pip install"*) echo no index >&2; exit 1;; esac',
        )
        result = self.run(repository, tmp_path, tmp_path)
        assert result.returncode == 1
        assert "no index" in result.stderr
        assert "a package index that can be reached" in result.stderr
