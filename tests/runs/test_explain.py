"""`explain`: layers of student and teacher side by side, from a finished run."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from tutelage.runs import distill
from tutelage.runs.explain import explain

RECIPE: dict[str, Any] = {
    "data": {"path": "digits", "limit": 64, "validation": 32, "test": 60},
    "teacher": {"model": "digits:cnn-6-8"},
    "student": {"model": "digits:cnn-4-6"},
    "method": "kd",
    "train": {"steps": 3, "batch_size": 16, "device": "cpu", "threads": 1},
    "output": {"report": False},
}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return distill(RECIPE, folder=tmp_path_factory.mktemp("explain") / "run", progress=False).folder


def test_every_stage_of_the_student_against_every_one_of_the_teacher(run: Path) -> None:
    found = explain(run, rows=40)
    assert (found["split"], found["rows"]) == ("test", 40)
    teacher = found["teachers"]["teacher"]
    assert found["student"]["layers"][-1] == teacher["layers"][-1] == "logits"
    assert len(teacher["cka"]) == len(found["student"]["layers"]) == 3
    assert all(len(row) == len(teacher["layers"]) for row in teacher["cka"])
    assert all(0 < value < 1 for row in teacher["cka"] for value in row)
    assert json.loads((run / "explain.json").read_text()) == found


def test_equal_models_are_alike_layer_by_layer(tmp_path: Path, run: Path) -> None:
    still = {
        "teacher": {"run": str(run)},
        "student": {"model": "digits:cnn-4-6", "weights": str(run / "student" / "model.safetensors")},
        "train": RECIPE["train"] | {"optimizer": {"name": "sgd", "lr": 1e-12, "momentum": 0.0}},
    }
    copy = distill(RECIPE | still, folder=tmp_path / "copy", progress=False)
    cka = explain(copy.folder)["teachers"]["teacher"]["cka"]
    # Its weights stayed as they were; only the statistics of its BatchNorm moved.
    assert [row[i] for i, row in enumerate(cka)] == pytest.approx([1.0, 1.0, 1.0], abs=0.03)
    assert all(row[i] == max(row) for i, row in enumerate(cka))


def test_a_teacher_that_learned_is_the_one_that_was_kept(tmp_path: Path) -> None:
    train = RECIPE["train"] | {"steps": 12, "optimizer": {"name": "sgd", "lr": 0.5}}
    done = distill(RECIPE | {"method": "dml", "train": train}, folder=tmp_path / "dml", progress=False)
    kept = explain(done.folder)["teachers"]["teacher"]["cka"]
    shutil.rmtree(done.folder / "teachers")
    assert explain(done.folder)["teachers"]["teacher"]["cka"] != kept


@pytest.mark.parametrize("rows", [0, 1])
def test_too_few_rows(run: Path, rows: int) -> None:
    with pytest.raises(ValueError, match=f"rows is {rows}; allowed: 2 and above"):
        explain(run, rows=rows)


def test_what_cannot_be_explained(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="holds no finished run"):
        explain(tmp_path)
    alone = {key: value for key, value in RECIPE.items() if key != "teacher"} | {"method": "none"}
    done = distill(alone, folder=tmp_path / "alone", progress=False)
    with pytest.raises(ValueError, match="without a teacher"):
        explain(done.folder)
