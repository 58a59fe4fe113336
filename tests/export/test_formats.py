"""Every format answers as the student does, without tutelage; what does not is not written."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from conftest import RECIPE, train
from tutelage.cli.complete import FORMATS as OFFERED
from tutelage.engine.quantize import Kind, prepare
from tutelage.export import plain, program
from tutelage.export.errors import CheckFailedError, ExportError
from tutelage.export.reading import load_program, read_metadata
from tutelage.export.run import FORMATS, export_run
from tutelage.export.subject import open_subject
from tutelage.models import ModelError, build_model
from tutelage.runs import distill

FLOATS = ["safetensors", "torch", "onnx"]

ALONE = """
import json, sys
sys.modules["tutelage"] = None          # whoever imports it fails
import numpy, torch
from safetensors.torch import load_file
given = load_file(sys.argv[1])
rows, normal = given["rows"], given["normal"]
answers = {}
answers["pt2"] = torch.export.load(sys.argv[4] + "/model.pt2").module()(rows)
answers["int4"] = torch.export.load(sys.argv[4] + "/model.int4.pt2").module()(rows)
assert not [name for name in sys.modules if name.startswith("torchao")]
import timm, transformers
answers["timm"] = timm.create_model("local-dir:" + sys.argv[2], pretrained=True).eval()(normal)
model = transformers.AutoModelForImageClassification.from_pretrained(sys.argv[3])
answers["transformers"] = model.eval()(normal).logits
import torchao.quantization.pt2e
answers["int8"] = torch.export.load(sys.argv[4] + "/model.int8.pt2").module()(rows)
import onnxruntime
for name in ("onnx", "int8.onnx"):
    session = onnxruntime.InferenceSession(sys.argv[4] + "/model." + name, providers=["CPUExecutionProvider"])
    answers[name] = torch.from_numpy(session.run(None, {"inputs": rows.numpy()})[0])
print(json.dumps({name: answer.tolist() for name, answer in answers.items()}))
"""


@pytest.fixture(scope="module")
def made(cnn_run: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Every format of one run."""
    return export_run(cnn_run, list(FORMATS), out=tmp_path_factory.mktemp("made") / "all")


def expected(run: Path, rows: Tensor) -> Tensor:
    with torch.no_grad():
        logits: Tensor = open_subject(run).model(rows)
    return logits


def test_every_format_runs_in_a_process_without_tutelage(
    made: dict[str, Any], cnn_run: Path, timm_run: Path, hf_run: Path, tmp_path: Path
) -> None:
    subject = open_subject(cnn_run)
    rows = subject.rows[:5]
    mean, std = subject.built.mean, subject.built.std
    assert mean
    assert std
    normal = (rows - torch.tensor(mean).view(-1, 1, 1)) / torch.tensor(std).view(-1, 1, 1)
    save_file({"rows": rows, "normal": normal.contiguous()}, tmp_path / "rows.safetensors")
    folders = [
        export_run(run, ["safetensors"], out=tmp_path / run.name)["folder"] for run in (timm_run, hf_run)
    ]
    command = [sys.executable, "-c", ALONE, str(tmp_path / "rows.safetensors"), *folders, made["folder"]]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = {name: torch.tensor(answer) for name, answer in json.loads(done.stdout.splitlines()[-1]).items()}
    ours = expected(cnn_run, rows)
    torch.testing.assert_close(found["timm"], expected(timm_run, rows), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(found["transformers"], expected(hf_run, rows), atol=1e-5, rtol=1e-4)
    for name in ("pt2", "onnx"):
        torch.testing.assert_close(found[name], ours, atol=1e-4, rtol=1e-4)
    for name in ("int4", "int8", "int8.onnx"):
        error = (found[name] - ours).abs().mean() / ours.abs().mean()
        assert 1e-5 < error < 0.3, (name, error)


@pytest.mark.parametrize("file", ["model.pt2", "model.onnx", "model.int4.pt2", "model.int8.onnx"])
def test_files_say_what_they_take_and_hold_no_row_of_the_data(made: dict[str, Any], file: str) -> None:
    path = Path(made["folder"]) / file
    if path.suffix == ".pt2":
        found = read_metadata(path)
        assert torch.export.load(path).example_inputs is None
    else:
        model = onnx.load(str(path))
        onnx.checker.check_model(model)
        (entry,) = [entry for entry in model.metadata_props if entry.key == "tutelage.json"]
        found = json.loads(entry.value)
        assert model.graph.input[0].type.tensor_type.shape.dim[0].dim_param
    assert found["normalisation"]["inside"] is True
    assert found["input"] == {
        "name": "inputs",
        "dtype": "float32",
        "shape": ["batch", 1, 8, 8],
        "range": "[0, 1]",
    }
    assert found["classes"] == [str(digit) for digit in range(10)]
    assert (found["quantised"] is None) == (file in ("model.pt2", "model.onnx"))


def test_the_record_holds_every_check_and_what_was_quantised(made: dict[str, Any]) -> None:
    kept = json.loads((Path(made["folder"]) / "export.json").read_text())
    assert list(kept["formats"]) == list(FORMATS) == list(OFFERED)
    assert 0.5 < kept["float_metrics"]["accuracy"] <= 1
    for name, entry in kept["formats"].items():
        assert entry["checked_on"] == "test rows"
        assert entry["check"]["rows"] == 64
        assert entry["bytes"] == sum((Path(made["folder"]) / file).stat().st_size for file in entry["files"])
        if name in FLOATS:
            assert entry["check"]["agreement"] == 1
        else:
            assert entry["check"]["signal_db"] > 6
            assert 0.3 < entry["quantised"]["parameters"] < 1
            assert abs(entry["metrics"]["accuracy"] - kept["float_metrics"]["accuracy"]) < 0.2
    assert kept["formats"]["int4"]["quantised"]["left"] == ["layer1.0"]
    assert kept["formats"]["int8"]["quantised"]["left"] == []


@pytest.mark.parametrize("method", ["fitnet", {"name": "crd", "negatives": 64}, "ofakd"])
def test_the_student_alone_ships(method: Any, tmp_path: Path) -> None:
    short = RECIPE["train"] | {"epochs": None, "steps": 2}
    run = train(tmp_path / "run", method=method, teacher={"model": "digits:cnn-8-8"}, train=short)
    made = export_run(run, ["safetensors"])
    plain = build_model("digits:cnn-16-16", outputs=10, input_shape=(1, 8, 8)).module
    with safe_open(Path(made["folder"]) / "model.safetensors", framework="pt") as opened:
        assert set(opened.keys()) == set(plain.state_dict())


def test_a_student_from_python_is_exported_where_its_architecture_is_given(tmp_path: Path) -> None:
    def net() -> nn.Module:
        return nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))

    run = distill(
        RECIPE | {"method": "none", "teacher": None}, student=net(), folder=tmp_path / "run", progress=False
    )
    with pytest.raises(ModelError, match="from Python"):
        export_run(run.folder, ["torch"])
    made = export_run(run.folder, ["torch", "safetensors"], student=net())
    rows = open_subject(run.folder, net()).rows
    found = torch.export.load(Path(made["folder"]) / "model.pt2").module()(rows)
    torch.testing.assert_close(found, open_subject(run.folder, run.student).model(rows))


