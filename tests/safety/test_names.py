"""No name from a file or a user leads out of the folder that it is put in."""

from __future__ import annotations

import json
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from support import rows
from tutelage import catalogue
from tutelage.cli.recipes import recipes
from tutelage.data import open_data
from tutelage.data.source import DataError
from tutelage.engine.checkpoint import CheckpointError, CheckpointFolder, Snapshot
from tutelage.engine.checkpoint_files import MANIFEST, checksum
from tutelage.engine.lock import FolderLock
from tutelage.procedures.run import Run
from tutelage.recipe import RecipeError, load_recipe
from tutelage.recipe.schema import DataConfig
from tutelage.runs.batch import write_text
from tutelage.runs.plan import make_plan
from tutelage.runs.teachers import fingerprint
from tutelage.untrusted import FileError, file_name, read_object

BAD = [
    "",
    ".",
    "..",
    "../x",
    "a/../../x",
    "/etc/passwd",
    "a/b",
    "a\\b",
    "..\\x",
    "C:x",
    "a\0b",
    "a\nb",
    "\x1b[31m",
    ".hidden",
    "~",
    "-rf",
    "a.",
    "a b",
    "con",
    "NUL.txt",
    "com1",
    "ä" * 101,
    "a" * 201,
]


@pytest.mark.parametrize("name", BAD)
def test_a_name_that_is_no_files_is_refused(name: str) -> None:
    with pytest.raises(FileError, match=r"the stage .* cannot name a file"):
        file_name(name, "the stage")


@pytest.mark.parametrize(
    "name", ["a", "step-1", "kd-temperature=2,weight=0.5", "é_1", "con2", "a" * 200, "k@v+1"]
)
def test_other_names_pass(name: str) -> None:
    assert file_name(name, "the stage") == name


@given(name=st.text(max_size=300))
@settings(max_examples=300, deadline=None, derandomize=True)
def test_whatever_passes_is_one_part_of_a_path(name: str) -> None:
    try:
        file_name(name, "the stage")
    except FileError:
        return
    assert Path("/folder", name).resolve() == Path("/folder") / name
    assert Path(name).parts == (name,)


# -- procedures, methods, comparisons, teachers ------------------------------------------------------------------


@pytest.mark.parametrize("name", ["../../x", "/tmp/x", "a\0b", ""])
def test_parts_and_stages_of_a_procedure(name: str, tmp_path: Path) -> None:
    recipe = load_recipe({**RECIPE, "train": {"steps": 2, "batch_size": 8, "device": "cpu"}})
    nothing: Any = None
    work = Run(
        recipe,
        RUNTIME,
        nothing,
        nothing,
        lambda outputs: torch.nn.Linear(6, outputs),
        folder=tmp_path / "run",
    )
    with pytest.raises(FileError, match="the part"):
        work.once(name, dict)
    with pytest.raises(FileError, match="the stage"):
        work.trainer(name, torch.nn.Linear(6, 4), work.method("none"), rows())
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["../kd", "a/b", ".kd"])
def test_methods_of_a_package_from_elsewhere(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    package = types.ModuleType("from_elsewhere")
    package.CATALOGUE = {name: "method:Thing"}  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "from_elsewhere", package)
    with pytest.raises(catalogue.CatalogueError, match=r"the method .* cannot name a file"):
        list(catalogue._read("from_elsewhere"))


def test_folders_of_a_comparison_are_named_by_methods_and_their_options() -> None:
    options = {"name": "kd", "temperature": 2.0}
    plan = make_plan(RECIPE, ["none", options, {**options, "temperature": 3.0}], seeds=1)
    assert [file_name(label, "the label") for label in plan.options] == [
        "none",
        "kd-temperature=2.0",
        "kd-temperature=3.0",
    ]
    with pytest.raises(RecipeError, match="unknown method"):
        make_plan(RECIPE, ["../../kd"], seeds=1)


@pytest.mark.parametrize("name", ["../x", "a/b", "a b", "", "a\n"])
def test_names_of_teachers(name: str) -> None:
    with pytest.raises(RecipeError, match="teacher"):
        load_recipe({**RECIPE, "teacher": {name: {"model": "digits:mlp-8"}}})


@pytest.mark.parametrize("model", ["hf:../../x", "hf:/" + "deep/" * 100, "hf:a\\b\x00\x1b", "digits:mlp-8"])
def test_folders_of_teachers_that_are_trained_first(model: str) -> None:
    found = fingerprint(load_recipe({**RECIPE, "student": {"model": model}}))
    assert file_name(found, "the teacher") == found
    if model.startswith("digits"):
        assert found.startswith("digits-mlp-8-")


