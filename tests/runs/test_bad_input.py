"""What a user can get wrong, as the command line says it: what is wrong, its value, what to do; and nothing written."""

from __future__ import annotations

import csv
import io
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from typer.testing import CliRunner, Result

from tutelage.cli.app import app
from tutelage.data import Data, TensorSource, describe_rows
from tutelage.engine.finite import NonFiniteError
from tutelage.engine.taps import TapError
from tutelage.runs import distill

Edit = Callable[[Path], dict[str, Any]]


def recipe(**parts: Any) -> dict[str, Any]:
    """A run that would work, with whole parts replaced; a mapping changes keys of its part."""
    found: dict[str, Any] = {
        "data": {"path": "digits", "limit": 96, "validation": 32, "test": 100},
        "teacher": {"model": "digits:mlp-16"},
        "student": {"model": "digits:mlp-8"},
        "method": "kd",
        "train": {"steps": 6, "batch_size": 32, "device": "cpu", "threads": 1},
        "output": {"report": False},
    }
    for name, part in parts.items():
        found[name] = {**found[name], **part} if name in ("train", "output") else part
    return found


def typed(values: dict[str, Any] | str, folder: Path, *words: str) -> Result:
    """`tutelage run` of a recipe, or of text in its place."""
    file = folder / "recipe.yaml"
    file.write_text(values if isinstance(values, str) else yaml.safe_dump(values))
    line = ["run", str(file), "--dir", str(folder / "run"), "--no-progress", *words]
    return CliRunner().invoke(app, line, prog_name="tutelage", env={"COLUMNS": "200"})


def assert_refused(done: Result, code: int, *words: str) -> None:
    assert done.exit_code == code, done.output
    assert isinstance(done.exception, SystemExit), "a traceback"
    assert done.stdout == ""
    assert done.stderr.startswith("error: ")
    for word in words:
        assert word in done.stderr


def table(folder: Path, *, columns: str = "x,y,label,sex", rows: int = 120, **cells: str) -> str:
    """A CSV file; ``cells`` such as ``x7="nan"`` change the entry of column x in row 7."""
    generator = np.random.default_rng(0)
    path = folder / "table.csv"
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(columns.split(","))
        for i in range(rows):
            row = dict(
                zip("xy", generator.normal(size=2).round(3), strict=True), label=i % 3, sex="fm"[i % 2]
            )
            writer.writerow([cells.get(f"{name}{i}", row[name]) for name in columns.split(",")])
    return str(path)


def on_table(path: str, **data: Any) -> dict[str, Any]:
    rows = {"path": path, "features": ["x", "y"], "target": "label", "validation": 20, "test": 20}
    return recipe(data=rows | data)


def png(seed: int) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 255, (8, 8), dtype=np.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "PNG")
    return stream.getvalue()


def images(folder: Path, broken: str) -> dict[str, Any]:
    """A folder of images by class, of which one is cut off in the middle."""
    for i in range(40):
        for split in ("train", "test"):
            file = folder / "images" / split / "ab"[i % 2] / f"{i:03d}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(png(i) if f"{split}/{i}" != broken else png(i)[:70])
    return recipe(data={"path": str(folder / "images"), "validation": 4}, teacher=None, method="none")


def parquet(folder: Path, *, broken_row: int | None = None, broken_file: bool = False) -> dict[str, Any]:
    import pyarrow
    import pyarrow.parquet

    (folder / "parquet").mkdir()
    file = folder / "parquet" / "train-0.parquet"
    entries = [{"bytes": b"no image" if i == broken_row else png(i), "path": None} for i in range(40)]
    pyarrow.parquet.write_table(pyarrow.table({"image": entries, "label": [i % 2 for i in range(40)]}), file)
    if broken_file:
        file.write_bytes(file.read_bytes()[:-100])
    return recipe(data={"path": str(file.parent), "validation": 4}, teacher=None, method="none")


def weights(folder: Path, *, outputs: int = 10, nan: bool = False) -> dict[str, Any]:
    """A teacher whose weights lie in a file."""
    from tutelage.models import build_model

    state = build_model("digits:mlp-16", outputs=outputs, input_shape=(1, 8, 8)).module.state_dict()
    state["head.bias"] = state["head.bias"] * (float("nan") if nan else 1)
    save_file(state, folder / "teacher.safetensors")
    return {"model": "digits:mlp-16", "weights": str(folder / "teacher.safetensors")}


def written(folder: Path, text: str = "") -> str:
    (folder / "data.csv").write_text(text)
    return str(folder / "data.csv")


