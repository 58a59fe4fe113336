"""A recipe, carried out; and what is refused before anything is written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import nn

from killing import stop_after
from tutelage.engine.needs import PairingError
from tutelage.recipe import RecipeError
from tutelage.runs import check, distill, resume
from tutelage.runs.folder import FolderError


def recipe(**changes: Any) -> dict[str, Any]:
    found: dict[str, Any] = {
        "data": {"path": "digits", "limit": 96, "validation": 32, "test": 100},
        "teacher": {"model": "digits:cnn-8-16"},
        "student": {"model": "digits:mlp-16"},
        "method": "kd",
        "train": {"steps": 8, "batch_size": 32, "device": "cpu", "threads": 1},
        "output": {"report": False},
    }
    for path, value in changes.items():
        place = found
        *parents, last = path.split("__")
        for parent in parents:
            place = place.setdefault(parent, {})
        place[last] = value
    return found


def test_what_a_run_leaves(tmp_path: Path) -> None:
    done = distill(recipe(output__report=True), folder=tmp_path / "run", progress=False)
    names = {path.name for path in done.folder.iterdir()}
    assert {
        "recipe.yaml",
        "environment.json",
        "metrics.jsonl",
        "checkpoints",
        "student",
        "result.json",
        "report.html",
    } <= names
    result = json.loads((done.folder / "result.json").read_text())
    assert result["status"] == "done"
    assert result["student"]["parameters"] == 64 * 16 + 16 + 16 * 10 + 10
    assert result["student"]["flops"] == 2 * (64 * 16 + 16 * 10)
    assert set(result["test"]) >= {"accuracy", "top5", "calibration_error", "loss", "agreement"}
    assert "accuracy" in result["teachers"]["teacher"]["test"]
    lines = [json.loads(line) for line in (done.folder / "metrics.jsonl").read_text().splitlines()]
    assert {line["kind"] for line in lines} == {"train", "evaluation"}
    assert {line.get("split") for line in lines} == {None, "validation", "test"}


def test_a_finished_run_is_read_back(tmp_path: Path) -> None:
    first = distill(recipe(), folder=tmp_path / "run", progress=False)
    with pytest.raises(FolderError, match="already holds this run"):
        distill(recipe(), folder=tmp_path / "run", progress=False)
    again = resume(tmp_path / "run")
    assert again.result == first.result
    inputs = torch.rand(2, 1, 8, 8)
    assert torch.equal(again.student(inputs), first.student(inputs))


def test_a_folder_of_another_recipe(tmp_path: Path) -> None:
    distill(recipe(), folder=tmp_path / "run", progress=False)
    with pytest.raises(FolderError, match=r"train\.seed differs"):
        distill(recipe(train__seed=3), folder=tmp_path / "run", progress=False, resume=True)


def test_a_folder_that_is_no_run(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(FolderError, match="is not empty and holds no run"):
        distill(recipe(), folder=tmp_path, progress=False)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_loader_workers_change_no_bit_of_a_run_that_was_killed(tmp_path: Path) -> None:
    """Killed in the middle of an epoch of drawn views, and resumed with other processes that load rows."""
    changes = {"data__views": [{"name": "crop", "padding": 1}], "train__checkpoint": {"every": 2}}
    whole = distill(recipe(**changes), folder=tmp_path / "whole", progress=False)
    with_workers = recipe(**changes, data__workers=2)
    stop_after(
        4, lambda kill: distill(with_workers, folder=tmp_path / "run", progress=False, callbacks=[kill])
    )
    resumed = distill(with_workers, folder=tmp_path / "run", resume=True, progress=False)
    wanted, found = whole.student.state_dict(), resumed.student.state_dict()
    assert all(torch.equal(value, found[name]) for name, value in wanted.items())


def test_a_teacher_from_a_run(tmp_path: Path) -> None:
    distill(recipe(method="none"), folder=tmp_path / "teacher", progress=False)
    done = distill(
        recipe(teacher={"run": str(tmp_path / "teacher")}), folder=tmp_path / "run", progress=False
    )
    taught = json.loads((tmp_path / "teacher" / "result.json").read_text())["test"]["accuracy"]
    assert done.result["teachers"]["teacher"]["test"]["accuracy"] == pytest.approx(taught)


def test_a_teacher_from_a_recipe_is_trained_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TUTELAGE_TEACHERS", str(tmp_path / "teachers"))
    (tmp_path / "teacher.yaml").write_text(yaml.safe_dump(recipe(method="none")))
    taught = recipe(teacher={"recipe": str(tmp_path / "teacher.yaml")})
    distill(taught, folder=tmp_path / "one", progress=False)
    made = [path for path in (tmp_path / "teachers").iterdir() if (path / "result.json").exists()]
    assert len(made) == 1
    stamp = (made[0] / "result.json").stat().st_mtime_ns
    distill(taught | {"method": "nkd"}, folder=tmp_path / "two", progress=False)
    assert (made[0] / "result.json").stat().st_mtime_ns == stamp


def test_several_methods_at_once(tmp_path: Path) -> None:
    both = recipe(method=[{"name": "kd", "weight": 0.5}, "nkd"])
    done = distill(both, folder=tmp_path / "run", progress=False)
    lines = [json.loads(line) for line in (done.folder / "metrics.jsonl").read_text().splitlines()]
    terms = next(line["terms"] for line in lines if line["kind"] == "train")
    assert list(terms).count("label") == 1
    assert {"label", "kd", "target", "nontarget"} <= set(terms)


def test_a_module_from_python(tmp_path: Path) -> None:
    torch.manual_seed(0)
    own = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    done = distill(recipe(), folder=tmp_path / "run", progress=False, student=own)
    assert done.result["student"]["parameters"] == 650


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"method": "kdd"}, RecipeError, ["kdd", "kd"]),
        ({"train__epoch": 3}, RecipeError, ["train.epoch", "epochs"]),
        ({"student__model": "timm:resnet1888"}, ValueError, ["resnet1888", "resnet18"]),
        ({"student__model": "resnet18"}, ValueError, ["timm:resnet18"]),
        ({"train__batch_size": 200}, ValueError, ["batch_size is 200", "96 rows"]),
        ({"teacher": None}, PairingError, ["needs a teacher"]),
        ({"teacher": {"store": "somewhere"}}, ValueError, ["store"]),
        ({"method": {"name": "fitnet", "student_tap": "layer9"}}, ValueError, ["layer9", "layer1"]),
        ({"data__limit": 5000}, ValueError, ["5000"]),
        ({"task": "regression"}, PairingError, ["defined for classification"]),
        ({"method": ["kd", "wa"]}, PairingError, ["wa", "alone"]),
    ],
)
def test_refused_with_nothing_written(
    changes: dict[str, Any], error: type[Exception], words: list[str], tmp_path: Path
) -> None:
    for action in (
        lambda: check(recipe(**changes)),
        lambda: distill(recipe(**changes), folder=tmp_path / "run"),
    ):
        with pytest.raises(error) as caught:
            action()
        for word in words:
            assert word in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(FolderError, match="file"):
        distill(recipe(), folder=tmp_path / "file" / "run", progress=False)


def test_a_truncated_checkpoint_falls_back(tmp_path: Path) -> None:
    """The newest is damaged: the one before is used, and that is said; the end is the same."""
    from killing import stop_after

    whole = distill(recipe(train__checkpoint={"every": 2}), folder=tmp_path / "whole", progress=False)
    stop_after(
        5,
        lambda listener: distill(
            recipe(train__checkpoint={"every": 2}),
            folder=tmp_path / "run",
            progress=False,
            callbacks=[listener],
        ),
    )
    newest = sorted((tmp_path / "run" / "checkpoints").glob("step-*"))[-1]
    (newest / "student.safetensors").write_bytes(b"torn")
    with pytest.warns(UserWarning, match=newest.name):
        found = resume(tmp_path / "run", progress=False)
    inputs = torch.rand(2, 1, 8, 8)
    assert torch.equal(found.student(inputs), whole.student(inputs))