RECIPE: dict[str, Any] = {
    "data": {"path": "digits", "limit": 64, "validation": 32},
    "teacher": {"model": "digits:mlp-16"},
    "student": {"model": "digits:mlp-8"},
    "method": "kd",
    "train": {"steps": 4, "batch_size": 16, "device": "cpu", "threads": 1},
}
RUNTIME: Any = types.SimpleNamespace(is_main=True, device=torch.device("cpu"), rank=0, world=1)


# -- checkpoints --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["../../outside.safetensors", "/etc/passwd", "a/b.safetensors", "..", "a\0b", ""]
)
def test_files_that_a_manifest_names(name: str, tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    path = CheckpointFolder(folder, 1).save(Snapshot(1, {"student": {"w": torch.ones(2)}}, {}))
    (tmp_path / "outside.safetensors").write_bytes((path / "student.safetensors").read_bytes())
    content = json.loads((path / MANIFEST).read_text())
    del content["checksum"]
    content["files"][name] = content["files"].pop("student.safetensors")
    (path / MANIFEST).write_text(json.dumps(content | {"checksum": checksum(content)}))
    with pytest.raises(CheckpointError, match="no manifest"):
        CheckpointFolder(folder, 1).load(1)


@pytest.mark.parametrize("stem", ["../x", "a/b", "..", "", "a\0b"])
def test_names_of_groups_of_tensors(stem: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="cannot name a file"):
        CheckpointFolder(tmp_path / "checkpoints", 1).save(Snapshot(1, {stem: {"w": torch.ones(2)}}, {}))
    assert not list(tmp_path.rglob("*.safetensors"))


# -- links that lie where we write --------------------------------------------------------------------------------


@pytest.fixture
def precious(tmp_path: Path) -> Path:
    file = tmp_path / "precious"
    file.write_text("precious")
    return file


def test_a_lock_that_is_a_link(tmp_path: Path, precious: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".lock").symlink_to(precious)
    with pytest.raises(OSError, match="symbolic link"), FolderLock(tmp_path / "run"):
        pass
    assert precious.read_text() == "precious"


def test_a_file_beside_that_is_a_link(tmp_path: Path, precious: Path) -> None:
    (tmp_path / ".tmp-table.json").symlink_to(precious)
    write_text(tmp_path / "table.json", "{}")
    assert precious.read_text() == "precious"
    assert not (tmp_path / "table.json").is_symlink()
    assert read_object(tmp_path / "table.json") == {}


def test_a_recipe_is_not_copied_over_anything(tmp_path: Path, precious: Path) -> None:
    import typer

    (tmp_path / "link.yaml").symlink_to(tmp_path / "nothing.yaml")
    for target in (precious, tmp_path / "link.yaml"):
        with pytest.raises(typer.BadParameter, match="exists"):
            recipes("digits", copy=target)
    assert precious.read_text() == "precious"
    assert not (tmp_path / "nothing.yaml").exists()


# -- data ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["{outside}", "../secret.png", "/etc/hostname", "a\0b.png"])
def test_a_table_that_names_files_outside_of_the_data(
    path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import pyarrow
    import pyarrow.parquet
    from PIL import Image

    folder = tmp_path / "data"
    folder.mkdir()
    Image.new("L", (8, 8)).save(tmp_path / "secret.png")
    Image.new("L", (8, 8)).save(folder / "own.png")
    named = [{"bytes": None, "path": path.format(outside=tmp_path / "secret.png")}]
    own = [{"bytes": None, "path": str(folder / "own.png")}] * 19
    table = pyarrow.table({"image": own + named, "label": [i % 2 for i in range(20)]})
    pyarrow.parquet.write_table(table, folder / "train.parquet")
    monkeypatch.chdir(folder)
    with pytest.raises(DataError, match=r"row 19 .*(outside of the data|cannot be read)"):
        open_data(DataConfig(path=str(folder)), "classification").train.fetch(range(20))


@pytest.mark.parametrize("path", ["{folder}/data", "{folder}/link", "../data"])
def test_a_table_that_names_its_own_files(path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where these are links to elsewhere, which their owner has put there."""
    from PIL import Image

    for number in range(20):
        file = tmp_path / "data" / "train" / "ab"[number % 2] / f"{number}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (8, 8), number).save(tmp_path / f"{number}.png")
        file.symlink_to(tmp_path / f"{number}.png")
    (tmp_path / "link").symlink_to(tmp_path / "data")
    monkeypatch.chdir(tmp_path / "data")
    data = open_data(DataConfig(path=path.format(folder=tmp_path)), "classification")
    assert len(data.train.fetch(range(len(data.train)))) == 18
