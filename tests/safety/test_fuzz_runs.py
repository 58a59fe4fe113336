"""The files of saved models, runs and comparisons as nobody wrote them: only our own errors come out."""

from __future__ import annotations

import json
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from damage import RECIPE, VALUES, altered, damaged, fuzzed
from hypothesis import strategies as st
from safetensors.torch import save_file

from tutelage.cli.run import print_result
from tutelage.engine.metrics import MetricsLog
from tutelage.models import ModelError, build_model, load_model, save_model
from tutelage.models.weights import find_weights, load_strict
from tutelage.recipe import RecipeError, load_recipe
from tutelage.recipe.text import write_yaml
from tutelage.report import write_report
from tutelage.report.errors import ReportError
from tutelage.runs.batch import finished_result
from tutelage.runs.compare import _check_folder
from tutelage.runs.folder import FolderError
from tutelage.runs.plan import make_plan
from tutelage.runs.result import read_result
from tutelage.untrusted import FileError


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "student"
    save_model(build_model("digits:mlp-8", outputs=10, input_shape=(1, 8, 8)), folder)
    return folder


def read_weights(data: Any, model: Path) -> None:
    file = model.parent / "damaged.safetensors"
    whole = (model / "model.safetensors").read_bytes()
    header = 8 + int.from_bytes(whole[:8], "little")
    file.write_bytes(data.draw(damaged(whole[:header])) + whole[header:])
    module = build_model("digits:mlp-8", outputs=10, input_shape=(1, 8, 8)).module
    with suppress(ModelError):
        load_strict(module, find_weights(str(file), None))


def read_card(data: Any, model: Path) -> None:
    folder = model.parent / "altered"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(model, folder)
    card = json.loads((model / "tutelage.json").read_text())
    (folder / "tutelage.json").write_text(json.dumps(data.draw(altered(card))))
    with suppress(ModelError, RecipeError):
        load_model(folder)


test_damaged_weights, test_damaged_weights_long = fuzzed(read_weights, 60, data=st.data())
test_altered_cards, test_altered_cards_long = fuzzed(read_card, 60, data=st.data())


def test_a_file_of_no_tensors_is_no_weights(tmp_path: Path) -> None:
    save_file({}, tmp_path / "empty.safetensors")
    with pytest.raises(ModelError, match="missing"):
        load_strict(torch.nn.Linear(2, 2), find_weights(str(tmp_path / "empty.safetensors"), None))


# -- the folder of a run ------------------------------------------------------------------------------------------

RESULT: dict[str, Any] = {
    "name": "kd",
    "status": "done",
    "error": None,
    "test": {"accuracy": 0.5, "loss": 1.5},
    "validation": {"accuracy": 0.5},
    "student": {"model": "digits:mlp-8", "parameters": 10, "flops": 20, "latency_ms": 0.1},
    "teachers": {"teacher": {"model": "digits:mlp-16", "test": {"accuracy": 0.7}, "parameters": 30}},
    "tables": {"by class": {"columns": ["class", "accuracy"], "rows": [["a", 0.5]]}},
    "train_seconds": 1.5,
}
LINES = [
    {
        "kind": "train",
        "step": 1,
        "epoch": 1,
        "loss": 1.0,
        "terms": {"kd": 1.0},
        "lr": {"main": 0.1},
        "seconds": 1.0,
    },
    {"kind": "evaluation", "split": "validation", "step": 1, "epoch": 1, "metrics": {"accuracy": 0.5}},
]
COMPARISON: dict[str, Any] = {
    "recipe": RECIPE,
    "teachers": {},
    "trials": 0,
    "seconds": 1.0,
    "metric": "accuracy",
    "seeds": [0],
    "methods": [{"name": "kd", "runs": [{"seed": 0, "status": "done", "value": 0.5, "folder": "kd/seed-0"}]}],
}
OWN: dict[str, Any] = {
    "data": {"path": "digits"},
    "student": {"model": "digits:mlp-8"},
    "method": "none",
    "train": {"steps": 1, "batch_size": 8, "device": "cpu"},
}


def print_anything(result: Any, tmp_path: Path) -> None:
    (tmp_path / "result.json").write_text(json.dumps(result))
    with suppress(FileError):
        found = read_result(tmp_path)
        assert found is not None
        print_result(tmp_path, found)


def listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def report_anything(result: Any, lines: Any, table: Any, tmp_path: Path) -> None:
    (tmp_path / "result.json").write_text(json.dumps(result))
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in listed(lines)))
    (tmp_path / "recipe.yaml").write_text(json.dumps(table))
    (tmp_path / "environment.json").write_text(json.dumps(lines))
    with suppress(ReportError):
        write_report([tmp_path])


def finish_anything(content: bytes, tmp_path: Path) -> None:
    recipe = load_recipe(OWN)
    (tmp_path / "recipe.yaml").write_bytes(write_yaml(recipe.model_dump(mode="json")).encode())
    (tmp_path / "result.json").write_bytes(content)
    with suppress(FileError, FolderError):
        found = finished_result(recipe, tmp_path)
        assert found is None or found["status"] == "done"


class At:
    step = 1


def go_on_with_anything(lines: Any, torn: bytes, tmp_path: Path) -> None:
    log = MetricsLog(tmp_path)
    content = "".join(json.dumps(line) + "\n" for line in listed(lines)).encode()
    log.path.write_bytes(content + torn)
    with suppress(ValueError):
        log.on_fit_start(At())  # type: ignore[arg-type]


def compare_into_anything(table: Any, tmp_path: Path) -> None:
    (tmp_path / "comparison.json").write_text(json.dumps(table))
    with suppress(FileError, FolderError):
        _check_folder(tmp_path, PLAN)


PLAN = make_plan(OWN, ["none"], seeds=1)
test_printed_results, test_printed_results_long = fuzzed(print_anything, 60, result=altered(RESULT))
test_reports, test_reports_long = fuzzed(
    report_anything, 6, result=altered(RESULT), lines=altered(LINES), table=altered(RECIPE)
)
test_results, test_results_long = fuzzed(
    finish_anything,
    60,
    content=st.one_of(damaged(json.dumps(RESULT).encode()), VALUES.map(lambda v: json.dumps(v).encode())),
)
test_metrics, test_metrics_long = fuzzed(
    go_on_with_anything, 60, lines=altered(LINES), torn=st.binary(max_size=20)
)
test_comparisons, test_comparisons_long = fuzzed(compare_into_anything, 60, table=altered(COMPARISON))
