"""`tutelage bench`: models side by side, each in a process of its own."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner

from tutelage.cli.app import app
from tutelage.export.bench import BenchError, bench
from tutelage.export.errors import ExportError
from tutelage.export.run import export_run
from tutelage.export.targets import find_targets

QUICK = ["--rounds", "1", "--threads", "1", "--json"]


@pytest.fixture(scope="module")
def run(cnn_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bench") / "run"
    shutil.copytree(cnn_run, folder)
    export_run(folder, ["torch", "onnx"])
    return folder


def test_a_run_stands_for_its_teacher_its_student_and_its_exports(run: Path) -> None:
    done = CliRunner().invoke(app, ["bench", str(run), *QUICK])
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert [model["model"] for model in found] == ["run: teacher", "run: student", "model.onnx", "model.pt2"]
    teacher, student, onnx, program = found
    result = json.loads((run / "result.json").read_text())
    assert teacher["parameters"] == result["teachers"]["teacher"]["parameters"]
    assert teacher["disk"] is None
    for model in (student, onnx, program):
        assert model["parameters"] == result["student"]["parameters"]
        assert model["flops"] == result["student"]["flops"]
        assert model["disk"] > 4 * model["parameters"]
    for model in found:
        assert 0 < model["latency_ms"]["p50"] <= model["latency_ms"]["p90"] < 1000
        assert model["rows_per_second"] > 0
        assert model["memory"] > 0
        assert model["device"] == "cpu"
        assert model["speed"] == pytest.approx(teacher["latency_ms"]["p50"] / model["latency_ms"]["p50"])


def test_memory_and_time_tell_a_large_model_from_a_small_one() -> None:
    targets = [
        target
        for name in ("digits:mlp-8", "digits:mlp-4000-4000")
        for target in find_targets(name, None, None)
    ]
    small, large = bench(targets, rounds=1, threads=1)
    weights = 4 * large["parameters"]
    assert small["memory"] + weights / 2 < large["memory"] < small["memory"] + 4 * weights
    assert large["latency_ms"]["p50"] > small["latency_ms"]["p50"]
    assert large["speed"] < 1


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("nothing-here", "no file or folder"),
        ("gone.onnx", "there is no file gone.onnx"),
        ("cifar:resnet21", "6n"),
        ("nowhere:x", "unknown model"),
        (".", "neither a run nor a student"),
    ],
)
def test_what_does_not_exist_is_one_message(
    given: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(app, ["bench", given, *QUICK])
    assert done.exit_code in (1, 2)
    assert said in done.stderr
    assert "Traceback" not in done.stderr


def test_a_damaged_file_is_one_message(tmp_path: Path) -> None:
    (tmp_path / "broken.onnx").write_bytes(b"no model")
    (tmp_path / "broken.pt2").write_bytes(b"no model")
    for name in ("broken.onnx", "broken.pt2"):
        with pytest.raises((ExportError, BenchError), match="broken"):
            bench(find_targets(str(tmp_path / name), (1, 8, 8), 10), rounds=1)
