"""Models by name: seeds, options, weights, and errors that say the correction."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file, save_model
from torch import nn

from tutelage.models import ModelError, build_model
from tutelage.recipe.schema import ModelConfig

IMAGE = (3, 32, 32)
NAMES = [
    ("digits:mlp-8", (1, 8, 8)),
    ("digits:cnn-2-4", (1, 8, 8)),
    ("cifar:resnet20", IMAGE),
    ("timm:resnet10t", IMAGE),
]


def tensors(module: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def same(left: nn.Module, right: nn.Module) -> bool:
    ours, theirs = left.state_dict(), right.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


# --- seeds and descriptions


@pytest.mark.parametrize(("name", "shape"), NAMES)
def test_weights_depend_on_the_seed_alone(name: str, shape: tuple[int, ...]) -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first = build_model(name, outputs=4, input_shape=shape, seed=1).module
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(6)
    assert same(first, build_model(name, outputs=4, input_shape=shape, seed=1).module)
    assert not same(first, build_model(name, outputs=4, input_shape=shape, seed=2).module)


@pytest.mark.parametrize(("name", "shape"), NAMES)
def test_a_description_is_json_and_builds_the_model_again(name: str, shape: tuple[int, ...]) -> None:
    built = build_model(name, outputs=4, input_shape=shape)
    read = json.loads(json.dumps(built.description))
    assert (read["model"], read["outputs"], tuple(read["input_shape"])) == (name, 4, shape)
    config = ModelConfig.model_validate({key: read[key] for key in ModelConfig.model_fields})
    again = build_model(config, outputs=read["outputs"], input_shape=tuple(read["input_shape"]))
    assert same(built.module, again.module)
    assert built.module.eval()(torch.randn(2, *shape)).shape == (2, 4)


def test_modules_and_factories_from_python() -> None:
    module = nn.Linear(3, 2)
    built = build_model(module, outputs=2, input_shape=(3,))
    assert built.module is module
    assert built.description == {"model": "python"}
    first, second = (
        build_model(lambda: nn.Linear(3, 2), outputs=2, input_shape=(3,), seed=3) for _ in range(2)
    )
    assert same(first.module, second.module)
    with pytest.raises(ModelError, match="factory returned a int"):
        build_model(lambda: 3, outputs=2, input_shape=(3,))  # type: ignore[arg-type,return-value]


def test_normalisation_of_the_recipe_is_kept() -> None:
    config = ModelConfig(model="digits:mlp-4", mean=(0.3,), std=(0.2,))
    built = build_model(config, outputs=2, input_shape=(1, 8, 8))
    assert (built.mean, built.std) == ((0.3,), (0.2,))


# --- names and options


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("resnet18", r"did you mean 'timm:resnet18'\?"),
        ("resnet18.a1_in1k", r"did you mean 'timm:resnet18\.a1_in1k'\?"),
        ("resnet8x4", r"did you mean 'cifar:resnet8x4'\?"),
        ("tim:resnet18", r"did you mean 'timm:resnet18'\?"),
        ("cnn-4-8", r"did you mean 'digits:cnn-4-8'\?"),
        ("distilbert/base", r"did you mean 'hf:distilbert/base'\?"),
        ("resnet118", r"did you mean 'timm:resnet"),
        ("qqqq", "A name starts with its family: timm:resnet18, hf:"),
        ("timm:resnet118", r"did you mean .*'timm:resnet18'"),
        ("timm:resnet18.nope", r"unknown weights 'nope' of timm:resnet18; there are .*a1_in1k"),
        ("cifar:resnet8x3", r"did you mean .*'cifar:resnet8x4'"),
        ("digits:mlp", "write digits:mlp-64-16"),
        ("digits:cnn-0", "widths from 1 to 9999"),
        ("hf:", "names no model"),
    ],
)
def test_an_unknown_name_gives_the_correction(name: str, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        build_model(name, outputs=2, input_shape=IMAGE)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            {"model": "digits:mlp-4", "options": {"depth": 3}},
            "no option 'depth'; it has head_bias, confidence",
        ),
        (
            {"model": "digits:mlp-4", "options": {"confidence": -1.0}},
            "confidence is -1.0; allowed: numbers above 0",
        ),
        ({"model": "cifar:resnet20", "options": {"depth": 3}}, "no option 'depth'; it has none"),
        ({"model": "timm:resnet10t", "options": {"depht": 3}}, "timm:resnet10t has no option 'depht'"),
        ({"model": "cifar:resnet20", "weights": "pretrained"}, "no published weights"),
        ({"model": "timm:resnet10t", "revision": "main"}, "revision 'main' is of weights"),
        ({"model": "digits:mlp-4", "weights": "nowhere.safetensors"}, "do not exist; give `pretrained`"),
        ({"model": "digits:mlp-4", "weights": "nowhere"}, "do not exist"),
    ],
)
def test_wrong_options_and_weights(config: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        build_model(ModelConfig(**config), outputs=2, input_shape=IMAGE)


def test_options_reach_the_architecture() -> None:
    config = ModelConfig(model="digits:mlp-4", options={"head_bias": False})
    assert build_model(config, outputs=2, input_shape=(3,)).module.head.bias is None
    config = ModelConfig(model="timm:resnet10t", options={"drop_rate": 0.25})
    assert build_model(config, outputs=2, input_shape=IMAGE).module.drop_rate == 0.25


# --- timm


def test_timm_takes_the_datas_channels_and_size() -> None:
    config = ModelConfig(model="timm:vit_tiny_patch16_224", options={"depth": 1, "patch_size": 4})
    module = build_model(config, outputs=3, input_shape=(1, 8, 12)).module
    assert module.eval()(torch.randn(2, 1, 8, 12)).shape == (2, 3)
    assert build_model("timm:resnet10t", outputs=3, input_shape=(2, 40, 40)).module(
        torch.randn(2, 2, 40, 40)
    ).shape == (2, 3)
    with pytest.raises(ModelError, match=r"timm:resnet10t takes images .*gives \[5\]"):
        build_model("timm:resnet10t", outputs=3, input_shape=(5,))


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A hub of folders: ``hub(name, files)`` puts one there; ``hub.asked`` is what was downloaded."""
    import huggingface_hub

    class Hub:
        def __init__(self) -> None:
            self.asked: list[tuple[str, str, str | None]] = []

        def folder(self, name: str) -> Path:
            path = tmp_path / name.replace("/", "--")
            path.mkdir(exist_ok=True)
            return path

        def download(self, repo: str, filename: str, *, revision: str | None = None, **_: Any) -> str:
            self.asked.append((repo, filename, revision))
            path = self.folder(repo) / filename
            if not path.is_file():
                raise huggingface_hub.errors.EntryNotFoundError(f"no {filename}")
            return str(path)

    found = Hub()
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", found.download)
    return found


