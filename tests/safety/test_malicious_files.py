"""Pickles put in the place of every file that is read: each is refused in our own words, and none of them runs."""

from __future__ import annotations

import io
import json
import pickle
import shutil
import tarfile
import warnings
import zipfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from contract import recipe, run
from malice import FORMS, Evil, pickled

from killing import stop_after
from tutelage.data import open_data
from tutelage.data.source import DataError
from tutelage.engine.checkpoint import CheckpointError, CheckpointFolder
from tutelage.engine.checkpoint_files import MANIFEST, checksum, synced
from tutelage.export.archive import refuse_pickles
from tutelage.export.errors import ExportError
from tutelage.export.reading import load_program
from tutelage.models import ModelError, build_model, load_model, save_model
from tutelage.procedures.run import _read_tensors
from tutelage.recipe import RecipeError, load_recipe
from tutelage.recipe.schema import DataConfig, ModelConfig
from tutelage.report import write_report
from tutelage.runs import check, resume
from tutelage.runs.cache import cache
from tutelage.teachers.manifest import StoreError
from tutelage.teachers.store import verify
from tutelage.untrusted import FileError, read_object


@pytest.fixture
def mark(tmp_path: Path) -> Iterator[Path]:
    """Where an unpickled file would leave its mark; no test may."""
    found = tmp_path / "mark"
    yield found
    assert not found.exists(), "something was unpickled"


def test_the_mark_is_left_where_something_is_unpickled(tmp_path: Path) -> None:
    for form in FORMS:
        place = tmp_path / form
        content = pickled(place, form)
        pickle.loads(content) if form == "pickle" else torch.load(io.BytesIO(content), weights_only=False)
        assert place.exists(), form


# -- checkpoints --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was killed at step 5 of 6; it has checkpoints of the steps 2 and 4."""
    folder = tmp_path_factory.mktemp("stopped") / "run"
    stop_after(5, lambda kill: run("fitnet", folder, callbacks=[kill]))
    return folder


def sealed(checkpoint: Path) -> None:
    """Make the manifest agree with the files, as one who can compute a checksum would."""
    content = json.loads((checkpoint / MANIFEST).read_text())
    del content["checksum"]
    for name in content["files"]:
        content["files"][name] = synced(checkpoint / name).model_dump()
    (checkpoint / MANIFEST).write_text(json.dumps(content | {"checksum": checksum(content)}))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("with_checksum", [False, True])
def test_a_checkpoint(form: str, with_checksum: bool, stopped: Path, tmp_path: Path, mark: Path) -> None:
    folder = shutil.copytree(stopped, tmp_path / "run")
    checkpoints = sorted((folder / "checkpoints").glob("step-*"))
    files = sorted(path.name for path in checkpoints[-1].iterdir())
    assert {"manifest.json", "state.json", "student.safetensors", "method.safetensors"} <= set(files)
    for name in files:
        if with_checksum and name == "manifest.json":
            continue
        kept = (checkpoints[-1] / name).read_bytes()
        manifest = (checkpoints[-1] / "manifest.json").read_bytes()
        (checkpoints[-1] / name).write_bytes(pickled(mark, form))
        if with_checksum:
            sealed(checkpoints[-1])
        with _refused_or_passed_over(with_checksum):
            assert CheckpointFolder(folder / "checkpoints", 3).latest().step == 2  # type: ignore[union-attr]
        (checkpoints[-1] / "manifest.json").write_bytes(manifest)
        (checkpoints[-1] / name).write_bytes(kept)
    for checkpoint in checkpoints:
        (checkpoint / "student.safetensors").write_bytes(pickled(mark, form))
    with pytest.raises(CheckpointError, match="Start the run anew"):
        resume(folder, progress=False)


def _refused_or_passed_over(with_checksum: bool) -> Any:
    """What nobody could have written is an error; what was damaged later is passed over."""
    if with_checksum:
        return pytest.raises(CheckpointError, match="is damaged")
    return pytest.warns(UserWarning, match="going back to step 2")


