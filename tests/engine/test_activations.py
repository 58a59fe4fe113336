"""Blocks whose activations are computed again give the gradients of those that keep them, taps included."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tutelage.engine.activations import checkpoint_activations, keep_activations
from tutelage.engine.taps import Tapped
from tutelage.engine.types import Inputs

FAMILIES = {
    "llama": "model.layers",
    "gpt2": "transformer.h",
    "qwen2": "model.layers",
    "bert": "bert.encoder.layer",
}
INNER = {
    "llama": "mlp.gate_proj",
    "gpt2": "mlp.c_fc",
    "qwen2": "self_attn.o_proj",
    "bert": "attention.self.query",
}


def text_model(kind: str) -> nn.Module:
    from tutelage.models import build_model
    from tutelage.recipe.schema import ModelConfig

    options = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4}
    options |= {} if kind == "gpt2" else {"intermediate_size": 48}
    options |= {"num_key_value_heads": 2} if kind in ("llama", "qwen2") else {}
    options |= {"is_decoder": True} if kind == "bert" else {}
    config = ModelConfig(model=f"config:{kind}", options=options)
    return build_model(config, outputs=64, input_shape=(8,), task="language-model").module


@pytest.fixture
def tokens() -> dict[str, Tensor]:
    ids = torch.randint(0, 64, (2, 8), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "position_ids": torch.tensor([[*range(3), *range(5)]] * 2)}


class Recount:
    """How often modules run."""

    def __init__(self, model: nn.Module, path: str) -> None:
        self.runs = 0
        model.get_submodule(path).register_forward_pre_hook(self._count)

    def _count(self, *_: Any) -> None:
        self.runs += 1


def gradients(
    model: nn.Module, inputs: Inputs, taps: tuple[str, ...] = (), logits: bool = True
) -> dict[str, Tensor]:
    """Of every parameter that has one, and ``loss``."""
    model.zero_grad()
    torch.manual_seed(3)  # dropout draws the same again
    result: dict[str, Tensor] = Tapped(model).train()(inputs, taps, logits)
    loss = torch.stack([value.square().mean() for value in result.values()]).sum()
    torch.autograd.backward(loss)
    named = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return named | {"loss": loss.detach()}


def assert_same(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        torch.testing.assert_close(
            value, theirs[name], atol=1e-6, rtol=1e-6, msg=partial("{}: {}".format, name)
        )


@pytest.mark.parametrize("kind", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gradients_are_the_same(kind: str, dtype: torch.dtype, tokens: dict[str, Tensor]) -> None:
    pytest.importorskip("transformers")
    plain = text_model(kind).to(dtype)
    again = copy.deepcopy(plain)
    assert checkpoint_activations(again, tokens) == 3
    assert again.state_dict().keys() == plain.state_dict().keys()
    block, inner = FAMILIES[kind], INNER[kind]
    head = "cls.predictions.decoder" if kind == "bert" else "lm_head"
    for taps in ((), (f"{head}:in",), (f"{block}.1",), (f"{block}.0.{inner}", f"{block}.1.{inner}:in")):
        assert_same(gradients(plain, tokens, taps), gradients(again, tokens, taps))
        if taps:
            # The forward stops in the middle of a block, and so does what is computed again.
            stopped = gradients(again, tokens, taps, logits=False)
            assert_same(gradients(plain, tokens, taps, logits=False), stopped)


def test_inner_tensors_are_made_again_in_training_alone(tokens: dict[str, Tensor]) -> None:
    pytest.importorskip("transformers")
    model = text_model("llama")
    block, inner = Recount(model, "model.layers.1"), Recount(model, "model.layers.1.mlp.gate_proj")
    checkpoint_activations(model, tokens)
    checkpoint_activations(model, tokens)  # by a second trainer: not once more inside
    block.runs = inner.runs = 0
    gradients(model, tokens)
    assert (block.runs, inner.runs) == (1, 2)
    model.eval()
    model(**tokens).logits.sum().backward()
    assert (block.runs, inner.runs) == (2, 3)
    keep_activations(model)
    gradients(model, tokens)
    assert (block.runs, inner.runs) == (3, 4)
    assert not any("forward" in module.__dict__ for module in model.modules())


def saved_bytes(model: nn.Module, inputs: dict[str, Tensor]) -> int:
    """Of what the backward pass holds, weights apart."""
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    held: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in own:
            held[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    model.train()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        kept = model(**inputs).logits.square().mean()
    assert kept.requires_grad
    return sum(held.values())


def test_it_takes_less_memory(tokens: dict[str, Tensor]) -> None:
    pytest.importorskip("transformers")
    plain = text_model("llama")
    again = copy.deepcopy(plain)
    checkpoint_activations(again, tokens)
    assert saved_bytes(again, tokens) < 0.5 * saved_bytes(plain, tokens)


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.first, self.norm, self.second = (
            nn.Conv2d(width, width, 1),
            nn.BatchNorm2d(width),
            nn.Conv2d(width, width, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        bent: Tensor = self.second(torch.relu(self.norm(self.first(x))))
        return x + bent


def convolutional() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 1), Block(4), Block(4), nn.Flatten(), nn.Linear(4 * 4, 3))


def test_running_statistics_move_once() -> None:
    plain, images = convolutional(), torch.randn(5, 3, 2, 2, generator=torch.Generator().manual_seed(1))
    again = copy.deepcopy(plain)
    assert checkpoint_activations(again, images) == 2
    assert_same(gradients(plain, images, ("1",)), gradients(again, images, ("1",)))
    moved = again.state_dict()
    for name, value in plain.state_dict().items():
        torch.testing.assert_close(moved[name], value)
    assert moved["1.norm.num_batches_tracked"] == 1
    assert again.get_submodule("1.norm").momentum == 0.1


def test_a_copy_runs_its_own_weights() -> None:
    model, images = convolutional(), torch.randn(2, 3, 2, 2)
    checkpoint_activations(model, images)
    copied = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert copied.train()(images).abs().max() > 0
    block: Any = copied.get_submodule("1")
    assert block.forward.module is block


def test_a_model_without_blocks_is_refused() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    with pytest.raises(ValueError, match="Sequential has no blocks whose activations"):
        checkpoint_activations(model, torch.randn(2, 3))
