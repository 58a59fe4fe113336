"""What may be made anew of a model whose weights come from elsewhere: a classifier's head, and nothing that knows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from small_text import OPTIONS, padded, text_model

from tutelage.models import ModelError, build_model, save_model
from tutelage.recipe.schema import ModelConfig

transformers = pytest.importorskip("transformers")


def test_a_language_model_has_no_part_made_anew(tmp_path: Path) -> None:
    """A classifier's head may be; of a language model that would be a teacher that knows nothing."""
    save_model(text_model("llama", "classification"), tmp_path / "classifier")
    given = ModelConfig(model=f"hf:{tmp_path / 'classifier'}", weights="pretrained")
    with pytest.raises(ModelError, match=r"does not fit this LlamaForCausalLM: missing lm_head\.weight"):
        build_model(given, outputs=None, input_shape=(8,), task="language-model")
    headless = build_model(given, outputs=5, input_shape=(8,), task="token-classification").module
    assert headless.eval()(**padded()).logits.shape == (2, 12, 5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"intermediate_size": 64}, r"intermediate\.dense\.bias is \[48\] there and \[64\] here"),
        ({"max_position_embeddings": 600}, r"position_embeddings\.weight is \[512, 32\] there"),
        ({"num_hidden_layers": 3}, r"missing bert\.encoder\.layer\.2\."),
    ],
)
def test_of_trained_weights_the_body_is_whole(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    """Sizes that the weights do not have would leave a teacher with random parts."""
    save_model(text_model("bert", "token-classification"), tmp_path / "trained")
    given = ModelConfig(model=f"hf:{tmp_path / 'trained'}", weights="pretrained", options=options)
    with pytest.raises(ModelError, match=message):
        build_model(given, outputs=5, input_shape=(8,), task="token-classification")


@pytest.mark.parametrize("kind", ["clip", "timm"])
def test_where_no_prefix_tells_the_body_half_of_it_must_be_there(kind: str, tmp_path: Path) -> None:
    made: Any
    if kind == "clip":
        vision = {
            "hidden_size": 32,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "intermediate_size": 48,
        }
        config = transformers.CLIPConfig(vision_config=vision | {"image_size": 8, "patch_size": 4})
        made = transformers.CLIPForImageClassification(config)
    else:
        made = transformers.TimmWrapperForImageClassification(
            transformers.TimmWrapperConfig(architecture="resnet10t", num_classes=3)
        )
    made.save_pretrained(tmp_path)
    given = ModelConfig(model=f"hf:{tmp_path}", weights="pretrained")
    model = build_model(given, outputs=7, input_shape=(3, 8, 8), task="classification").module
    new = [name for name, tensor in model.state_dict().items() if len(tensor.shape) and tensor.shape[0] == 7]
    assert len(new) == 2
    kept = made.state_dict()
    assert all(
        torch.equal(tensor, kept[name]) for name, tensor in model.state_dict().items() if name not in new
    )
    empty = dict(list(kept.items())[-3:])
    save_file(empty, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"does not fit this .*ForImageClassification: .*missing"):
        build_model(given, outputs=7, input_shape=(3, 8, 8), task="classification")


def test_a_classifier_of_a_masked_language_model_has_a_new_pooler(tmp_path: Path) -> None:
    settings = transformers.BertConfig(**OPTIONS["bert"], vocab_size=100)
    published = transformers.BertForMaskedLM(settings)
    published.save_pretrained(tmp_path)
    given = ModelConfig(model=f"hf:{tmp_path}", weights="pretrained")
    model: Any = build_model(given, outputs=3, input_shape=(8,), task="classification").module
    kept = {name: tensor for name, tensor in model.bert.state_dict().items() if "pooler" not in name}
    assert all(torch.equal(tensor, published.bert.state_dict()[name]) for name, tensor in kept.items())
    assert model.classifier.weight.shape == (3, 32)