# -- weights and models -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    "name", ["model.safetensors", "model.bin", "model.pt", "model.pth", "model.ckpt", "model.pkl"]
)
@pytest.mark.parametrize("model", ["digits:mlp-8", "timm:test_resnet", "hf:{folder}"])
def test_a_file_of_weights(name: str, form: str, model: str, tmp_path: Path, mark: Path) -> None:
    (tmp_path / name).write_bytes(pickled(mark, form))
    refused(hf_config(tmp_path, model), str(tmp_path / name))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.safetensors", "last.ckpt"])
@pytest.mark.parametrize("model", ["digits:mlp-8", "timm:test_resnet", "hf:{folder}"])
def test_a_folder_of_weights(name: str, form: str, model: str, tmp_path: Path, mark: Path) -> None:
    folder = tmp_path / "weights"
    folder.mkdir()
    (folder / name).write_bytes(pickled(mark, form))
    refused(hf_config(tmp_path, model), str(folder))


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.safetensors"])
@pytest.mark.parametrize("model", ["digits:mlp-8", "timm:test_resnet", "hf:{folder}"])
def test_a_repository_of_the_hub(
    name: str, model: str, tmp_path: Path, mark: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub.constants as hub

    snapshot = tmp_path / "cache" / "models--some--model" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (snapshot.parent.parent / "refs").mkdir()
    (snapshot.parent.parent / "refs" / "main").write_text("abc")
    (snapshot / name).write_bytes(pickled(mark))
    monkeypatch.setattr(hub, "HF_HUB_CACHE", str(tmp_path / "cache"))
    refused(hf_config(tmp_path, model), "hub:some/model")


@pytest.mark.parametrize(
    "name", ["pytorch_model.bin", "model.safetensors", "pytorch_model-00001-of-00001.bin"]
)
def test_a_local_model_of_transformers(name: str, tmp_path: Path, mark: Path) -> None:
    model = hf_config(tmp_path, "hf:{folder}")
    folder = tmp_path / "hf"
    (folder / name).write_bytes(pickled(mark, "zip"))
    if "of" in name:
        (folder / "pytorch_model.bin.index.json").write_text(
            json.dumps({"metadata": {}, "weight_map": {"vit.embeddings.cls_token": name}})
        )
    refused(model, "pretrained")


@pytest.mark.parametrize("option", ["checkpoint_path", "pretrained", "pretrained_cfg", "cache_dir"])
def test_an_option_that_would_load_a_file(option: str, tmp_path: Path, mark: Path) -> None:
    (tmp_path / "model.pth").write_bytes(pickled(mark, "legacy"))
    options: dict[str, Any] = {option: str(tmp_path / "model.pth")}
    with pytest.raises(ModelError, match=f"no option '{option}'"):
        build_model(
            ModelConfig(model="timm:test_resnet", options=options), outputs=10, input_shape=(3, 32, 32)
        )


def hf_config(tmp_path: Path, model: str) -> str:
    """The model's name; ``{folder}`` is a folder with the configuration of a tiny vision transformer."""
    if "{folder}" not in model:
        return model
    transformers = pytest.importorskip("transformers")
    folder = tmp_path / "hf"
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}
    transformers.ViTConfig(image_size=32, patch_size=16, **sizes).save_pretrained(folder)
    return model.format(folder=folder)


def refused(model: str, weights: str) -> None:
    shape = (1, 8, 8) if model.startswith("digits") else (3, 32, 32)
    with pytest.raises(ModelError):
        build_model(ModelConfig(model=model, weights=weights), outputs=10, input_shape=shape)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", ["model.safetensors", "tutelage.json", "config.json"])
