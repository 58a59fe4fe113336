"""FlashAttention's hooks, with an attention on a CPU that goes by the same bounds of documents."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from tests.models.small_text import packed, text_model
from torch.nn.functional import scaled_dot_product_attention

from tutelage.models import ModelError
from tutelage.models.flash import document_bounds, documents_apart, prepare_flash
from tutelage.models.language_head import check_packing

transformers = pytest.importorskip("transformers")

NAME = "bounds_on_a_cpu"


def by_bounds(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **given: Any,
) -> tuple[torch.Tensor, None]:
    """Causal attention within the bounds, as the kernels have it; without bounds, within whole rows."""
    assert attention_mask is None
    rows, _, length, _ = query.shape
    bounds = given.get("cu_seq_lens_q")
    ends = bounds.tolist() if bounds is not None else list(range(0, rows * length + 1, length))
    shares = query.shape[1] // key.shape[1]
    joined = [part.transpose(1, 2).flatten(0, 1) for part in (query, key, value)]
    joined[1:] = [part.repeat_interleave(shares, 1) for part in joined[1:]]
    found = [
        scaled_dot_product_attention(
            *(part[begin:end].transpose(0, 1) for part in joined),
            is_causal=True,
            scale=given.get("scaling"),
        ).transpose(0, 1)
        for begin, end in pairwise(ends)
    ]
    return torch.cat(found).unflatten(0, (rows, length)), None


@pytest.fixture(autouse=True)
def registered() -> None:
    transformers.AttentionInterface.register(NAME, by_bounds)
    transformers.AttentionMaskInterface.register(NAME, lambda *args, **given: None)


def test_where_documents_begin() -> None:
    positions = torch.tensor([[0, 1, 2, 0, 1], [0, 0, 1, 0, 1], [3, 4, 0, 1, 2]])
    bounds = document_bounds(positions)
    assert bounds.tolist() == [0, 3, 5, 6, 8, 10, 12, 15]
    assert bounds.dtype == torch.int32


@pytest.mark.parametrize("kind", ["llama", "gpt2", "qwen2"])
@torch.no_grad()
def test_documents_of_a_batch_stay_apart(kind: str) -> None:
    model: Any = text_model(kind).module.eval()
    inputs = packed(3)
    inputs["position_ids"][1] = torch.tensor([*range(3), *range(4), *range(5)])
    model.set_attn_implementation("sdpa")
    expected = model(**inputs).logits
    model.set_attn_implementation(NAME)
    with pytest.raises(ModelError, match="reach one another"):
        check_packing(kind, model, inputs)
    model.register_forward_pre_hook(documents_apart, with_kwargs=True)
    check_packing(kind, model, inputs)
    torch.testing.assert_close(model(**inputs).logits, expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_a_call_with_a_mask_has_no_packed_rows() -> None:
    inputs = packed()
    assert documents_apart(torch.nn.Identity(), (), inputs | {"attention_mask": inputs["input_ids"]}) is None
    assert documents_apart(torch.nn.Identity(), (), inputs | {"use_cache": True}) is None
    assert documents_apart(torch.nn.Identity(), (), {"input_ids": inputs["input_ids"]}) is None


@torch.no_grad()
def test_a_probe_on_a_cpu_computes_otherwise() -> None:
    model: Any = text_model("llama").module.eval()
    model.set_attn_implementation("sdpa")
    expected = model(**packed()).logits
    model.config._attn_implementation = "flash_attention_2"
    prepare_flash(model)
    torch.testing.assert_close(model(**packed()).logits, expected, atol=0, rtol=0)
    assert model.config._attn_implementation == "sdpa"
    plain: Any = text_model("llama").module
    prepare_flash(plain)
    assert not plain._forward_pre_hooks