DATA: dict[str, tuple[Edit, list[str]]] = {
    "no such file": (lambda f: on_table(str(f / "nope.csv")), ["no file or folder", "nope.csv"]),
    "no such folder": (lambda f: recipe(data={"path": "./nope"}), ["no file or folder './nope'"]),
    "another kind of file": (lambda f: on_table(str(f / "recipe.yaml")), ["recipe.yaml", ".csv, .parquet"]),
    "zero bytes": (lambda f: on_table(written(f)), ["data.csv' is empty", "a header and rows"]),
    "a header alone": (lambda f: on_table(written(f, "x,y,label\n")), ["data.csv' has no rows"]),
    "a split that is not there": (lambda f: on_table(table(f), test="test"), ["no test split 'test'", "train"]),
    "a split that holds all": (lambda f: on_table(table(f), test=110), ["data.validation is 20", "none to train"]),
    "a target that is not there": (
        lambda f: on_table(table(f), target="lable"),
        ["data.target", "no column 'lable'", "x, y, label, sex", "did you mean 'label'?"],
    ),
    "a feature that is not there": (lambda f: on_table(table(f), features=["z"]), ["no column 'z'", "x, y"]),
    "a feature of text": (lambda f: on_table(table(f), features=["sex"]), ["'sex'", "no numbers but 'f'"]),
    "a label below 0": (
        lambda f: on_table(table(f, label9="-1")),
        ["row 9 of column 'label'", "the label -1", "0 to 2"],
    ),
    "a label between two": (lambda f: on_table(table(f, label9="1.5")), ["row 9", "1.5, no class id", "regression"]),
    "a missing label": (lambda f: on_table(table(f, label9="")), ["row 9 of column 'label'", "missing"]),
    "one class": (lambda f: on_table(table(f, rows=60, **{f"label{i}": "0" for i in range(60)})), ["1 class"]),
    "NaN": (lambda f: on_table(table(f, x7="nan")), ["row 7 of column 'x'", "is missing"]),
    "infinity": (lambda f: on_table(table(f, x7="inf")), ["row 7 of column 'x'", "is inf", "finite numbers"]),
    "beyond float32": (lambda f: on_table(table(f, x7="1e300")), ["row 7 of column 'x'", "1e+300"]),
    "an image cut off": (lambda f: images(f, "train/7"), ["row 23 of split 'train'", "b/007.png", "truncated"]),
    "a test image cut off": (lambda f: images(f, "test/7"), ["row 23 of split 'test'", "b/007.png", "mend"]),
    "bytes that are no image": (lambda f: parquet(f, broken_row=9), ["row 9 of split 'train'", "no known image"]),
    "a torn parquet file": (lambda f: parquet(f, broken_file=True), ["parquet' cannot be read", "corrupted"]),
    "a batch beyond the data": (lambda f: recipe(train={"batch_size": 97}), ["train.batch_size is 97", "at most 96"]),
}  # fmt: skip


@pytest.mark.parametrize("case", DATA)
def test_data(case: str, tmp_path: Path) -> None:
    make, words = DATA[case]
    assert_refused(typed(make(tmp_path), tmp_path), 2, *words)
    assert not (tmp_path / "run").exists()


def test_text_labels_are_classes(tmp_path: Path) -> None:
    """No error, but the sorted words."""
    done = typed(on_table(table(tmp_path), target="sex"), tmp_path, "--json")
    assert done.exit_code == 0, done.output
    assert yaml.safe_load(done.stdout)["data"]["outputs"] == 2


MODELS: dict[str, tuple[Edit, int, list[str]]] = {
    "another number of classes": (
        lambda f: recipe(teacher=weights(f, outputs=1000)),
        3,
        ["teacher `teacher` gives 1000 outputs, the data has 10 (digits)", "teacher: {recipe: …}"],
    ),
    "NaN in what the teacher says": (
        lambda f: recipe(teacher=weights(f, nan=True)),
        1,
        ["step 0: the term 'kd' is nan", "not finite: teacher teacher logits (rows "],
    ),
    "weights of another model": (
        lambda f: recipe(teacher=weights(f) | {"model": "digits:mlp-24"}),
        2,
        ["teacher.safetensors does not fit", "head.weight is [10, 16] there and [10, 24] here"],
    ),
    "no such run": (lambda f: recipe(teacher={"run": str(f)}), 2, ["teacher.run", "no student/", "finished run"]),
    "too many teachers": (
        lambda f: recipe(teacher={"a": {"model": "digits:mlp-8"}, "b": {"model": "digits:mlp-9"}}),
        2,
        ["takes one teacher, there are 2 (a, b)"],
    ),
    "no such model": (lambda f: recipe(student={"model": "digits:mpl-8"}), 2, ["unknown model 'digits:mpl-8'"]),
    "a tap that is not there": (
        lambda f: recipe(method={"name": "fitnet", "student_tap": "layer9"}),
        2,
        ["student: tap 'layer9' names no module", "near: layer1"],
    ),
    "no such metric": (lambda f: recipe(evaluation={"best": "acc"}), 2, ["evaluation.best is 'acc'", "accuracy"]),
    "no such column": (
        lambda f: on_table(table(f), columns=["sex"]) | {"evaluation": {"group_by": "sexx"}},
        2,
        ["evaluation.group_by is 'sexx'", "did you mean 'sex'?"],
    ),
    "a column that does not travel": (
        lambda f: on_table(table(f)) | {"evaluation": {"group_by": "sex"}},
        2,
        ["evaluation.group_by is 'sex'", "name it in data.columns too: [sex]"],
    ),
    "an unknown optimiser": (lambda f: recipe(train={"optimizer": {"name": "adamm"}}), 2, ["'adamm'", "adamw"]),
}  # fmt: skip


