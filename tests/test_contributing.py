"""CONTRIBUTING's worked example: the folder alone brings a method to the catalogue, the comparison and the report."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from types import ModuleType

import pytest
import torch

RECIPE = """\
version: 1
data: {path: digits, test: 200, validation: 100, limit: 200}
teacher: {recipe: teacher.yaml}
student: {model: "digits:mlp-16"}
method: none
train: {epochs: 2, batch_size: 50, optimizer: {lr: 0.02}}
"""
TEACHER = """\
version: 1
data: {path: digits, test: 200, validation: null, limit: 400}
student: {model: "digits:mlp-64"}
method: none
train: {epochs: 5, batch_size: 50, optimizer: {lr: 0.05}}
"""


@pytest.fixture(scope="module")
def example(repository: Path) -> Path:
    return repository / "examples" / "new_method"


@pytest.fixture(scope="module")
def scratch(example: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `pip install` would make of the example: the folder, and the entry point that its pyproject.toml names."""
    site = tmp_path_factory.mktemp("site")
    shutil.copytree(example / "logit_mse", site / "logit_mse", ignore=shutil.ignore_patterns("__pycache__"))
    project = tomllib.loads((example / "pyproject.toml").read_text())["project"]
    info = site / f"{project['name'].replace('-', '_')}-{project['version']}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n"
    )
    points = project["entry-points"]["tutelage.methods"]
    listed = "".join(f"{name} = {target}\n" for name, target in points.items())
    (info / "entry_points.txt").write_text(f"[tutelage.methods]\n{listed}")
    return site


def tutelage(*arguments: str, site: Path, folder: Path) -> str:
    """Standard output of a command, run in ``folder`` with ``site`` on the path."""
    command = [sys.executable, "-W", "error", "-c", "from tutelage.cli import main; main()", *arguments]
    environment = {**os.environ, "PYTHONPATH": str(site), "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=240)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def test_the_catalogue_finds_it(scratch: Path, tmp_path: Path) -> None:
    listed = {
        entry["name"]: entry
        for entry in json.loads(tutelage("methods", "--json", site=scratch, folder=tmp_path))
    }
    found = listed["logit_mse"]
    assert found["title"] == "Do Deep Nets Really Need to be Deep?"
    assert found["card"] == "logit_mse"
    assert found["kind"] == "Method"
    assert found["missing"] == []
    assert {"none", "kd", "nkd"} <= listed.keys()


def test_its_recipe_can_be_run(scratch: Path, tmp_path: Path) -> None:
    tutelage("run", "logit_mse", "--dry-run", site=scratch, folder=tmp_path)
    assert not any(tmp_path.iterdir())


def test_a_comparison_and_its_report_hold_it(scratch: Path, tmp_path: Path) -> None:
    (tmp_path / "small.yaml").write_text(RECIPE)
    (tmp_path / "teacher.yaml").write_text(TEACHER)
    arguments = ("compare", "small.yaml", "--methods", "none,logit_mse", "--seeds", "2", "--dir", "compared")
    tutelage(*arguments, site=scratch, folder=tmp_path)
    comparison = json.loads((tmp_path / "compared" / "comparison.json").read_text())
    methods = {method["name"]: method for method in comparison["methods"]}
    assert [run["status"] for run in methods["logit_mse"]["runs"]] == ["done", "done"]
    assert methods["logit_mse"]["difference"] is not None
    metrics = next((tmp_path / "compared").glob("logit_mse/seed-0/metrics.jsonl")).read_text()
    terms = [set(line["terms"]) for line in map(json.loads, metrics.splitlines()) if line["kind"] == "train"]
    assert terms
    assert all(names == {"logit_mse"} for names in terms)
    assert "logit_mse" in (tmp_path / "compared" / "report.html").read_text()


@pytest.fixture(scope="module")
def math(example: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(
        "logit_mse_functional", example / "logit_mse" / "functional.py"
    )
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_its_loss_by_hand(math: ModuleType) -> None:
    student = torch.tensor([[1.0, 2.0, 6.0], [0.0, 0.0, 0.0]], requires_grad=True)
    teacher = torch.tensor([[0.0, 0.0, 0.0], [10.0, 10.0, 10.0]], requires_grad=True)
    loss = math.logit_mse_loss(student, teacher)
    # Row 1 less its mean 3 is (-2, -1, 3): 14 / 2. Row 2 differs by a constant: 0. Mean over two rows: 3.5.
    assert loss.item() == pytest.approx(3.5)
    loss.backward()
    assert student.grad is not None
    torch.testing.assert_close(student.grad, torch.tensor([[-1.0, -0.5, 1.5], [0.0, 0.0, 0.0]]))
    assert teacher.grad is None


def test_its_loss_refuses_other_classes(math: ModuleType) -> None:
    with pytest.raises(ValueError, match=r"student_logits \[2, 3\].*teacher_logits \[2, 4\]"):
        math.logit_mse_loss(torch.zeros(2, 3), torch.zeros(2, 4))


def test_in_the_tree_it_is_one_folder(scratch: Path, repository: Path, tmp_path: Path) -> None:
    """Copied into `tutelage.methods`, no other file touched: catalogue, `tutelage.functional` and walls take it."""
    for name in ("src/tutelage", "tools"):
        shutil.copytree(repository / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(repository / ".importlinter", tmp_path)
    shutil.copytree(scratch / "logit_mse", tmp_path / "src/tutelage/methods/logit_mse")
    script = (
        "from tutelage import catalogue; from tutelage.functional import logit_mse_loss; "
        "assert catalogue.entries()['logit_mse'].package == 'tutelage.methods.logit_mse'; "
        "assert catalogue.load('logit_mse').paper.year == 2014; "
        "assert logit_mse_loss.__module__ == 'tutelage.methods.logit_mse.functional'; "
        "from importlinter.cli import lint_imports; raise SystemExit(lint_imports(no_cache=True, no_logo=True))"
    )
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "src")}
    command = [sys.executable, "-c", script]
    result = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120
    )
    assert result.returncode == 0, result.stdout + result.stderr
