"""Code that comes with a model or with data runs only where the recipe says so, and is named before."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner, Result

from tutelage.cli.app import app
from tutelage.models import BuiltModel, ModelError, build_model, load_model, save_model
from tutelage.models.hf_models import RemoteCodeWarning
from tutelage.recipe import RecipeError, load_recipe, validate
from tutelage.recipe.schema import ModelConfig, TeacherConfig

pytest.importorskip("transformers")

CONFIGURATION = """
from pathlib import Path
from transformers import PretrainedConfig

Path({mark!r}).touch()

class OwnConfig(PretrainedConfig):
    model_type = "own-model"

    def __init__(self, width=8, **rest):
        self.width = width
        super().__init__(**rest)
"""
MODEL = """
import torch
from transformers import PreTrainedModel
from transformers.modeling_outputs import ImageClassifierOutput
from .configuration_own import OwnConfig

class OwnForImageClassification(PreTrainedModel):
    config_class = OwnConfig
    main_input_name = "pixel_values"
    _supports_sdpa = True

    def __init__(self, config):
        super().__init__(config)
        self.classifier = torch.nn.Linear(64, config.num_labels)
        self.post_init()

    def _init_weights(self, module):
        pass

    def forward(self, pixel_values, **rest):
        return ImageClassifierOutput(logits=self.classifier(pixel_values.flatten(1)))
"""
SHAPE = (1, 8, 8)


@pytest.fixture
def mark(tmp_path: Path) -> Path:
    return tmp_path / "mark"


@pytest.fixture(scope="module", autouse=True)
def modules(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Where the library copies such code; it stays on the path of this process."""
    with pytest.MonkeyPatch.context() as patch:
        place = str(tmp_path_factory.mktemp("modules"))
        patch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", place)
        yield


@pytest.fixture
def model(tmp_path: Path, mark: Path) -> str:
    """A folder in the hub's layout whose configuration and model are code of its own."""
    folder = tmp_path / "own_model"
    folder.mkdir()
    (folder / "configuration_own.py").write_text(CONFIGURATION.format(mark=str(mark)))
    (folder / "modeling_own.py").write_text(MODEL)
    auto = {
        "AutoConfig": "configuration_own.OwnConfig",
        "AutoModelForImageClassification": "modeling_own.OwnForImageClassification",
    }
    (folder / "config.json").write_text(json.dumps({"model_type": "own-model", "auto_map": auto}))
    return f"hf:{folder}"


def built(model: str) -> BuiltModel:
    with pytest.warns(RemoteCodeWarning, match="own_model: code that comes with this model may run now"):
        return build_model(ModelConfig(model=model, trust_remote_code=True), outputs=10, input_shape=SHAPE)


def test_it_does_not_run_unasked(model: str, mark: Path) -> None:
    with pytest.raises(ModelError, match="trust_remote_code"):
        build_model(ModelConfig(model=model), outputs=10, input_shape=SHAPE)
    assert not mark.exists()


def test_it_runs_where_the_recipe_says_so(model: str, mark: Path) -> None:
    assert built(model).module.classifier.out_features == 10  # type: ignore[union-attr]
    assert mark.exists()


def test_a_saved_model_cannot_ask_for_it_itself(model: str, mark: Path, tmp_path: Path) -> None:
    """A run's folder may come from anyone: what stands in it is no consent."""
    save_model(built(model), tmp_path / "run" / "student")
    mark.unlink()
    with pytest.raises(ModelError, match="which nobody here trusted"):
        load_model(tmp_path / "run" / "student")
    assert not mark.exists()


def recipe(model: str, **student: Any) -> dict[str, Any]:
    return {
        "data": {"path": "digits", "limit": 64, "validation": 32},
        "student": {"model": model, **student},
        "method": "none",
        "train": {"steps": 2, "batch_size": 16, "device": "cpu", "threads": 1},
    }


def typed(content: dict[str, Any], folder: Path, *words: str) -> Result:
    file = folder / "recipe.yaml"
    file.write_text(yaml.safe_dump(content))
    return CliRunner().invoke(app, ["run", str(file), *words], prog_name="tutelage")


@pytest.mark.filterwarnings("default::tutelage.models.hf_models.RemoteCodeWarning")
@pytest.mark.parametrize("teacher", [False, True])
def test_the_command_line_names_it_first(model: str, mark: Path, tmp_path: Path, teacher: bool) -> None:
    trusting = recipe(model, trust_remote_code=True)
    if teacher:
        trusting |= {"student": {"model": "digits:mlp-8"}, "teacher": trusting["student"], "method": "kd"}
    done = typed(trusting, tmp_path, "--dry-run")
    assert done.exit_code == 0, done.output
    named = done.stderr.index("warning: hf:")
    assert "own_model: code that comes with this model may run now, with your rights" in done.stderr[named:]
    assert mark.exists()


def test_the_command_line_refuses_it_otherwise(model: str, mark: Path, tmp_path: Path) -> None:
    done = typed(recipe(model), tmp_path, "--dry-run")
    assert done.exit_code == 2
    assert done.stderr.startswith("error: ")
    assert not mark.exists()


def test_trust_belongs_to_what_is_loaded() -> None:
    assert validate(TeacherConfig, {"run": "runs/x", "trust_remote_code": True}).trust_remote_code
    with pytest.raises(RecipeError, match="trust_remote_code only together with `model` or `run`"):
        validate(TeacherConfig, {"recipe": "digits", "trust_remote_code": True})


def test_no_recipe_that_is_shipped_trusts_code() -> None:
    from tutelage.recipe import shipped

    for name in shipped():
        found = load_recipe(name).model_dump_json()
        assert '"trust_remote_code":true' not in found, name


@pytest.mark.parametrize("option", ["auto_map", "_attn_implementation", "attn_implementation", "update"])
def test_options_of_a_model_name_no_code(option: str, tmp_path: Path) -> None:
    import transformers

    transformers.ViTConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1).save_pretrained(
        tmp_path
    )
    with pytest.raises(ModelError, match=f"no option '{option}'"):
        build_model(
            ModelConfig(model=f"hf:{tmp_path}", options={option: "some/kernel"}),
            outputs=2,
            input_shape=(3, 32, 32),
        )
