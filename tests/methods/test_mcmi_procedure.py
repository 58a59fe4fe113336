"""mcmi as a procedure: the teacher's tuning, its early end, the student's rows, what is left, what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file
from training import assert_same

from killing import stop_after
from support import Losses, Net, train_config
from support import rows as rows_of_four
from tutelage.data import open_data, targets
from tutelage.engine.loop import Trainer
from tutelage.engine.needs import PairingError
from tutelage.engine.runtime import Runtime
from tutelage.engine.spec import ModelSpec
from tutelage.engine.views import to_float
from tutelage.functional import class_centroids, conditional_mutual_information
from tutelage.methods.mcmi.finetune import FineTune, Watch, rows_by_class
from tutelage.methods.mcmi.procedure import MCMI
from tutelage.models import load_model
from tutelage.procedures.stages import share_of_each
from tutelage.recipe.schema import DataConfig
from tutelage.runs import RunResult, check, distill
from tutelage.tasks import build_task

DATA = {"path": "digits", "limit": 300, "validation": 60, "test": 100}
TUNING = {"epochs": 3, "batch_size": 32, "optimizer": {"name": "sgd", "lr": 0.02}}


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trained teacher's run."""
    recipe = {
        "data": DATA,
        "student": {"model": "digits:cnn-8-16", "mean": [0.3], "std": [0.4]},
        "method": "none",
        "train": {"epochs": 12, "batch_size": 32, "optimizer": {"name": "sgd", "lr": 0.1}, "device": "cpu"},
        "output": {"report": False},
    }
    return distill(recipe, folder=tmp_path_factory.mktemp("mcmi") / "teacher", progress=False).folder


def recipe(teacher: Path, data: dict[str, Any] | None = None, **options: Any) -> dict[str, Any]:
    return {
        "data": DATA | (data or {}),
        "teacher": {"run": str(teacher)},
        "student": {"model": "digits:mlp-16"},
        "method": {"name": "mcmi", **TUNING, **options},
        "train": {"epochs": 2, "batch_size": 32, "device": "cpu", "threads": 1},
        "output": {"report": False},
    }


