"""Encoders from end to end by the shipped recipes, on a few real rows: run, report, and all that is made of a run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tutelage.export.errors import ExportError
from tutelage.export.run import export_run
from tutelage.export.targets import find_targets
from tutelage.export.worker import Worker
from tutelage.recipe import load_recipe
from tutelage.recipe.schema import Recipe
from tutelage.runs import distill
from tutelage.runs.cache import cache
from tutelage.runs.explain import explain

transformers = pytest.importorskip("transformers")

FEW = (
    "data.limit=64",
    "data.tokenizer.train=400",
    "data.validation=16",
    "data.evaluation_limit=40",
    "train.epochs=2",
    "train.batch_size=16",
    "train.device=cpu",
    "train.threads=1",
)
SST2 = "sst2"
WIKIANN = "wikiann"


def recipe(name: str, root: Path, *more: str) -> Recipe:
    """A shipped recipe on a few local rows, its teacher's too."""
    local = ["data.config=null"] if name == WIKIANN else []
    path = root / (f"{name}/en" if name == WIKIANN else name)
    few = [*FEW, *local, "output.report=false"]
    given = [*FEW, *local, f"data.path={path}", f"teacher.overrides={json.dumps(few)}", *more]
    return load_recipe(name, given)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("text")


@pytest.fixture(scope="module", autouse=True)
def teachers(place: Path) -> Any:
    """One teacher a recipe, for all tests here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TUTELAGE_TEACHERS", str(place / "teachers"))
        yield


@pytest.fixture(scope="module")
def sst2(place: Path, data_root: Path) -> Path:
    return distill(recipe(SST2, data_root), folder=place / SST2, progress=False).folder


@pytest.fixture(scope="module")
def wikiann(place: Path, data_root: Path) -> Path:
    return distill(recipe(WIKIANN, data_root), folder=place / WIKIANN, progress=False).folder


def read(folder: Path, name: str) -> Any:
    return json.loads((folder / name).read_text())


def test_sentences_are_classified_and_the_report_shows_them(sst2: Path) -> None:
    result, analysis = read(sst2, "result.json"), read(sst2, "analysis.json")
    assert result["data"]["rows"] == {"train": 64, "validation": 16, "test": 40}
    assert result["student"]["parameters"] < result["teachers"]["teacher"]["parameters"]
    assert set(result["test"]) == {"accuracy", "calibration_error", "loss", "agreement"}
    assert (analysis["items"], analysis["rows"]) == ("rows", 40)
    assert sum(map(sum, analysis["student"]["confusion"])) == 40
    assert set(analysis["embeddings"]["models"]) == {"student", "teacher"}
    page = (sst2 / "report.html").read_text(encoding="utf-8")
    assert "on 40 test rows" in page
    for example in analysis["examples"]:
        assert example["picture"] is None
        assert len(example["text"].split()) > 1


def test_words_are_tagged_and_the_report_counts_tokens(wikiann: Path) -> None:
    result, analysis = read(wikiann, "result.json"), read(wikiann, "analysis.json")
    assert set(result["test"]) >= {"accuracy", "loss", "agreement"}
    assert result["best"]["metric"] == "f1"
    assert (analysis["items"], analysis["classes"][1]) == ("tokens", "B-PER")
    assert sum(map(sum, analysis["student"]["confusion"])) == analysis["rows"] > 40
    page = (wikiann / "report.html").read_text(encoding="utf-8")
    assert f"on {analysis['rows']} test tokens" in page
    for example in analysis["examples"]:
        before, marked, after = example["text"].replace("«", "»").split("»")
        assert marked.strip() == marked != ""
        assert len(before) + len(after) > 0


@pytest.mark.parametrize(
    ("name", "method"), [(SST2, "fkl"), (SST2, "none"), (WIKIANN, "fkl"), (WIKIANN, "none")]
)
def test_other_methods_of_tokens_run_too(name: str, method: str, place: Path, data_root: Path) -> None:
    given = recipe(name, data_root, f"method={method}", "output.report=false")
    result = distill(given, folder=place / f"{name}-{method}", progress=False).result
    assert result["status"] == "done"
    assert result["test"]["accuracy"] > 0


@pytest.mark.parametrize("name", [SST2, WIKIANN])
def test_layers_are_compared(name: str, request: pytest.FixtureRequest) -> None:
    found = explain(request.getfixturevalue(name))
    cka = torch.tensor(found["teachers"]["teacher"]["cka"])
    assert cka.shape == (len(found["student"]["layers"]), len(found["teachers"]["teacher"]["layers"]))
    assert bool(((cka >= 0) & (cka <= 1)).all())


@pytest.mark.parametrize(
    ("name", "kind"), [(SST2, "BertForSequenceClassification"), (WIKIANN, "BertForTokenClassification")]
)
def test_weights_are_exported_with_their_tokeniser(
    name: str, kind: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    run = request.getfixturevalue(name)
    done = export_run(run, ["safetensors"], out=tmp_path / "out")
    assert done["formats"]["safetensors"]["check"]["agreement"] == 1
    fast = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    model = getattr(transformers, kind).from_pretrained(tmp_path / "out").eval()
    with torch.no_grad():
        logits = model(**fast(["a film that is worth it"], return_tensors="pt")).logits
    assert logits.shape[-1] == read(run, "result.json")["data"]["outputs"]
    card = (tmp_path / "out" / "README.md").read_text()
    task = {SST2: "text-classification", WIKIANN: "token-classification"}[name]
    assert f"pipeline_tag: {task}" in card
    assert "AutoTokenizer.from_pretrained" in card


def test_graphs_of_text_models_are_refused_before_anything_is_written(sst2: Path, tmp_path: Path) -> None:
    with pytest.raises(
        ExportError, match=r"reads tokens, and graphs \(torch, onnx\) of such are not built yet"
    ):
        export_run(sst2, ["safetensors", "torch", "onnx"], out=tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_students_and_teachers_are_measured(sst2: Path, wikiann: Path) -> None:
    common = {"device": "cpu", "threads": 1, "compile": False, "batch_size": 2}
    for run in (sst2, wikiann):
        result, targets = read(run, "result.json"), find_targets(str(run), None, None)
        for target, profile in zip(targets, (result["teachers"]["teacher"], result["student"]), strict=True):
            worker = Worker(target.spec() | common)
            assert worker.about()["parameters"] == profile["parameters"]
            assert len(worker.time(2, 0.0)["times"]) == 3


def test_a_text_teacher_by_name_is_measured_with_the_tokens_of_its_run(sst2: Path, tmp_path: Path) -> None:
    """Time and memory need no weights, but a vocabulary of the size that the run had."""
    run = tmp_path / "run"
    run.mkdir()
    (run / "student").symlink_to(sst2 / "student")
    content = load_recipe(sst2 / "recipe.yaml").model_dump(mode="json", exclude_unset=True)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    content["teacher"] = {"model": "config:bert", "options": sizes}
    (run / "recipe.yaml").write_text(json.dumps(content))
    teacher = find_targets(str(run), None, None)[0]
    assert (teacher.kind, teacher.vocabulary, teacher.input_shape) == ("name", 448, (128,))
    worker = Worker(teacher.spec() | {"device": "cpu", "threads": 1, "compile": False, "batch_size": 2})
    assert worker.tokens == 448


def test_a_stored_teacher_of_texts_teaches_as_the_live_one(
    place: Path, data_root: Path, sst2: Path, tmp_path: Path
) -> None:
    cache(recipe(SST2, data_root), tmp_path / "store", progress=False)
    teacher = json.dumps({"store": str(tmp_path / "store")})
    given = recipe(SST2, data_root, f"teacher={teacher}")
    stored = distill(given, folder=tmp_path / "run", progress=False).result
    live = read(sst2, "result.json")
    for metric in ("accuracy", "loss"):
        assert stored["test"][metric] == pytest.approx(live["test"][metric], abs=1e-4)


def test_answers_of_tokens_are_not_stored(data_root: Path, tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match="token-classification has an answer a token and rows of unequal lengths"
    ):
        cache(recipe(WIKIANN, data_root), tmp_path / "store", progress=False)
    assert list(tmp_path.iterdir()) == []


def test_features_of_texts_are_not_stored(data_root: Path, tmp_path: Path) -> None:
    taps = 'cache.taps=["bert.encoder.layer.0"]'
    with pytest.raises(ValueError, match=r"bert\.encoder\.layer\.0: features of texts of unequal lengths"):
        cache(recipe(SST2, data_root, taps), tmp_path / "store", progress=False)
    assert list(tmp_path.iterdir()) == []


def test_entities_need_tags(tmp_path: Path) -> None:
    import pandas

    words = [[f"dog{row}", f"sees{row}", f"cat{row}"] for row in range(100, 200)]
    table = pandas.DataFrame({"words": words, "tags": [["NOUN", "VERB", "NOUN"]] * len(words)})
    table.to_parquet(tmp_path / "train.parquet")
    given = {
        "task": "token-classification",
        "data": {
            "path": str(tmp_path / "train.parquet"),
            "text": "words",
            "target": "tags",
            "tokenizer": {"train": 300},
        },
        "student": {"model": "config:bert"},
        "method": "none",
        "train": {"steps": 1, "optimizer": {"name": "adamw", "lr": 0.001}},
        "evaluation": {"best": "f1"},
    }
    with pytest.raises(
        ValueError, match=r"evaluation\.best is 'f1'; on this data token-classification has accuracy, loss"
    ):
        distill(given, folder=tmp_path / "run", progress=False)
    assert not (tmp_path / "run").exists()