def test_a_saved_student(name: str, form: str, tmp_path: Path, mark: Path) -> None:
    folder = tmp_path / "run" / "student"
    save_model(build_model("digits:mlp-8", outputs=10, input_shape=(1, 8, 8)), folder)
    (folder / name).write_bytes(pickled(mark, form))
    with pytest.raises(ModelError):
        load_model(folder)
    teacher = {
        "data": {"path": "digits"},
        "teacher": {"run": str(folder.parent)},
        "student": {"model": "digits:mlp-4"},
    }
    with pytest.raises(ModelError):
        check(teacher | {"method": "kd", "train": {"steps": 1, "batch_size": 8, "device": "cpu"}})


# -- stores of teacher outputs ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("stored") / "store"
    cache(recipe("kd"), folder, progress=False)
    return folder


@pytest.mark.parametrize("form", FORMS)
def test_a_store(form: str, stored: Path, tmp_path: Path, mark: Path) -> None:
    folder = shutil.copytree(stored, tmp_path / "store")
    names = [path.name for path in folder.iterdir() if path.suffix in (".json", ".safetensors")]
    assert {"manifest.json", "rows.safetensors"} < set(names)
    notes = {name for name in names if name.endswith(".json") and name != "manifest.json"}
    """Which a finished store is read without."""
    for name in names:
        kept = (folder / name).read_bytes()
        (folder / name).write_bytes(pickled(mark, form))
        with suppress(StoreError, FileError):  # what is wrong may be found by either
            check(recipe("kd") | {"teacher": {"store": str(folder)}})
            found = any(problem for _, problem in verify(folder))
            assert found or name in notes, name
        (folder / name).write_bytes(kept)


# -- programs -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("program") / "model.pt2"
    exported = torch.export.export(torch.nn.Linear(2, 2), (torch.zeros(1, 2),))
    exported.example_inputs = None
    torch.export.save(exported, file)
    return file


def as_pickled(content: bytes) -> bytes:
    config = json.loads(content)
    next(iter(config["config"].values()))["use_pickle"] = True
    return json.dumps(config).encode()


def with_object(content: bytes) -> bytes:
    entry = {"path_name": "opaque_obj_0", "is_param": False, "use_pickle": True, "tensor_meta": None}
    return json.dumps({"config": {"evil": entry}}).encode()


@pytest.mark.parametrize(
    ("replaced", "change", "added"),
    [
        ("weights/model_weights_config.json", as_pickled, None),
        ("constants/model_constants_config.json", with_object, "data/constants/opaque_obj_0"),
        ("constants/model_constants_config.json", with_object, "data/constants/custom_obj_0"),
        ("sample_inputs/model.pt", None, None),
        (None, None, "data/weights/model.pt"),
        (None, None, "data/constants/model.pt"),
        (None, None, "data/aotinductor/model/code.so"),
        (None, None, "data/weights/weight_0"),
    ],
)
def test_an_exported_program(
    replaced: str | None,
    change: Callable[[bytes], bytes] | None,
    added: str | None,
    program: Path,
    tmp_path: Path,
    mark: Path,
) -> None:
    evil = tmp_path / "model.pt2"
    with zipfile.ZipFile(program) as archive, zipfile.ZipFile(evil, "w") as made:
        root = archive.namelist()[0].partition("/")[0]
        for name in archive.namelist():
            content = archive.read(name)
            if replaced is not None and name.endswith(replaced):
                content = change(content) if change else pickled(mark, "zip")
            if replaced is not None and change is as_pickled and name.endswith("weight_0"):
                content = pickled(mark, "zip")
            made.writestr(name, content)
        if added is not None:
            with warnings.catch_warnings(action="ignore"):  # of a name that comes twice
                made.writestr(f"{root}/{added}", pickled(mark, "zip"))
    with pytest.raises(ExportError, match=r"never unpickled|two files of one name"):
        load_program(evil)


def test_a_whole_program_is_let_through_and_another_file_is_not(
    program: Path, tmp_path: Path, mark: Path
) -> None:
    refuse_pickles(program)
    (tmp_path / "model.pt2").write_bytes(pickled(mark))
    with pytest.raises(ExportError, match=r"no archive of torch\.export"):
        load_program(tmp_path / "model.pt2")


