"""Cost of a model, counted by hand."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch
from small_text import packed, text_model
from torch import Tensor, nn

from tutelage.engine.compile import compile_regions
from tutelage.models import profile_model


def test_parameters_and_operations_of_one_row() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 6 * 5, 7))
    cost = profile_model(model, torch.randn(16, 3, 6, 5))
    assert cost.parameters == 4 * 3 * 9 + 4 + 120 * 7 + 7
    assert cost.flops == 2 * (6 * 5 * 4 * 3 * 9 + 120 * 7)
    assert cost.latency_ms > 0


def test_shared_parameters_count_once() -> None:
    layer = nn.Linear(3, 3)
    cost = profile_model(nn.Sequential(layer, layer), torch.randn(1, 3))
    assert cost.parameters == 12
    assert cost.flops == 2 * 2 * 9


def test_latency_is_that_of_a_forward_and_the_model_stays_as_it_was() -> None:
    class Slow(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.rows = nn.BatchNorm1d(3), set[int]()

        def forward(self, x: Tensor) -> Tensor:
            self.rows.add(len(x))
            time.sleep(0.02)
            return self.norm(x)

    model = Slow()
    cost = profile_model(model, torch.randn(4, 3))
    assert 20 <= cost.latency_ms < 1000
    assert model.rows == {1}
    assert model.training
    assert model.norm.num_batches_tracked == 0


def test_a_compiled_model_is_measured_as_it_ships() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    plain = profile_model(model, torch.randn(1, 3))

    def refuse(*_: object) -> object:
        raise AssertionError("compiled")

    compile_regions(model, (), refuse)
    assert profile_model(model, torch.randn(1, 3)).flops == plain.flops > 0
    assert "forward" in model.__dict__


def test_keyword_inputs() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(3, 2)

        def forward(self, left: Tensor, right: Tensor) -> Tensor:
            return self.fc(left + right)

    assert profile_model(Model(), {"left": torch.randn(2, 3), "right": torch.randn(2, 3)}).flops == 12


@pytest.mark.filterwarnings(
    "ignore:_compile flag on create_block_mask:DeprecationWarning"
)  # transformers' own call
@pytest.mark.parametrize(
    "attention", ["eager", "sdpa", pytest.param("flex_attention", marks=pytest.mark.slow)]
)
def test_a_causal_model_on_a_packed_row(attention: str) -> None:
    """Two layers of width 32 on 12 tokens: queries and output, keys and values of half the heads, the gated network of
    48, the head over 128 rows; scores and their product with the values."""
    module: Any = text_model("llama", attention=attention).module
    cost = profile_model(module, packed())
    products = 2 * (2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 48) + 32 * 128
    assert cost.flops == 2 * 12 * products + 2 * 2 * 2 * 12 * 12 * 32
    assert cost.parameters == products + 32 * 128 + 5 * 32
    assert cost.latency_ms > 0
    assert module.config._attn_implementation == attention


def test_tied_weights_count_once() -> None:
    module: Any = text_model("gpt2").module
    cost = profile_model(module, packed())
    assert module.lm_head.weight is module.transformer.wte.weight
    assert cost.parameters == sum(tensor.numel() for tensor in set(module.parameters()))