def save_timm(folder: Path, classes: int, **options: Any) -> nn.Module:
    import timm

    torch.manual_seed(9)
    model = timm.create_model("resnet10t", num_classes=classes, **options)
    save_file(model.state_dict(), folder / "model.safetensors")
    return model


def test_pretrained_weights_keep_or_replace_the_head(hub: Any) -> None:
    published = save_timm(hub.folder("timm/resnet10t.c3_in1k"), 1000)
    kept = build_model(
        ModelConfig(model="timm:resnet10t", weights="pretrained", revision="abc"),
        outputs=None,
        input_shape=IMAGE,
    )
    assert same(kept.module, published)
    assert kept.description["outputs"] == 1000
    assert hub.asked[0] == ("timm/resnet10t.c3_in1k", "model.safetensors", "abc")
    assert kept.mean == (0.485, 0.456, 0.406)
    assert kept.std == (0.229, 0.224, 0.225)
    changed = build_model(
        ModelConfig(model="timm:resnet10t", weights="pretrained"), outputs=6, input_shape=(1, 32, 32)
    )
    assert changed.module(torch.randn(2, 1, 32, 32)).shape == (2, 6)
    assert torch.equal(changed.module.layer1[0].conv1.weight, published.layer1[0].conv1.weight)
    weight = published.conv1[0].weight.sum(dim=1, keepdim=True)
    torch.testing.assert_close(changed.module.conv1[0].weight, weight)