def test_a_file_that_answers_otherwise_is_an_error_and_leaves_nothing(
    cnn_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(program, "load_program", lambda file: lambda rows: load_program(file)(rows) + 0.01)
    with pytest.raises(CheckFailedError, match=r"model\.pt2: its logits differ"):
        export_run(cnn_run, ["safetensors", "torch"], out=tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_weights_that_are_not_the_students_are_refused(cnn_run: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(cnn_run, run)
    subject = open_subject(run)
    extra = dict(subject.built.module.state_dict()) | {"projector.weight": torch.ones(2, 2)}
    save_file(extra, run / "student" / "model.safetensors")
    with pytest.raises(CheckFailedError, match=r"projector\.weight"):
        plain.write(subject, tmp_path)


def test_without_its_data_a_run_is_checked_on_random_rows_and_that_is_said(
    cnn_run: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(cnn_run, run)
    recipe = run / "recipe.yaml"
    recipe.write_text(recipe.read_text().replace("path: digits", f"path: {tmp_path / 'gone'}"))
    made = export_run(run, ["torch"])
    assert made["formats"]["torch"]["checked_on"].startswith("random rows, since the data cannot be had")
    with pytest.raises(ExportError, match="training rows"):
        export_run(run, ["int8"])


def test_a_second_export_adds_to_the_first(cnn_run: Path, tmp_path: Path) -> None:
    export_run(cnn_run, ["safetensors"], out=tmp_path / "out")
    made = export_run(cnn_run, ["save_pretrained", "torch"], out=tmp_path / "out")
    kept = json.loads((tmp_path / "out" / "export.json").read_text())["formats"]
    assert set(kept) == set(made["formats"]) == {"safetensors", "torch"}
    (tmp_path / "out" / "model.pt2").unlink()
    export_run(cnn_run, ["safetensors"], out=tmp_path / "out")
    assert set(json.loads((tmp_path / "out" / "export.json").read_text())["formats"]) == {"safetensors"}


def test_what_cannot_be_exported_is_refused_before_anything_is_written(
    cnn_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ExportError, match="did you mean 'onnx'"):
        export_run(cnn_run, ["onx"])
    with pytest.raises(FileNotFoundError, match="no finished run"):
        export_run(tmp_path, ["torch"])
    with pytest.raises(ExportError, match="not empty and holds no export"):
        export_run(cnn_run, ["torch"], out=cnn_run / "student")
    monkeypatch.setitem(sys.modules, "onnx", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"tutelage\[export\]"):
        export_run(cnn_run, ["onnx"])
    assert not (cnn_run / "export").exists()


@pytest.mark.parametrize("to", ["int4", "int8"])
def test_a_student_taught_with_rounding_is_exported_as_it_was_measured(to: Kind, tmp_path: Path) -> None:
    taught = RECIPE["train"] | {"quantize": to}
    student = {"model": "digits:mlp-64-32"}
    run = train(tmp_path / "run", student=student, method="none", teacher=None, train=taught)
    measured = json.loads((run / "result.json").read_text())["test"]
    made = export_run(run, [to])
    subject = open_subject(run)
    plain_answers = subject.model(subject.rows)
    prepare(subject.built.module, to)
    rounded = subject.model(subject.rows)
    assert not torch.equal(rounded, plain_answers)
    file = Path(made["folder"]) / made["formats"][to]["files"][0]
    found = load_program(file)(subject.rows)
    if to == "int4":
        # The file holds the very numbers of the training.
        torch.testing.assert_close(found, rounded, atol=1e-4, rtol=1e-4)
        assert made["formats"][to]["metrics"]["accuracy"] == measured["accuracy"]
    else:
        # One range an activation in the file, one a row in training.
        assert (found - rounded).norm() < 0.05 * rounded.norm()
        assert made["formats"][to]["metrics"]["accuracy"] == pytest.approx(measured["accuracy"], abs=0.02)
