"""The model card: figures from the run, licences where they are stated, nothing of data's making as markup."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import yaml
from huggingface_hub import ModelCard

from tutelage.export.card import _fenced, _text
from tutelage.export.licences import UNKNOWN, data_licence, teacher_licence
from tutelage.export.run import export_run
from tutelage.recipe import load_recipe
from tutelage.recipe.schema import TeacherConfig


@pytest.fixture(scope="module")
def run(cnn_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy whose classes and teacher are named by somebody unkind."""
    folder = tmp_path_factory.mktemp("card") / "run"
    shutil.copytree(cnn_run, folder)
    result = json.loads((folder / "result.json").read_text())
    result["teachers"]["teacher"]["model"] = "<script>alert(1)</script> | [x](http://y)\n# head"
    (folder / "result.json").write_text(json.dumps(result))
    return folder


@pytest.fixture(scope="module")
def text(run: Path) -> str:
    return (Path(export_run(run, ["safetensors", "int4"])["folder"]) / "README.md").read_text()


def test_front_matter_is_the_hubs_and_its_figures_the_runs(text: str, run: Path) -> None:
    card = ModelCard(text)
    result = json.loads((run / "result.json").read_text())
    found = {each.metric_type: each.metric_value for each in card.data.eval_results or []}
    assert found == result["test"]
    head = yaml.safe_load(text.split("---")[1])
    assert head["tags"] == ["knowledge-distillation", "kd"]
    assert head["pipeline_tag"] == "image-classification"
    assert "license" not in head


def test_figures_method_files_and_losses_by_rounding_are_there(text: str, run: Path) -> None:
    result = json.loads((run / "result.json").read_text())
    kept = json.loads((run / "export" / "export.json").read_text())
    assert f"{result['student']['parameters']:,}" in text
    assert f"{result['test']['accuracy']:.4g}" in text
    assert "https://arxiv.org/abs/1503.02531" in text
    assert f"{kept['formats']['int4']['bytes']:,}" in text
    assert (
        f"{kept['float_metrics']['accuracy']:.4g} → {kept['formats']['int4']['metrics']['accuracy']:.4g}"
        in text
    )
    assert "licence not stated" in text
    assert "Seed 0" in text


def test_what_comes_from_elsewhere_is_no_markup(text: str) -> None:
    assert "<script>" not in text
    assert _text("<script>alert(1)</script> | [x](http://y)\n# head") in text
    assert _text("<b> | [x](y)") == r"&lt;b&gt; \| \[x\]\(y\)"
    assert _text("a\n\n# b") == "a \\# b"
    assert _fenced("x\n```\ny", "yaml").startswith("````yaml\n")


def test_no_path_of_this_machine_is_in_the_card(hf_run: Path, tmp_path: Path) -> None:
    made = export_run(hf_run, ["safetensors"], out=tmp_path / "out")
    card = (Path(made["folder"]) / "README.md").read_text()
    assert "hf:vit" in card.replace("\\", "")
    assert str(hf_run.parent) not in card.replace("\\", "")


def test_licences_are_those_of_local_cards_and_are_never_guessed(tmp_path: Path, cnn_run: Path) -> None:
    recipe = load_recipe(cnn_run / "recipe.yaml")
    assert data_licence(recipe) == UNKNOWN
    data, weights = tmp_path / "data", tmp_path / "weights"
    data.mkdir()
    weights.mkdir()
    (data / "README.md").write_text("---\nlicense: [mit, cc-by-4.0]\n---\n# data\n")
    (weights / "README.md").write_text("---\nlicense: apache-2.0\n---\n")
    here = recipe.model_copy(update={"data": recipe.data.model_copy(update={"path": str(data)})})
    assert data_licence(here) == "mit, cc-by-4.0"
    teacher = TeacherConfig(model="timm:test_vit", weights=str(weights / "model.safetensors"))
    assert teacher_licence(teacher) == UNKNOWN  # there are no such weights
    (weights / "model.safetensors").touch()
    assert teacher_licence(teacher) == "apache-2.0"
    for broken in ("---\n: [\n---\n", "no front matter", "---\n- a\n---\n"):
        (data / "README.md").write_text(broken)
        assert data_licence(here) == UNKNOWN