def test_hub_weights_bring_their_own_classes_and_normalisation(hub: Any) -> None:
    folder = hub.folder("someone/birds")
    published = save_timm(folder, 7)
    (folder / "config.json").write_text(
        json.dumps({"pretrained_cfg": {"mean": [0.1, 0.2, 0.3], "std": [0.5, 0.6, 0.7]}})
    )
    config = ModelConfig(model="timm:resnet10t", weights="hub:someone/birds")
    built = build_model(config, outputs=None, input_shape=IMAGE)
    assert same(built.module, published)
    assert (built.mean, built.std) == ((0.1, 0.2, 0.3), (0.5, 0.6, 0.7))
    assert build_model(config, outputs=4, input_shape=IMAGE).module(torch.randn(2, *IMAGE)).shape == (2, 4)


def test_a_hub_repository_with_pickled_weights_alone_is_refused(hub: Any) -> None:
    (hub.folder("someone/old") / "pytorch_model.bin").write_bytes(b"cos\nsystem\n")
    with pytest.raises(ModelError, match=r"someone/old on the hub cannot be loaded: no model\.safetensors"):
        build_model(
            ModelConfig(model="timm:resnet10t", weights="hub:someone/old"), outputs=2, input_shape=IMAGE
        )
    assert {filename for _, filename, _ in hub.asked} == {"model.safetensors"}


def test_hub_weights_of_another_architecture_are_refused(hub: Any) -> None:
    save_file({"fc.weight": torch.zeros(3, 5)}, hub.folder("someone/else") / "model.safetensors")
    with pytest.raises(ModelError, match="someone/else on the hub does not fit timm:resnet10t"):
        build_model(
            ModelConfig(model="timm:resnet10t", weights="hub:someone/else"), outputs=None, input_shape=IMAGE
        )


def test_own_nets_take_hub_weights_too(hub: Any) -> None:
    source = build_model("digits:mlp-4", outputs=3, input_shape=(5,), seed=4).module
    save_model(source, str(hub.folder("someone/mlp") / "model.safetensors"))
    config = ModelConfig(model="digits:mlp-4", weights="hub:someone/mlp")
    assert same(build_model(config, outputs=None, input_shape=(5,)).module, source)


# --- files


@pytest.mark.parametrize("name", ["digits:mlp-4-6", "timm:resnet10t"])
def test_a_file_is_loaded_strictly(name: str, tmp_path: Path) -> None:
    source = build_model(name, outputs=3, input_shape=IMAGE, seed=4).module
    file = tmp_path / "weights.safetensors"
    save_file(source.state_dict(), file)
    config = ModelConfig(model=name, weights=str(file))
    assert same(build_model(config, outputs=3, input_shape=IMAGE).module, source)
    assert same(build_model(config, outputs=None, input_shape=IMAGE).module, source)
    with pytest.raises(ModelError, match=r"(head|fc)\.weight is \[3, \d+\] there and \[5, \d+\] here"):
        build_model(config, outputs=5, input_shape=IMAGE)


def test_missing_and_left_over_tensors_are_named(tmp_path: Path) -> None:
    state = tensors(build_model("digits:mlp-4", outputs=3, input_shape=(5,)).module)
    state["stray"] = state.pop("layer1.0.bias")
    save_file(state, tmp_path / "weights.safetensors")
    with pytest.raises(ModelError, match=r"missing layer1\.0\.bias; unexpected stray"):
        build_model(
            ModelConfig(model="digits:mlp-4", weights=str(tmp_path / "weights.safetensors")),
            outputs=3,
            input_shape=(5,),
        )


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("weights.pt", b"\x80\x02", "pickled weights are never opened"),
        ("weights.safetensors", b"short", "cannot be read as safetensors"),
    ],
)
def test_files_that_are_no_safetensors(name: str, content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ModelError, match=message):
        build_model(
            ModelConfig(model="digits:mlp-4", weights=str(tmp_path / name)), outputs=3, input_shape=(5,)
        )


def test_a_revision_belongs_to_the_hub(tmp_path: Path) -> None:
    config = ModelConfig(model="digits:mlp-4", weights=str(tmp_path), revision="v1")
    with pytest.raises(ModelError, match="revision 'v1' belongs to weights on the hub"):
        build_model(config, outputs=3, input_shape=(5,))
    with pytest.raises(ModelError, match=r"holds no model\.safetensors"):
        build_model(config.model_copy(update={"revision": None}), outputs=3, input_shape=(5,))


