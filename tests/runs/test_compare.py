"""`compare`: pairs, what is kept and resumed, what fails, what is refused; runs are faked but for the last tests."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tutelage.engine.interrupt import Interrupted
from tutelage.recipe import Recipe, RecipeError, load_recipe
from tutelage.runs import batch, comparison
from tutelage.runs.batch import run_batch
from tutelage.runs.compare import compare
from tutelage.runs.folder import FolderError

RECIPE: dict[str, Any] = {
    "data": {"path": "digits", "validation": 200, "test": 500, "limit": 128},
    "student": {"model": "digits:mlp-8"},
    "method": "none",
    "train": {"epochs": 1, "batch_size": 64},
    "output": {"report": False},
}
WITH_TEACHER = RECIPE | {"teacher": {"model": "digits:mlp-32"}}


class FakeRuns:
    """`distill`, for tables: accuracy is 0.8, plus 0.05 for kd, plus what ``noise`` says of the seed."""

    def __init__(self) -> None:
        self.started: list[tuple[str, int]] = []
        self.recipes: list[Recipe] = []
        self.broken: set[tuple[str, int]] = set()
        self.stop_at: tuple[str, int] | None = None

    def __call__(self, recipe: Recipe, *, folder: Path, resume: bool, progress: bool) -> Any:
        assert resume
        assert progress is False
        key = (recipe.method[0].name, recipe.train.seed)
        self.started.append(key)
        self.recipes.append(recipe)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "recipe.yaml").write_text(json.dumps(recipe.model_dump(mode="json")))
        if key in self.broken:
            raise ValueError("loss is nan at step 3")
        if key == self.stop_at:
            raise Interrupted(signal.SIGTERM, 1)
        accuracy = 0.8 + 0.05 * (key[0] == "kd") + (0.01, -0.01, 0.02)[key[1]] * (1 + (key[0] == "kd"))
        result = {
            "status": "done",
            "test": {"accuracy": accuracy, "loss": 0.5},
            "validation": {"accuracy": 0.1},
            "seconds": 9.0,
            "train_seconds": 2.0,
            "student": {"model": "digits:mlp-8", "parameters": 610},
            "teachers": {"teacher": {"model": "digits:mlp-32", "test": {"accuracy": 0.99}}},
        }
        (folder / "result.json").write_text(json.dumps(result))
        (folder / "environment.json").write_text('{"threads": 1}')
        return type("Done", (), {"result": result})


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> FakeRuns:
    fake = FakeRuns()
    monkeypatch.setattr(batch, "distill", fake)
    return fake


def call(folder: Path, **changes: Any) -> dict[str, Any]:
    options: dict[str, Any] = {"methods": ["none", "kd"], "seeds": 3, "folder": folder, "progress": False}
    options["jobs"] = 1  # in this process, where the runs are faked
    return compare(changes.pop("recipe", WITH_TEACHER), **options | changes)


def test_the_table(runs: FakeRuns, tmp_path: Path) -> None:
    table = call(tmp_path / "c")
    assert json.loads((tmp_path / "c" / "comparison.json").read_text()) == table
    assert (table["version"], table["metric"], table["higher_is_better"]) == (1, "accuracy", True)
    assert (table["baseline"], table["seeds"], table["split"]) == ("none", [0, 1, 2], "test")
    assert table["teacher"]["test"] == {"accuracy": 0.99}
    assert table["student"]["parameters"] == 610
    assert table["environment"] == {"threads": 1}
    none, kd = table["methods"]
    assert [run["value"] for run in kd["runs"]] == pytest.approx([0.87, 0.83, 0.89])
    assert kd["runs"][2] == {
        "seed": 2,
        "status": "done",
        "value": pytest.approx(0.89),
        "metrics": {"accuracy": pytest.approx(0.89), "loss": 0.5},
        "seconds": 2.0,
        "folder": "kd/seed-2",
        "error": None,
    }
    assert none["difference"] is None
    assert kd["difference"]["mean"] == pytest.approx(0.05 + 0.02 / 3)
    assert kd["difference"]["pairs"] == 3
    assert kd["difference"]["low"] < kd["difference"]["mean"] < kd["difference"]["high"]
    assert 0 < kd["difference"]["p"] < 0.05
    assert kd["low"] < kd["mean"] < kd["high"]
    assert kd["seconds"] == 2.0


def test_equal_budget_and_paired_seeds(runs: FakeRuns, tmp_path: Path) -> None:
    call(tmp_path / "c", methods=["none", {"name": "kd", "temperature": 2.0}])
    for recipe in runs.recipes:
        same = recipe.model_dump(exclude={"method", "output"})
        same["train"].pop("seed")
        first = runs.recipes[0].model_dump(exclude={"method", "output"})
        first["train"].pop("seed")
        assert same == first
        assert recipe.train.threads == 1
    assert sorted(runs.started) == sorted((name, seed) for name in ("none", "kd") for seed in range(3))
    assert runs.recipes[1].method[0].temperature == 2.0  # type: ignore[attr-defined]


def test_threads_of_the_recipe_stay(runs: FakeRuns, tmp_path: Path) -> None:
    call(tmp_path / "c", recipe=WITH_TEACHER | {"train": {"epochs": 1, "threads": 2}}, seeds=1)
    assert {recipe.train.threads for recipe in runs.recipes} == {2}


def test_one_method_twice_by_its_options(runs: FakeRuns, tmp_path: Path) -> None:
    methods = ["none", "kd", {"name": "kd", "temperature": 2.0}]
    table = call(tmp_path / "c", methods=methods, seeds=[7 % 3, 2])
    assert [method["name"] for method in table["methods"]] == ["none", "kd", "kd-temperature=2.0"]
    assert table["methods"][2]["options"] == {"temperature": 2.0}
    assert table["methods"][2]["runs"][0]["folder"] == "kd-temperature=2.0/seed-1"


def test_a_second_call_keeps_what_is_done_and_may_add(runs: FakeRuns, tmp_path: Path) -> None:
    first = call(tmp_path / "c", seeds=2)
    assert len(runs.started) == 4
    again = call(tmp_path / "c", seeds=2)
    assert len(runs.started) == 4
    assert {**again, "seconds": 0} == {**first, "seconds": 0}
    more = call(tmp_path / "c", methods=["none", "kd", "fitnet"])
    assert runs.started[4:] == [("fitnet", 0), ("fitnet", 1), ("none", 2), ("kd", 2), ("fitnet", 2)]
    assert more["methods"][0]["runs"][:2] == first["methods"][0]["runs"]


def test_failed_runs_stand_in_the_table_and_are_tried_again(runs: FakeRuns, tmp_path: Path) -> None:
    runs.broken = {("kd", 1)}
    table = call(tmp_path / "c")
    failed = table["methods"][1]["runs"][1]
    assert (failed["status"], failed["value"]) == ("failed", None)
    assert failed["error"] == "ValueError: loss is nan at step 3"
    assert [run["status"] for run in table["methods"][1]["runs"]] == ["done", "failed", "done"]
    assert table["methods"][1]["difference"]["pairs"] == 2
    assert table["methods"][1]["mean"] == pytest.approx(0.88)
    runs.broken, runs.started = set(), []
    assert call(tmp_path / "c")["methods"][1]["difference"]["pairs"] == 3
    assert runs.started == [("kd", 1)]


def test_all_failed_has_no_mean(runs: FakeRuns, tmp_path: Path) -> None:
    runs.broken = {("kd", 0), ("none", 0)}
    table = call(tmp_path / "c", seeds=1)
    assert [method["mean"] for method in table["methods"]] == [None, None]
    assert table["methods"][1]["difference"] is None
    assert table["student"] is None


def test_one_seed_has_no_interval(runs: FakeRuns, tmp_path: Path) -> None:
    kd = call(tmp_path / "c", seeds=1)["methods"][1]
    assert (kd["low"], kd["high"]) == (None, None)
    expected = {"low": None, "high": None, "p": None, "p_adjusted": None, "pairs": 1}
    assert kd["difference"] == {"mean": pytest.approx(0.06), **expected}


def test_a_stopped_comparison_has_its_table_and_goes_on(runs: FakeRuns, tmp_path: Path) -> None:
    runs.stop_at = ("kd", 1)
    with pytest.raises(Interrupted):
        call(tmp_path / "c")
    table = json.loads((tmp_path / "c" / "comparison.json").read_text())
    assert [len(method["runs"]) for method in table["methods"]] == [2, 1]
    runs.stop_at, runs.started = None, []
    assert call(tmp_path / "c")["methods"][1]["difference"]["pairs"] == 3
    assert runs.started == [("kd", 1), ("none", 2), ("kd", 2)]


def test_another_recipe_is_refused(runs: FakeRuns, tmp_path: Path) -> None:
    call(tmp_path / "c", seeds=1)
    before = (tmp_path / "c" / "comparison.json").read_text()
    longer = WITH_TEACHER | {"train": {"epochs": 2, "batch_size": 64}}
    with pytest.raises(FolderError, match="under another recipe"):
        call(tmp_path / "c", recipe=longer)
    with pytest.raises(FolderError, match=r"kd.*\(method differs\)"):
        call(tmp_path / "c", methods=["none", {"name": "kd", "temperature": 2.0}])
    assert len(runs.started) == 2
    assert (tmp_path / "c" / "comparison.json").read_text() == before


def test_a_teacher_recipe_that_changed_is_another_recipe(runs: FakeRuns, tmp_path: Path) -> None:
    teacher = tmp_path / "teacher.yaml"
    teacher.write_text(json.dumps(RECIPE))
    recipe = RECIPE | {"teacher": {"recipe": str(teacher)}}
    call(tmp_path / "c", recipe=recipe, seeds=1)
    teacher.write_text(json.dumps(RECIPE | {"train": {"epochs": 3}}))
    with pytest.raises(FolderError, match="under another recipe"):
        call(tmp_path / "c", recipe=recipe, seeds=1)


def test_a_folder_of_something_else_is_refused(runs: FakeRuns, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").touch()
    with pytest.raises(FolderError, match="not empty"):
        call(tmp_path)
    with pytest.raises(FolderError, match="is a file"):
        call(tmp_path / "notes.txt")
    assert not runs.started


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"methods": ["none", "kdd"]}, RecipeError, "kdd.*kd"),
        ({"methods": ["none", {"name": "kd", "temperature": -1.0}]}, RecipeError, "temperature"),
        ({"methods": []}, ValueError, "methods is"),
        ({"methods": "kd"}, ValueError, "methods is 'kd'"),
        ({"methods": ["kd", "kd"]}, ValueError, "'kd' twice"),
        ({"seeds": 0}, ValueError, "seeds is 0"),
        ({"seeds": [1, 1]}, ValueError, "different"),
        ({"baseline": "nonee"}, ValueError, "'nonee' is not among.*did you mean 'none'"),
        ({"jobs": 0}, ValueError, "jobs is 0"),
        ({"recipe": WITH_TEACHER | {"evaluation": {"best": "f2"}}}, ValueError, "'f2'"),
    ],
)
def test_what_is_refused_before_anything_is_written(
    runs: FakeRuns, tmp_path: Path, changes: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        call(tmp_path / "c", **changes)
    assert not runs.started
    assert not (tmp_path / "c").exists()


def test_lower_is_better_metrics_are_ranked_by_name(runs: FakeRuns, tmp_path: Path) -> None:
    table = call(tmp_path / "c", recipe=WITH_TEACHER | {"evaluation": {"best": "loss"}}, baseline="kd")
    assert (table["metric"], table["higher_is_better"], table["baseline"]) == ("loss", False, "kd")
    assert table["methods"][0]["difference"]["mean"] == 0.0


def test_a_run_without_a_finite_value_failed(
    runs: FakeRuns, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    metrics = comparison.finite_metrics({"test": {"accuracy": float("nan"), "loss": 0.1}})
    assert metrics == {"accuracy": None, "loss": 0.1}
    result = type("Done", (), {"result": {"status": "done", "test": {"accuracy": float("inf")}}})
    monkeypatch.setattr(batch, "distill", lambda *_, **__: result)
    run = call(tmp_path / "c", methods=["none"], seeds=1)["methods"][0]["runs"][0]
    assert (run["status"], run["error"]) == ("failed", "the run has no finite accuracy")


def test_progress_is_plain_lines_on_standard_error(
    runs: FakeRuns, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs.broken = {("kd", 1)}
    call(tmp_path / "c", progress=None)
    printed = capsys.readouterr()
    assert printed.out == ""
    lines = printed.err.splitlines()
    assert lines[0] == "run 1/6  none, seed 0: accuracy 0.8100 (2.0 s)"
    assert "run 4/6  kd, seed 1: failed: ValueError: loss is nan at step 3" in lines
    call(tmp_path / "c", progress=None)
    assert capsys.readouterr().err.splitlines()[0].endswith("from before")


def test_the_shared_recipe_is_saved(runs: FakeRuns, tmp_path: Path) -> None:
    call(tmp_path / "c", seeds=1)
    assert load_recipe(tmp_path / "c" / "recipe.yaml") == load_recipe(WITH_TEACHER)


def test_real_runs_share_one_teacher_and_end_in_a_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TUTELAGE_TEACHERS", str(tmp_path / "teachers"))
    teacher = tmp_path / "teacher.yaml"
    teacher.write_text(json.dumps(RECIPE | {"student": {"model": "digits:mlp-32"}}))
    recipe = RECIPE | {"teacher": {"recipe": str(teacher)}, "output": {"report": True}}
    table = call(tmp_path / "c", recipe=recipe, seeds=2)
    assert [run["status"] for method in table["methods"] for run in method["runs"]] == ["done"] * 4
    assert len(list((tmp_path / "teachers").glob("*/result.json"))) == 1
    results = [json.loads(path.read_text()) for path in (tmp_path / "c").glob("*/seed-*/result.json")]
    assert len({result["teachers"]["teacher"]["test"]["accuracy"] for result in results}) == 1
    assert table["teacher"]["test"]["accuracy"] == results[0]["teachers"]["teacher"]["test"]["accuracy"]
    page = (tmp_path / "c" / "report.html").read_text(encoding="utf-8")
    assert "<html" in page
    assert "kd" in page
    assert not (tmp_path / "c" / "kd" / "seed-0" / "report.html").exists()
    assert call(tmp_path / "c", recipe=recipe, seeds=2)["methods"] == table["methods"]


@pytest.mark.slow
def test_parallel_calls() -> None:
    with pytest.raises(ValueError, match="invalid literal"):
        list(run_batch(int, [("7",), ("x",)], jobs=2))
    died = dict(run_batch(os._exit, [(1,), (1,)], jobs=2))
    assert sorted(died) == [0, 1]
    assert all(isinstance(error, batch.BrokenProcessPool) for error in died.values())


def without_times(table: dict[str, Any]) -> dict[str, Any]:
    """What must not depend on ``jobs``, on stops and on the clock."""
    methods = [
        {key: value for key, value in method.items() if key not in ("seconds", "runs")}
        | {"runs": [{key: value for key, value in run.items() if key != "seconds"} for run in method["runs"]]}
        for method in table["methods"]
    ]
    return {"methods": methods, "metric": table["metric"], "teacher": table["teacher"]["test"]}


@pytest.mark.slow
def test_parallel_runs_give_the_figures_of_single_ones(tmp_path: Path) -> None:
    one = call(tmp_path / "one", seeds=2)
    two = call(tmp_path / "two", seeds=2, jobs=2)
    assert [run["status"] for method in one["methods"] for run in method["runs"]] == ["done"] * 4
    assert without_times(one) == without_times(two)


SCRIPT = """
import json, sys
from tutelage.runs.compare import compare
if __name__ == "__main__":
    compare(json.loads(sys.argv[1]), methods=["none", "kd"], seeds=2, folder=sys.argv[2], jobs=int(sys.argv[3]))
"""


@pytest.mark.slow
@pytest.mark.parametrize("jobs", [1, 2])
def test_a_killed_comparison_goes_on_with_the_same_figures(tmp_path: Path, jobs: int) -> None:
    recipe = WITH_TEACHER | {"train": {"epochs": 30, "batch_size": 64}}
    whole = call(tmp_path / "whole", recipe=recipe, seeds=2)
    folder, script = tmp_path / "killed", tmp_path / "script.py"
    script.write_text(SCRIPT)
    process = subprocess.Popen([sys.executable, str(script), json.dumps(recipe), str(folder), str(jobs)])
    while not any(folder.glob("*/seed-*/checkpoints/step-*")):
        assert process.poll() is None
        time.sleep(0.02)
    process.kill()
    process.wait()
    time.sleep(1)  # its workers end with it, but not at once
    assert not all(
        (folder / f"{name}/seed-{seed}/result.json").exists() for name in ("none", "kd") for seed in (0, 1)
    )
    assert without_times(call(folder, recipe=recipe, seeds=2)) == without_times(whole)
