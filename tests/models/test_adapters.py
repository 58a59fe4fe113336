"""Adapters: they alone are trained, and what ships is the plain model with them merged."""

from __future__ import annotations

import copy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from small_text import FAMILIES, packed, padded, text_model
from torch import nn

from tutelage.models import BuiltModel, ModelError, load_model, merge_lora, save_model
from tutelage.models.adapters import has_lora
from tutelage.recipe import RecipeError, validate
from tutelage.recipe.models import LoraConfig
from tutelage.recipe.schema import ModelConfig, Recipe

pytest.importorskip("peft")
LORA = LoraConfig(rank=2, dropout=0.1)
DEFAULTS = {
    "llama": {"q_proj", "v_proj"},
    "qwen2": {"q_proj", "v_proj"},
    "gpt2": {"c_attn"},
    "bert": {"query", "value"},
}


def trainable(module: nn.Module) -> set[str]:
    return {name for name, parameter in module.named_parameters() if parameter.requires_grad}


def adapted(module: nn.Module) -> set[str]:
    return {path for path, each in module.named_modules() if hasattr(each, "lora_A")}


def logits(model: Any, inputs: dict[str, Any]) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(**inputs).logits  # type: ignore[no-any-return]


def train(module: nn.Module, inputs: dict[str, torch.Tensor]) -> None:
    parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
    optimizer = torch.optim.Adam(parameters, lr=0.05)
    module.train()
    for _ in range(3):
        optimizer.zero_grad()
        module(**inputs).logits.float().logsumexp(-1).mean().backward()
        optimizer.step()


def text(
    kind: str, task: str = "language-model", **fields: Any
) -> tuple[BuiltModel, dict[str, torch.Tensor]]:
    return text_model(kind, task, **fields), packed() if task == "language-model" else padded()


@pytest.mark.parametrize("kind", FAMILIES)
@pytest.mark.parametrize("task", ["language-model", "token-classification"])
def test_adapters_alone_are_trained_and_merged_at_the_end(kind: str, task: str, tmp_path: Path) -> None:
    plain, inputs = text(kind, task)
    built, _ = text(kind, task, lora=LORA)
    module = built.module
    # Nothing is added yet, and nothing is where it was not: paths of modules and weights are the plain model's.
    assert torch.equal(logits(module, inputs), logits(plain.module, inputs))
    assert {path for path, _ in plain.module.named_modules()} <= {path for path, _ in module.named_modules()}
    assert {path.rpartition(".")[2] for path in adapted(module)} == DEFAULTS[kind]
    heads = {name for name in trainable(module) if "lora_" not in name}
    assert heads == (
        set() if task == "language-model" else {name for name in heads if name[:5] in ("score", "class")}
    )
    frozen = {name: p.clone() for name, p in module.named_parameters() if not p.requires_grad}
    train(module, inputs)
    assert all(torch.equal(dict(module.named_parameters())[name], old) for name, old in frozen.items())
    moved = logits(module, inputs)
    assert (moved - logits(plain.module, inputs)).abs().max() > 1e-3
    with pytest.raises(ModelError, match="adapters that are not merged"):
        save_model(built, tmp_path / "student")
    merge_lora(module)
    torch.testing.assert_close(logits(module, inputs), moved, atol=1e-5, rtol=1e-5)
    assert module.state_dict().keys() == plain.module.state_dict().keys()
    assert str(module) == str(plain.module)
    assert trainable(module) == trainable(plain.module)
    save_model(built, tmp_path / "student")
    expected = logits(module, inputs)
    alone: Any = type(plain.module)
    read = alone.from_pretrained(tmp_path / "student", output_loading_info=True)
    assert not read[1]["missing_keys"]
    assert not read[1]["unexpected_keys"]
    uncached = inputs | ({"use_cache": False} if task == "language-model" else {})
    assert torch.equal(logits(read[0], uncached), expected)
    assert torch.equal(logits(load_model(tmp_path / "student").module, inputs), expected)


def test_a_model_without_adapters_stays_as_it_is() -> None:
    module = text("llama")[0].module
    module.get_submodule("lm_head").requires_grad_(False)
    before = copy.deepcopy(module.state_dict())
    merge_lora(module)
    assert "lm_head.weight" not in trainable(module)
    assert all(torch.equal(before[name], tensor) for name, tensor in module.state_dict().items())