@pytest.fixture(scope="module")
def done(teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> RunResult:
    found = recipe(teacher, cmi_weight=0.25, centroids="epoch", pictures=2)
    return distill(
        found | {"output": {"report": True}}, folder=tmp_path_factory.mktemp("mcmi") / "run", progress=False
    )


def rows(result: dict[str, Any], name: str) -> list[dict[str, Any]]:
    table = result["tables"][name]
    return [dict(zip(table["columns"], row, strict=True)) for row in table["rows"]]


def test_what_is_measured_is_the_teachers_own(done: RunResult, teacher: Path) -> None:
    """CMI, loss and accuracy of both teachers, from their saved weights."""
    data = open_data(DataConfig(**DATA), "classification")
    batch = to_float(data.train.fetch(range(len(data.train))))
    assert isinstance(batch.inputs, torch.Tensor)
    assert batch.target is not None
    found = {row["teacher"]: row for row in rows(done.result, "teachers") if row["rows"] == "train"}
    history = rows(done.result, "teacher by epoch")
    assert [row["epoch"] for row in history] == [0, 1, 2, 3]
    for name, folder, epoch in (
        ("MLL teacher", teacher / "student", 0),
        ("MCMI teacher", done.folder / "teachers" / "teacher", -1),
    ):
        logits = load_model(folder).module.eval()((batch.inputs - 0.3) / 0.4)
        cmi = conditional_mutual_information(logits, batch.target).item()
        accuracy = (logits.argmax(1) == batch.target).double().mean().item()
        for row in (found[name], {k.removesuffix("_train"): v for k, v in history[epoch].items()}):
            assert row["cmi"] == pytest.approx(cmi, rel=1e-4)
            assert row["accuracy"] == pytest.approx(accuracy)
            assert row["loss"] == pytest.approx(
                torch.nn.functional.cross_entropy(logits, batch.target).item(), rel=1e-4
            )


def test_the_tuned_teacher_is_another_one(done: RunResult, teacher: Path) -> None:
    """So stored answers of the first are refused for the second."""
    prints = done.result["teacher_fingerprints"]
    assert prints["given"] != prints["tuned"]
    saved = load_model(done.folder / "teachers" / "teacher").module
    assert ModelSpec("saved", saved, 10, None).fingerprint() == prints["tuned"]
    before = load_model(teacher / "student").module
    assert ModelSpec("given", before, 10, None).fingerprint() == prints["given"]


def test_the_tuned_teacher_teaches_in_other_runs(done: RunResult, tmp_path: Path) -> None:
    found = recipe(done.folder / "teachers" / "teacher")
    found["method"] = {"name": "kd"}
    again = distill(found, folder=tmp_path / "run", progress=False).result
    tuned = [
        row
        for row in rows(done.result, "teachers")
        if row["teacher"] == "MCMI teacher" and row["rows"] == "test"
    ]
    assert again["teachers"]["teacher"]["test"]["accuracy"] == pytest.approx(tuned[0]["accuracy"])


def test_pictures_and_curves_are_in_the_report(done: RunResult) -> None:
    cams = rows(done.result, "Eigen-CAM")
    assert len(cams) == 2
    for row in cams:
        assert len({row["image"], row["MLL teacher"], row["MCMI teacher"]}) == 3
    page = (done.folder / "report.html").read_text(encoding="utf-8")
    assert all(row[name] in page for row in cams for name in ("image", "MLL teacher", "MCMI teacher"))
    assert "Accuracy train by cmi train" in page


def test_more_weight_means_more_information(teacher: Path, tmp_path: Path) -> None:
    """At equal length, against the same tuning without the term."""
    found = []
    for weight in (0.0, 0.25, 0.5):
        done = distill(recipe(teacher, cmi_weight=weight), folder=tmp_path / str(weight), progress=False)
        found.append(rows(done.result, "teacher by epoch")[-1]["cmi_train"])
    assert found[0] < found[1] < found[2]


def test_a_teacher_that_falls_is_stopped_and_the_epoch_before_counts(teacher: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"cmi_weight": 20.0, "optimizer": {"name": "sgd", "lr": 0.2}}
    with pytest.warns(UserWarning, match="its tuning ended and the epoch before counts"):
        done = distill(recipe(teacher, **options), folder=tmp_path / "run", progress=False)
    history = rows(done.result, "teacher by epoch")
    assert done.result["teacher_stopped_early"]
    assert history[-1]["accuracy_train"] < history[0]["accuracy_train"] - 0.02
    assert len(history) == 2
    kept, given = (
        load_file(f / "model.safetensors")
        for f in (done.folder / "teachers" / "teacher", teacher / "student")
    )
    assert all(torch.equal(value, given[name]) for name, value in kept.items())


def test_without_epochs_the_teacher_stays(teacher: Path, tmp_path: Path) -> None:
    done = distill(recipe(teacher, epochs=0), folder=tmp_path / "run", progress=False)
    prints = done.result["teacher_fingerprints"]
    assert prints["given"] == prints["tuned"]
    assert len(rows(done.result, "teacher by epoch")) == 1


@pytest.mark.parametrize(
    "options", [{"centroids": "ema", "ema_decay": 0.5}, {"release_mode": True, "student_method": "fitnet"}]
)
def test_every_way_runs(options: dict[str, Any], teacher: Path, tmp_path: Path) -> None:
    found = recipe(teacher, **options | {"epochs": 1})
    found["student"] = {"model": "digits:cnn-4-8"}
    assert distill(found, folder=tmp_path / "run", progress=False).result["status"] == "done"


def test_a_student_method_may_draw_from_held_out_rows(teacher: Path, tmp_path: Path) -> None:
    found = recipe(
        teacher, student_method="tgeo_kd", student_options={"warmup": 0.0, "outer_every": 1}, epochs=0
    )
    done = distill(found, folder=tmp_path / "run", progress=False)
    assert "ratio by epoch" in done.result["tables"]


def test_the_student_sees_its_share_and_no_omitted_class(teacher: Path, tmp_path: Path) -> None:
    done = distill(
        recipe(teacher, epochs=0, fraction=0.2, omit=[7, 1]), folder=tmp_path / "run", progress=False
    )
    labels = targets(open_data(DataConfig(**DATA), "classification").train)
    counts = labels.bincount(minlength=10)
    wanted = (counts * 0.2).round().clamp(min=1).long()
    wanted[[7, 1]] = 0
    assert done.result["student_rows"] == int(wanted.sum())
    assert {"accuracy", "accuracy_omitted", "accuracy_seen"} <= set(done.result["test"])


def test_a_share_of_every_class() -> None:
    labels = torch.tensor([0] * 40 + [2] * 10 + [1] * 4)
    labels = labels[torch.randperm(54, generator=torch.Generator().manual_seed(1))]

    def chosen(share: float) -> list[int]:
        return share_of_each(labels, share, torch.Generator().manual_seed(0))

    few, more = chosen(0.1), chosen(0.5)
    assert labels[few].bincount().tolist() == [4, 1, 1]
    assert labels[more].bincount().tolist() == [20, 2, 5]
    assert set(few) <= set(more)
    assert few == sorted(few)
    assert chosen(1.0) == list(range(54))


def test_rows_by_class() -> None:
    table, fewest = rows_by_class(torch.tensor([1, 0, 1, 0, 1]), 2)
    assert (table.tolist(), fewest) == ([[1, 3], [0, 2]], 2)
    with pytest.raises(ValueError, match="class 2 has no training rows"):
        rows_by_class(torch.tensor([0, 1]), 3)


def test_centroids_are_the_class_means_of_the_training_rows(teacher: Path, tmp_path: Path) -> None:
    """The stage's checkpoint holds those of the given teacher: they are fixed."""
    done = distill(recipe(teacher, epochs=1), folder=tmp_path / "run", progress=False)
    data = open_data(DataConfig(**DATA), "classification")
    batch = to_float(data.train.fetch(range(len(data.train))))
    assert isinstance(batch.inputs, torch.Tensor)
    assert batch.target is not None
    logits = load_model(teacher / "student").module.eval()((batch.inputs - 0.3) / 0.4)
    found = [
        tensor
        for path in (done.folder / "stages" / "teacher" / "checkpoints").rglob("*.safetensors")
        for name, tensor in load_file(path).items()
        if name.endswith("centroids")
    ]
    assert found
    torch.testing.assert_close(found[-1], class_centroids(logits, batch.target), rtol=1e-4, atol=1e-6)


def tuned() -> dict[str, Any]:
    """Losses by step, weights and centroids of a short tuning, in this rank."""
    losses = Losses()
    method = FineTune(MCMI.Config(name="mcmi", centroids="epoch", largest_drop=1.0))
    source = rows_of_four()
    runtime = Runtime("cpu")
    watch = Watch(method, {"train": source}, runtime, 5)
    config = train_config(epochs=2)
    task = build_task("classification", 4)
    trainer = Trainer(runtime, Net(seed=1), method, task, source, config, callbacks=[losses, watch])
    trainer.fit()
    weights = {name: value.clone() for name, value in method.kept.state_dict().items()}
    return {
        "losses": losses.steps,
        "weights": weights,
        "buffers": {"centroids": method.centroids.clone()},
    } | {"history": method.history}


def test_two_ranks_tune_as_one(pair: Any) -> None:
    alone = tuned()
    for found in pair.run(tuned):
        assert_same(alone, found)
        for one, other in zip(alone["history"], found["history"], strict=True):
            assert one == pytest.approx(other, rel=1e-5)


@pytest.mark.parametrize("step", [4, 40])
def test_killed_in_either_stage_it_ends_with_the_same_bits(step: int, teacher: Path, tmp_path: Path) -> None:
    def run(folder: Path, **options: Any) -> RunResult:
        return distill(recipe(teacher, centroids="ema"), folder=folder, progress=False, **options)

    whole = run(tmp_path / "whole")
    stop_after(step, lambda kill: run(tmp_path / "killed", callbacks=[kill]))
    resumed = run(tmp_path / "killed", resume=True)
    for part in ("student", "teachers/teacher"):
        one, other = (load_file(r.folder / part / "model.safetensors") for r in (whole, resumed))
        assert all(torch.equal(value, other[name]) for name, value in one.items())
    assert resumed.result["tables"] == whole.result["tables"]


def test_what_is_refused(teacher: Path) -> None:
    for method in ("wa", "dml", "none"):
        with pytest.raises(
            PairingError, match=f"student_method is `{method}`; mcmi takes a method of one training loop"
        ):
            check(recipe(teacher, student_method=method))
    with pytest.raises(ValueError, match="did you mean"):
        check(recipe(teacher, student_method="fitnett"))
    with pytest.raises(ValidationError, match="temperature"):
        check(recipe(teacher, student_options={"temperature": -1.0}))
    for omit in ([10], list(range(10))):
        with pytest.raises(ValueError, match="the data has classes 0 to 9, and one at least must stay"):
            check(recipe(teacher, omit=omit))
    two = recipe(teacher)
    two["teacher"] = {"one": two["teacher"], "other": two["teacher"]}
    with pytest.raises(PairingError, match="mcmi tunes one teacher; this recipe has 2"):
        check(two)
    for bad in (
        {"cmi_weight": -0.1},
        {"fraction": 1.0},
        {"fraction": 0.0},
        {"omit": (-1,)},
        {"centroids": "x"},
    ):
        with pytest.raises(ValidationError):
            MCMI.Config(name="mcmi", **bad)