# -- data ---------------------------------------------------------------------------------------------------------


def tar(folder: Path, mark: Path) -> None:
    with tarfile.open(folder / "train.tar", "w") as archive:
        for number in range(3):
            for ending in ("npy", "npz", "pickle", "pkl", "pth", "pyd", "ten"):
                entry = tarfile.TarInfo(f"{number}.{ending}")
                content = pickled(mark, "zip" if ending == "pth" else "pickle")
                entry.size = len(content)
                archive.addfile(entry, io.BytesIO(content))


def objects(folder: Path, mark: Path) -> None:
    np.save(folder / "train.npy", np.array([Evil(mark)], dtype=object), allow_pickle=True)


def script(folder: Path, mark: Path) -> None:
    (folder / f"{folder.name}.py").write_text(f"from pathlib import Path\nPath({str(mark)!r}).touch()\n")
    (folder / "train.csv").write_text("x,label\n" + "1,0\n2,1\n" * 30)


def card(folder: Path, mark: Path) -> None:
    (folder / "x.pkl").write_bytes(pickled(mark))
    (folder / "README.md").write_text("---\nconfigs:\n- config_name: default\n  data_files: x.pkl\n---\n")


def tagged_card(folder: Path, mark: Path) -> None:
    (folder / "train.csv").write_text("x,label\n" + "1,0\n2,1\n" * 30)
    tag = f'!!python/object/apply:os.system ["touch {mark}"]'
    (folder / "README.md").write_text(f"---\nconfigs: {tag}\n---\n")


ENDINGS = ("pkl", "npy", "pt", "joblib", "h5", "arrow", "parquet", "csv", "json", "lance", "txt")


@pytest.mark.parametrize(
    "make",
    [tar, objects, script, card, tagged_card, *ENDINGS],
    ids=lambda make: getattr(make, "__name__", make),
)
def test_a_folder_of_data(make: Any, tmp_path: Path, mark: Path) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    if isinstance(make, str):
        (folder / f"train.{make}").write_bytes(pickled(mark))
    else:
        make(folder, mark)
    with pytest.raises(DataError, match=r"data\.path"):
        open_data(DataConfig(path=str(folder), features=("x",), target="label"), "classification")


@pytest.mark.parametrize("kind", ["pandas", "csv", "webdataset"])
def test_a_kind_of_files_in_place_of_data(
    kind: str, tmp_path: Path, mark: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The library would read whatever lies in the current folder."""
    (tmp_path / "train.pkl").write_bytes(pickled(mark))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match="a kind of files"):
        open_data(DataConfig(path=kind), "classification")


# -- recipes and the files of a run ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "tag", ["object/apply:os.system", "object/new:os.system", "module:os", "name:os.system", "tuple"]
)
def test_a_recipe(tag: str, tmp_path: Path, mark: Path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(f'data: {{path: digits}}\nmethod: !!python/{tag} ["touch {mark}"]\n')
    with pytest.raises(RecipeError, match="could not determine a constructor"):
        load_recipe(file)


@pytest.mark.parametrize(
    "name", ["result.json", "metrics.jsonl", "recipe.yaml", "environment.json", "analysis.json"]
)
def test_a_run_that_is_reported(name: str, stopped: Path, tmp_path: Path, mark: Path) -> None:
    folder = shutil.copytree(stopped, tmp_path / "run")
    (folder / name).write_bytes(pickled(mark))
    assert name.partition(".")[0] in write_report([folder]).read_text(encoding="utf-8")


def test_a_part_of_a_procedure(tmp_path: Path, mark: Path) -> None:
    (tmp_path / "part.json").write_bytes(pickled(mark))
    (tmp_path / "part.safetensors").write_bytes(pickled(mark))
    with pytest.raises(FileError, match="damaged"):
        read_object(tmp_path / "part.json")
    with pytest.raises(FileError, match="damaged"):
        _read_tensors(tmp_path / "part.safetensors")