def test_targets_by_name_or_all_but_the_head(monkeypatch: pytest.MonkeyPatch) -> None:
    import peft

    module = text("llama", lora=LoraConfig(rank=2, targets=("down_proj", "1.self_attn.q_proj")))[0].module
    assert adapted(module) == {
        "model.layers.0.mlp.down_proj",
        "model.layers.1.mlp.down_proj",
        "model.layers.1.self_attn.q_proj",
    }
    known = peft.utils.constants.TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
    monkeypatch.delitem(known, "llama")
    module = text("llama", lora=LORA)[0].module
    linear = {path for path, each in text("llama")[0].module.named_modules() if isinstance(each, nn.Linear)}
    assert adapted(module) == linear - {"lm_head"}
    monkeypatch.setitem(known, "llama", r".*layers\.0\..*_proj")
    module = text("llama", lora=LORA)[0].module
    assert adapted(module) == {path for path in linear if ".0." in path}


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (("q_prj",), "'q_prj' names no linear layer .*; near: q_proj"),
        (("lm_head",), "'lm_head' names no linear layer in the body"),
        (("q_proj", "norm"), "'norm' names no linear layer"),
    ],
)
def test_targets_that_are_none(targets: tuple[str, ...], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        text("llama", lora=LoraConfig(targets=targets))


def test_adapters_beside_weights_in_half_precision() -> None:
    built, inputs = text("llama", lora=LORA, dtype="bfloat16")
    parameters = dict(built.module.named_parameters())
    assert {parameters[name].dtype for name in trainable(built.module)} == {torch.float32}
    train(built.module, inputs)
    moved = logits(built.module, inputs)
    merge_lora(built.module)
    assert {parameter.dtype for parameter in built.module.parameters()} == {torch.bfloat16}
    torch.testing.assert_close(logits(built.module, inputs), moved, atol=0.02, rtol=0.02)
    with pytest.raises(ModelError, match="head of this LlamaForSequenceClassification is new"):
        text("llama", "classification", lora=LORA, dtype="bfloat16")


def test_a_weight_that_is_not_finite_is_not_merged() -> None:
    module = text("llama", lora=LORA)[0].module
    broken: Any = module.get_submodule("model.layers.0.self_attn.q_proj")
    broken.lora_B["default"].weight.data.fill_(float("nan"))
    with pytest.raises(ModelError, match=r"adapter of model\.layers\.0\.self_attn\.q_proj cannot be merged"):
        merge_lora(module)
    assert has_lora(module)


def test_without_peft_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ModelError, match=r"pip install 'tutelage\[llm\]'"):
        text("llama", lora=LORA)


RECIPE = {
    "task": "language-model",
    "data": {"path": "corpus", "text": "text"},
    "method": "none",
    "train": {"steps": 1},
}


@pytest.mark.parametrize(
    ("student", "train", "message"),
    [
        ({"dtype": "bfloat16"}, {}, r"student\.dtype is bfloat16: weights so coarse lose small updates"),
        ({"lora": {}}, {"quantize": "int8"}, r"train\.quantize rounds the weights that ship"),
        ({}, {"compile": True, "activation_checkpointing": True}, "does not go with compile"),
        ({"lora": {"targets": []}}, {}, "targets"),
    ],
)
def test_recipes_that_make_no_sense(student: dict[str, Any], train: dict[str, Any], message: str) -> None:
    given = RECIPE | {"student": {"model": "config:llama"} | student, "train": {"steps": 1} | train}
    with pytest.raises(RecipeError, match=message):
        validate(Recipe, given)
    coarse = {"model": "config:llama", "dtype": "bfloat16", "lora": {"rank": 4}}
    assert validate(Recipe, RECIPE | {"student": coarse}).student.lora == LoraConfig(rank=4)


def test_other_families_have_none() -> None:
    with pytest.raises(RecipeError, match="lora only with `hf:` and `config:` models; got 'timm:resnet10t'"):
        validate(ModelConfig, {"model": "timm:resnet10t", "lora": {}})
