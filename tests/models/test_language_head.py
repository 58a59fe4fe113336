"""The head that a causal model's configuration describes is the one that makes its logits."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tutelage.engine.taps import Tapped
from tutelage.models.language_head import check_packing, language_head
from tutelage.models.names import ModelError

transformers = pytest.importorskip("transformers")
TOKENS = 90
ROPE = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": 96,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 96, "bos_token_id": 1, "eos_token_id": 2}


def causal(kind: str, options: dict[str, Any]) -> Any:
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(kind, **options)
    return transformers.AutoModelForCausalLM.from_config(config).eval()


@pytest.fixture
def inputs() -> dict[str, torch.Tensor]:
    ids = torch.randint(3, TOKENS, (2, 7), generator=torch.Generator().manual_seed(1))
    return {"input_ids": ids, "position_ids": torch.arange(7).expand(2, 7)}


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("llama", ROPE),
        ("qwen2", ROPE | {"tie_word_embeddings": True}),
        ("gpt2", GPT2),
        ("gemma2", ROPE | {"final_logit_softcapping": 2.0}),
        ("granite", ROPE | {"logits_scaling": 4.0}),
        ("cohere", ROPE | {"logit_scale": 0.25}),
    ],
)
def test_hidden_and_head_give_the_models_own_logits(
    kind: str, options: dict[str, Any], inputs: dict[str, torch.Tensor]
) -> None:
    model = causal(kind, options)
    held = Tapped(model, head=language_head(kind, model, TOKENS, inputs))
    with torch.no_grad():
        made, own = held.outputs(held(inputs)).logits, model(**inputs).logits
    torch.testing.assert_close(made, own[..., :TOKENS], atol=1e-5, rtol=1e-5)


def test_logits_that_are_made_otherwise_are_refused(inputs: dict[str, torch.Tensor]) -> None:
    model = causal("llama", ROPE)
    model.lm_head.register_forward_hook(lambda module, args, output: output * 2)
    with pytest.raises(ModelError, match="differ by"):
        language_head("llama", model, TOKENS, inputs)


def test_a_vocabulary_that_is_too_small_is_refused(inputs: dict[str, torch.Tensor]) -> None:
    with pytest.raises(ModelError, match="vocabulary of 96, the tokeniser has 97"):
        language_head("llama", causal("llama", ROPE), 97, inputs)


def test_an_encoder_has_no_head_over_a_vocabulary(inputs: dict[str, torch.Tensor]) -> None:
    config = transformers.AutoConfig.for_model(
        "bert",
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        vocab_size=96,
    )
    model = transformers.AutoModelForSequenceClassification.from_config(config)
    with pytest.raises(ModelError, match="no linear head"):
        language_head("bert", model, TOKENS, inputs)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize(("kind", "options"), [("llama", ROPE), ("gpt2", GPT2)])
def test_models_that_keep_documents_apart_pass(
    kind: str, options: dict[str, Any], attention: str, inputs: dict[str, torch.Tensor]
) -> None:
    model = causal(kind, options | {"use_cache": False})
    model.set_attn_implementation(attention)
    check_packing(kind, model, inputs)


def test_one_that_does_not_is_refused(inputs: dict[str, torch.Tensor]) -> None:
    sizes = {"hidden_size": 32, "n_layer": 2, "n_head": 4, "vocab_size": 96}
    with pytest.raises(ModelError, match=r"data\.packing=none"):
        check_packing("bloom", causal("bloom", sizes), inputs)