@pytest.mark.parametrize("case", MODELS)
def test_models_and_names(case: str, tmp_path: Path) -> None:
    make, code, words = MODELS[case]
    assert_refused(typed(make(tmp_path), tmp_path), code, *words)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", ["the recipe is empty", "tutelage recipes"]),
        ("# nothing but this\n", ["the recipe is empty"]),
        ("- a\n- b\n", ["a recipe is a mapping", '["a", "b"]']),
        ("hello", ["a recipe is a mapping", '"hello"']),
        ("a: [1, 2\nb: {", ["line 2, column 2"]),
        ("method: kd\nmethod: nkd\n", ["line 2, column 1: the key 'method' comes twice"]),
        ("method: !!python/object/apply:os.system [ls]\n", ["line 1"]),
    ],
    ids=["empty", "comment", "list", "word", "no YAML", "twice", "code"],
)
def test_a_file_that_is_no_recipe(text: str, words: list[str], tmp_path: Path) -> None:
    assert_refused(typed(text, tmp_path), 2, "recipe.yaml: 1 error", *words)
    assert not (tmp_path / "run").exists()


def test_all_errors_of_a_recipe_at_once(tmp_path: Path) -> None:
    wrong = recipe(
        method="kdd", train={"epoch": 3, "clip": 0}, evalution={}, data={"path": "digits", "noise": -1}
    )
    done = typed(wrong, tmp_path, "student.modell=x", "nonsense")
    words = ["7 errors", "'kdd'", "train.epoch: ", "train.clip: got 0", "evalution: ", "data.noise: got -1"]
    assert_refused(done, 2, *words, "student.modell: unknown key; did you mean model?", "override 'nonsense'")
    assert not (tmp_path / "run").exists()


def rows(count: int = 64, **changed: Tensor) -> Data:
    """Rows from Python, which nobody has looked at yet."""
    generator = torch.Generator().manual_seed(0)
    inputs = torch.rand(count, 1, 8, 8, generator=generator)
    source = TensorSource(changed.get("inputs", inputs), changed.get("target", torch.arange(count) % 10))
    clean = TensorSource(inputs, torch.arange(count) % 10)
    return Data(source, clean, clean, describe_rows(clean, 10), {"path": "python"})


def test_labels_of_rows_from_python(tmp_path: Path) -> None:
    """Of all rows, not those of the first batch alone."""
    target = (torch.arange(64) % 10).index_fill(0, torch.tensor(50), 12)
    with pytest.raises(ValueError, match=r"label of row 50 is 12; allowed: 0 to 9 \(10 classes\)"):
        distill(recipe(), data=rows(target=target), folder=tmp_path / "run", progress=False)
    assert not (tmp_path / "run").exists()


