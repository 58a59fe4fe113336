"""Weight aligning as a procedure: order, steps, memory, alignment, and what ships."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tutelage.data import open_data, targets
from tutelage.engine.views import to_float
from tutelage.methods.wa.procedure import WA, class_order, class_steps, exemplars_per_class
from tutelage.recipe import RecipeError, load_recipe
from tutelage.runs import RunResult, distill


def recipe(**options: Any) -> dict[str, Any]:
    return {
        "data": {"path": "digits", "limit": 300, "validation": None, "test": 400},
        "student": {"model": "digits:mlp-32"},
        "method": {"name": "wa", "memory_size": 30, **options},
        "train": {
            "epochs": 8,
            "batch_size": 16,
            "optimizer": {"name": "sgd", "lr": 0.05},
            "device": "cpu",
            "threads": 1,
        },
        "output": {"report": False},
    }


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> RunResult:
    return distill(recipe(), folder=tmp_path_factory.mktemp("wa") / "run", progress=False)


def test_the_class_order_is_the_official_one() -> None:
    assert class_order(100)[:8] == [68, 56, 78, 8, 23, 84, 90, 65]
    assert class_order(10) == [4, 2, 7, 6, 0, 3, 5, 8, 9, 1]
    assert class_order(4, seed=None) == [0, 1, 2, 3]


def test_steps() -> None:
    assert class_steps(10, 5) == [range(2), range(2, 4), range(4, 6), range(6, 8), range(8, 10)]
    assert class_steps(10, 3, first=4) == [range(4), range(4, 7), range(7, 10)]
    with pytest.raises(ValueError, match="do not divide into 3 equal steps"):
        class_steps(10, 3)
    assert exemplars_per_class(50, 6) == 8


def test_what_is_measured(done: RunResult) -> None:
    table = done.result["tables"]["accuracy by step"]
    rows = [dict(zip(table["columns"], row, strict=True)) for row in table["rows"]]
    assert [row["classes"] for row in rows] == [2, 4, 6, 8, 10]
    assert rows[0]["accuracy"] > 0.9
    assert rows[0]["gamma"] == 1.0
    assert all(0 < row["gamma"] <= 1 for row in rows)
    assert any(row["gamma"] < 1 for row in rows)
    # The memory holds floor(30 / seen) rows of every class seen before.
    assert [row["memory"] for row in rows] == [0, 2 * 15, 4 * 7, 6 * 5, 8 * 3]
    mean = sum(row["accuracy"] for row in rows[1:]) / 4
    assert done.result["test"]["average_incremental_accuracy"] == pytest.approx(mean)
    assert done.result["test"]["accuracy"] == rows[-1]["accuracy"]


def test_alignment_never_sends_more_old_rows_to_new_classes(done: RunResult) -> None:
    table = done.result["tables"]["accuracy by step"]
    assert table["rows"][0][-3:] == [None] * 3  # no class is old yet
    for row in table["rows"][1:]:
        values = dict(zip(table["columns"], row, strict=True))
        assert values["old_to_new"] <= values["old_to_new_before"]


def test_the_student_ships_in_the_datas_own_classes(done: RunResult) -> None:
    loaded = load_recipe(done.folder / "recipe.yaml")
    data = open_data(loaded.data, "classification")
    batch = to_float(data.test.fetch(range(len(data.test))))
    mean, std = (torch.tensor(v).view(1, -1, 1, 1) for v in (data.info.mean, data.info.std))
    right = done.student((batch.inputs - mean) / std).argmax(1) == batch.target
    assert float(right.double().mean()) == pytest.approx(done.result["test"]["accuracy"])


def test_memory_is_of_the_classes_it_says(done: RunResult) -> None:
    loaded = load_recipe(done.folder / "recipe.yaml")
    data = open_data(loaded.data, "classification")
    order, found = class_order(10), targets(data.train)
    memory = json.loads((done.folder / "once" / "memory-3.json").read_text())
    assert {int(k) for k in memory} == set(range(8))
    for k, rows in memory.items():
        assert len(set(rows)) == len(rows) == 3
        assert (found[rows] == order[int(k)]).all()


@pytest.mark.parametrize(
    "options",
    [
        {"distill": False},
        {"align": False},
        {"memory_size": 0},
        {"herding": False},
        {"bias": True, "norm": 2, "clip_weights": False},
        {"head_init": "copy"},
        {"variant": "pycil"},
        {"first": 6, "steps": 3},
    ],
)
def test_every_option_runs(options: dict[str, Any], tmp_path: Path) -> None:
    found = recipe(**options)
    found["train"]["epochs"] = 1
    result = distill(found, folder=tmp_path / "run", progress=False).result
    gammas = [row[3] for row in result["tables"]["accuracy by step"]["rows"]]
    if options.get("align") is False:
        assert set(gammas) == {1.0}


def test_pycil_sets_what_it_stands_for() -> None:
    config = WA.Config(name="wa", variant="pycil")
    assert (config.norm, config.clamp_max, config.clip_weights, config.bias) == (2, None, False, True)


def test_out_of_range_is_refused() -> None:
    with pytest.raises(RecipeError, match=r"temperature"):
        load_recipe(recipe(temperature=0))


def test_classes_that_do_not_divide(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="do not divide into 4 equal steps"):
        distill(recipe(steps=4), folder=tmp_path / "run", progress=False)
