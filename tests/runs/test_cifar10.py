"""The shipped recipe on the real images, in the hub's layout from a local folder: a few steps from end to end."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tutelage.recipe import load_recipe
from tutelage.runs import distill

FEW = [
    "data.limit=32",
    "data.validation=16",
    "data.evaluation_limit=16",
    "train.epochs=null",
    "train.steps=1",
]


def test_the_recipe_on_a_local_folder(
    data_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TUTELAGE_TEACHERS", str(tmp_path / "teachers"))
    few = [*FEW, "train.batch_size=16", "train.device=cpu", "train.threads=1"]
    overrides = [*few, f"data.path={data_root / 'cifar10'}", f"teacher.overrides={json.dumps(few)}"]
    done = distill(load_recipe("cifar10", overrides), folder=tmp_path / "run", progress=False)
    assert done.result["student"]["model"] == "cifar:resnet8x4"
    assert done.result["teachers"]["teacher"]["model"] == "cifar:resnet32x4"
    assert done.result["data"]["rows"] == {"train": 32, "validation": 16, "test": 16}
    analysis = json.loads((tmp_path / "run" / "analysis.json").read_text())
    assert "frog" in analysis["classes"]
    page = (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    assert "resnet32x4" in page
    (teacher,) = (tmp_path / "teachers").glob("*/result.json")
    assert json.loads(teacher.read_text())["data"]["path"] == str(data_root / "cifar10")