def test_a_tap_that_never_fires(tmp_path: Path) -> None:
    class Idle(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.idle, self.head = nn.Linear(64, 8), nn.Linear(8, 8), nn.Linear(8, 10)

        def forward(self, inputs: Tensor) -> Tensor:
            logits: Tensor = self.head(self.body(inputs.flatten(1)))
            return logits

    method = {"name": "fitnet", "student_tap": "idle", "teacher_tap": "layer1"}
    with pytest.raises(TapError, match="idle"):
        distill(recipe(method=method), student=Idle(), folder=tmp_path / "run", progress=False)
    assert not (tmp_path / "run").exists()


def test_a_loss_that_becomes_nan_leaves_the_weights_alone(tmp_path: Path) -> None:
    """Only row 50 is bad; the run goes well until it is drawn."""

    class Watch:
        def on_step_start(self, trainer: Any) -> None:
            self.step = trainer.step
            self.before = {name: value.clone() for name, value in trainer.student.model.state_dict().items()}
            self.model = trainer.student.model

    inputs = rows().train.fetch(range(64)).inputs
    assert isinstance(inputs, Tensor)
    inputs[50] = float("nan")
    watch = Watch()
    values = recipe(train={"batch_size": 4, "checkpoint": {"every": 1}})
    with pytest.raises(
        NonFiniteError, match=r"the term 'label' is nan.*not finite: inputs \(rows 50\)"
    ) as caught:
        distill(values | {"train": values["train"] | {"steps": 16}}, data=rows(inputs=inputs),
                folder=tmp_path / "run", progress=False, callbacks=[watch])  # fmt: skip
    assert (caught.value.step, caught.value.term) == (watch.step, "label")
    assert watch.step > 0, "the first batch has it: take another row"
    for name, value in watch.model.state_dict().items():
        assert torch.equal(value, watch.before[name])
    newest = sorted((tmp_path / "run" / "checkpoints").glob("step-*"))[-1]
    saved = load_file(newest / "student.safetensors")
    assert all(torch.equal(value, watch.before[name]) for name, value in saved.items())


# Folders.


def test_a_folder_below_a_file(tmp_path: Path) -> None:
    done = typed(recipe(), tmp_path, "--dir", str(tmp_path / "recipe.yaml" / "run"))
    assert_refused(done, 2, "recipe.yaml is a file", "another output.dir")
    assert_refused(
        typed(recipe(), tmp_path, "--dir", str(tmp_path / "recipe.yaml")), 2, "is a file; give a folder"
    )


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_permission(tmp_path: Path) -> None:
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o500)
    assert_refused(typed(recipe(), tmp_path, "--dir", str(closed / "run")), 2, "no permission", str(closed))


def test_a_checkpoint_of_another_recipe(tmp_path: Path) -> None:
    assert typed(recipe(), tmp_path).exit_code == 0
    kept = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    done = typed(recipe(student={"model": "digits:mlp-9"}), tmp_path, "--resume")
    assert_refused(done, 2, "holds a run of another recipe (student.model differs)", "another output.dir")
    assert_refused(typed(recipe(), tmp_path), 2, "already holds this run", "tutelage resume")
    assert kept == {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}


def test_every_checkpoint_is_damaged(tmp_path: Path) -> None:
    """One that is damaged is passed over (see test_distill); where none is left nothing is begun anew in silence."""
    assert typed(recipe(), tmp_path).exit_code == 0
    (tmp_path / "run" / "result.json").unlink()
    for file in (tmp_path / "run" / "checkpoints").glob("step-*/student.safetensors"):
        file.write_bytes(file.read_bytes()[:100])
    done = typed(recipe(), tmp_path, "--resume")
    assert_refused(
        done, 1, "no checkpoint in", "student.safetensors has 100 bytes, not", "Start the run anew"
    )


def test_two_runs_into_one_folder_at_once(tmp_path: Path) -> None:
    """A real second process; the first goes on undisturbed."""
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(recipe(train={"steps": 100_000})))
    command = [
        sys.executable,
        "-m",
        "tutelage",
        "run",
        str(file),
        "--dir",
        str(tmp_path / "run"),
        "--no-progress",
    ]
    first = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        while not (tmp_path / "run" / "metrics.jsonl").exists():
            assert first.poll() is None, first.communicate()[1]
            time.sleep(0.01)
        done = typed(recipe(train={"steps": 100_000}), tmp_path, "--resume")
        assert_refused(
            done, 1, f"{tmp_path / 'run'} is in use by pid {first.pid} on ", "choose another output.dir"
        )
        assert first.poll() is None
    finally:
        first.kill()
        first.communicate()
    litter = {path.name for path in (tmp_path / "run").iterdir() if path.name.startswith(".tmp")}
    assert litter <= {".tmp-metrics.jsonl"}


def test_what_a_run_leaves_beside_its_files(tmp_path: Path) -> None:
    """Done, failed, or stopped and resumed: no half-written file, and of the lock its file alone."""
    from killing import stop_after

    distill(recipe(), folder=tmp_path / "done", progress=False)
    stop_after(
        3, lambda kill: distill(recipe(), folder=tmp_path / "killed", progress=False, callbacks=[kill])
    )
    for name in ("recipe.yaml", "metrics.jsonl", "result.json"):
        (tmp_path / "killed" / f".tmp-{name}").write_text("half of it")
    distill(recipe(), folder=tmp_path / "killed", progress=False, resume=True)
    for folder in ("done", "killed"):
        hidden = [path.name for path in (tmp_path / folder).rglob(".*")]
        assert hidden == [".lock"]
