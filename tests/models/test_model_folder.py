"""Saved models: there and back, as their own libraries load them, with nothing in them but the student."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from tutelage.engine.taps import Tapped
from tutelage.models import BuiltModel, ModelError, build_model, load_model, save_model
from tutelage.recipe import RecipeError
from tutelage.recipe.schema import ModelConfig

NAMES = [
    ("digits:mlp-8", {"head_bias": False}, (1, 8, 8)),
    ("digits:cnn-2-4", {}, (1, 8, 8)),
    ("cifar:resnet20", {}, (3, 32, 32)),
    ("timm:resnet10t", {"drop_rate": 0.1}, (1, 32, 32)),
    ("timm:vit_tiny_patch16_224", {"depth": 2, "patch_size": 4}, (3, 8, 8)),
]


def trained(name: str, options: dict[str, Any], shape: tuple[int, ...]) -> BuiltModel:
    """A model whose weights and statistics have moved."""
    config = ModelConfig(model=name, options=options)
    built = build_model(config, outputs=4, input_shape=shape, seed=3)
    built.module.train()(torch.randn(4, *shape))
    with torch.no_grad():
        for parameter in built.module.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.01)
    mean = tuple(0.1 + 0.1 * channel for channel in range(shape[0]))
    return built._replace(mean=mean, std=tuple(2 * value for value in mean))


@pytest.mark.parametrize(("name", "options", "shape"), NAMES)
def test_there_and_back(name: str, options: dict[str, Any], shape: tuple[int, ...], tmp_path: Path) -> None:
    built = trained(name, options, shape)
    save_model(built, tmp_path / "student")
    read = load_model(tmp_path / "student")
    assert read._replace(module=built.module) == built
    x = torch.randn(2, *shape)
    assert torch.equal(read.module.eval()(x), built.module.eval()(x))
    as_weights = ModelConfig(model=name, options=options, weights=str(tmp_path / "student"))
    again = build_model(as_weights, outputs=None, input_shape=shape)
    assert torch.equal(again.module.eval()(x), built.module.eval()(x))
    assert (again.mean, again.std) == (built.mean, built.std)


@pytest.mark.parametrize(("name", "options", "shape"), NAMES[3:])
def test_timm_loads_it_without_us(
    name: str, options: dict[str, Any], shape: tuple[int, ...], tmp_path: Path
) -> None:
    built = trained(name, options, shape)
    save_model(built, tmp_path / "student")
    x = torch.randn(2, *shape)
    save_file({"x": x}, tmp_path / "x.safetensors")
    code = (
        "import sys, timm\n"
        "from safetensors.torch import load_file, save_file\n"
        f"x = load_file({str(tmp_path / 'x.safetensors')!r})['x']\n"
        f"model = timm.create_model({'local-dir:' + str(tmp_path / 'student')!r}, pretrained=True).eval()\n"
        f"save_file({{'y': model(x).detach()}}, {str(tmp_path / 'y.safetensors')!r})\n"
        "assert 'tutelage' not in sys.modules\n"
        "print(list(model.pretrained_cfg['mean']), list(model.pretrained_cfg['input_size']))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == f"{list(built.mean or ())} {list(shape)}"
    torch.testing.assert_close(load_file(tmp_path / "y.safetensors")["y"], built.module.eval()(x))


def test_transformers_loads_it_without_us(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    transformers.ViTConfig(
        hidden_size=8,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=16,
        image_size=16,
        patch_size=8,
    ).save_pretrained(tmp_path / "config")
    built = build_model(f"hf:{tmp_path / 'config'}", outputs=4, input_shape=(3, 16, 16), seed=1)
    save_model(built, tmp_path / "student")
    x = torch.randn(2, 3, 16, 16)
    expected = built.module.eval()(x).logits
    alone = transformers.AutoModelForImageClassification.from_pretrained(tmp_path / "student")
    assert torch.equal(alone.eval()(x).logits, expected)
    read = load_model(tmp_path / "student")
    assert torch.equal(read.module.eval()(x).logits, expected)
    assert read.description == built.description


def test_no_tap_and_no_projector_ships(tmp_path: Path) -> None:
    built = trained(*NAMES[1])
    tapped = Tapped(built.module, mean=built.mean, std=built.std)
    tapped(torch.randn(2, 1, 8, 8), ("layer1",))
    save_model(built, tmp_path / "student")
    assert set(load_file(tmp_path / "student" / "model.safetensors")) == set(built.module.state_dict())
    assert sorted(path.name for path in (tmp_path / "student").iterdir()) == [
        "model.safetensors",
        "tutelage.json",
    ]


def test_a_folder_is_replaced_whole(tmp_path: Path) -> None:
    folder = tmp_path / "student"
    save_model(trained(*NAMES[3]), folder)
    assert (folder / "config.json").exists()
    save_model(trained(*NAMES[0]), folder)
    assert not (folder / "config.json").exists()
    assert load_model(folder).description["model"] == "digits:mlp-8"
    assert [path.name for path in tmp_path.iterdir()] == ["student"]


def test_a_failed_save_leaves_the_old_one(tmp_path: Path) -> None:
    built = trained(*NAMES[0])
    save_model(built, tmp_path / "student")
    with pytest.raises(TypeError):
        save_model(built._replace(description=built.description | {"stray": object()}), tmp_path / "student")
    assert load_model(tmp_path / "student").description == built.description


def test_a_module_from_python_keeps_its_weights(tmp_path: Path) -> None:
    tied = nn.ModuleDict({"a": nn.Linear(3, 3), "b": nn.Linear(3, 3)})
    tied["b"].weight = tied["a"].weight  # type: ignore[union-attr]
    save_model(build_model(tied, outputs=3, input_shape=(3,)), tmp_path / "student")
    with pytest.raises(ModelError, match=r"a module from Python, .*safetensors\.torch\.load_model"):
        load_model(tmp_path / "student")
    assert len(load_file(tmp_path / "student" / "model.safetensors")) == 3


def test_a_student_that_a_method_wrapped_keeps_its_weights(tmp_path: Path) -> None:
    built = trained(*NAMES[3])
    wrapped = built._replace(module=nn.Sequential(built.module))
    save_model(wrapped, tmp_path / "student")
    assert json.loads((tmp_path / "student" / "tutelage.json").read_text())["description"] == {
        "model": "python"
    }


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda folder: (folder / "tutelage.json").unlink(), r"holds no tutelage\.json"),
        (lambda folder: (folder / "tutelage.json").write_text("{"), "is no JSON"),
        (
            lambda folder: (folder / "tutelage.json").write_text('{"format": 9}'),
            "has format 9; this version reads 1",
        ),
        (lambda folder: (folder / "model.safetensors").unlink(), r"holds no model\.safetensors"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b"\x10"), "cannot be read as safetensors"),
    ],
)
def test_a_spoilt_folder(spoil: Any, message: str, tmp_path: Path) -> None:
    save_model(trained(*NAMES[0]), tmp_path / "student")
    spoil(tmp_path / "student")
    with pytest.raises(ModelError, match=message):
        load_model(tmp_path / "student")


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="do not exist"):
        load_model(tmp_path / "student")


def test_rows_of_unequal_lengths_are_for_models_of_text(tmp_path: Path) -> None:
    save_model(build_model("digits:mlp-8", outputs=10, input_shape=(1, 8, 8)), tmp_path / "student")
    card = tmp_path / "student" / "tutelage.json"
    content = json.loads(card.read_text())
    content["description"]["input_shape"] = []
    card.write_text(json.dumps(content))
    with pytest.raises(RecipeError, match="input_shape is empty; only transformers' models"):
        load_model(tmp_path / "student")