def test_own_nets_need_a_number_of_classes() -> None:
    with pytest.raises(ModelError, match="needs the number of classes"):
        build_model("digits:mlp-4", outputs=None, input_shape=(5,))


# --- transformers


@pytest.fixture
def vit_folder(tmp_path: Path) -> Path:
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTConfig(
        hidden_size=8,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=16,
        image_size=16,
        patch_size=8,
        num_labels=5,
    )
    torch.manual_seed(0)
    transformers.ViTForImageClassification(config).save_pretrained(tmp_path / "vit")
    preprocessing = {
        "image_mean": [0.5, 0.4, 0.3],
        "image_std": [0.2, 0.3, 0.4],
        "image_processor_type": "ViTImageProcessor",
    }
    (tmp_path / "vit" / "preprocessor_config.json").write_text(json.dumps(preprocessing))
    return tmp_path / "vit"


def test_hf_with_random_weights_takes_the_datas_shape(vit_folder: Path) -> None:
    config = ModelConfig(model=f"hf:{vit_folder}", options={"num_hidden_layers": 1})
    first = build_model(config, outputs=3, input_shape=(1, 8, 8), seed=1)
    assert first.module.eval()(torch.randn(2, 1, 8, 8)).logits.shape == (2, 3)
    assert len([m for m in first.module.modules() if type(m).__name__ == "ViTLayer"]) == 1
    assert first.mean is None
    assert same(first.module, build_model(config, outputs=3, input_shape=(1, 8, 8), seed=1).module)
    with pytest.raises(ModelError, match=r"no option 'num_hiden_layers'; near: num_hidden_layers"):
        build_model(
            ModelConfig(model=f"hf:{vit_folder}", options={"num_hiden_layers": 1}),
            outputs=3,
            input_shape=(1, 8, 8),
        )


def test_hf_with_pretrained_weights(vit_folder: Path) -> None:
    from transformers import ViTForImageClassification

    published = ViTForImageClassification.from_pretrained(vit_folder)
    config = ModelConfig(model=f"hf:{vit_folder}", weights="pretrained")
    built = build_model(config, outputs=None, input_shape=(3, 16, 16))
    assert same(built.module, published)
    assert built.description["outputs"] == 5
    assert (built.mean, built.std) == ((0.5, 0.4, 0.3), (0.2, 0.3, 0.4))
    other = build_model(config, outputs=3, input_shape=(3, 16, 16))
    assert other.module.classifier.weight.shape == (3, 8)
    strict = ModelConfig(model=f"hf:{vit_folder}", weights=str(vit_folder / "model.safetensors"))
    assert same(build_model(strict, outputs=5, input_shape=(3, 16, 16)).module, published)
    with pytest.raises(ModelError, match=r"classifier\.bias is \[5\] there and \[3\] here"):
        build_model(strict, outputs=3, input_shape=(3, 16, 16))


def test_hf_on_text(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    transformers.DistilBertConfig(vocab_size=50, dim=8, n_layers=1, n_heads=2, hidden_dim=16).save_pretrained(
        tmp_path
    )
    module = build_model(f"hf:{tmp_path}", outputs=4, input_shape=(6,)).module
    assert module.eval()(input_ids=torch.ones(2, 6, dtype=torch.long)).logits.shape == (2, 4)


def test_hf_errors(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    with pytest.raises(ModelError, match="hf:no-such/model cannot be had"):
        build_model("hf:no-such/model", outputs=2, input_shape=IMAGE)
    transformers.SamConfig().vision_config.save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="no image or text classifier"):
        build_model(f"hf:{tmp_path}", outputs=2, input_shape=IMAGE)


def test_hf_never_opens_pickled_weights(vit_folder: Path) -> None:
    (vit_folder / "model.safetensors").unlink()
    (vit_folder / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'true'\ntR.")
    config = ModelConfig(model=f"hf:{vit_folder}", weights="pretrained")
    with pytest.raises(ModelError, match="cannot be loaded"):
        build_model(config, outputs=None, input_shape=(3, 16, 16))


def test_without_transformers_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ModelError, match=r"pip install 'tutelage\[llm\]'"):
        build_model("hf:anything", outputs=2, input_shape=IMAGE)
