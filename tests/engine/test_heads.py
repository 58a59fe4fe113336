"""Hidden states and head apart give the logits of the model, and their gradients."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tutelage.engine.heads import HeadPlan
from tutelage.engine.spec import ModelSpec
from tutelage.engine.taps import Tapped

TOKENS, WIDTH = 37, 16


class Small(nn.Module):
    """An embedding, a layer and a head, whose weight may be the embedding's."""

    def __init__(self, rows: int = TOKENS, *, tied: bool = False) -> None:
        super().__init__()
        self.embedding = nn.Embedding(rows, WIDTH)
        self.layer = nn.Linear(WIDTH, WIDTH)
        self.head = nn.Linear(WIDTH, rows, bias=not tied)
        self.calls = 0
        self.head.register_forward_hook(self._count)
        if tied:
            self.head.weight = self.embedding.weight

    def _count(self, *_: object) -> None:
        self.calls += 1

    def forward(self, input_ids: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"logits": self.head(self.layer(self.embedding(input_ids)).tanh())}


@pytest.fixture
def inputs() -> dict[str, torch.Tensor]:
    return {"input_ids": torch.randint(TOKENS, (3, 5), generator=torch.Generator().manual_seed(0))}


@pytest.mark.parametrize("tied", [False, True])
def test_the_forward_stops_before_the_head_and_gives_the_same_logits(
    inputs: dict[str, torch.Tensor], tied: bool
) -> None:
    model = Small(tied=tied).double()
    whole = model(**inputs)["logits"]
    torch.autograd.backward(whole.square().mean())
    wanted = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    before = model.calls
    held = Tapped(model, head=HeadPlan("head", TOKENS))
    outputs = held.outputs(held(inputs))
    assert model.calls == before
    assert outputs.rows == 3
    assert outputs.logits.shape == (3, 5, TOKENS)
    torch.testing.assert_close(outputs.logits, whole)
    torch.autograd.backward(outputs.logits.square().mean())
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, wanted[name])


def test_rows_that_pad_the_vocabulary_are_cut_off(inputs: dict[str, torch.Tensor]) -> None:
    model = Small(rows=64)
    held = Tapped(model, head=HeadPlan("head", TOKENS))
    logits = held.outputs(held(inputs)).logits
    torch.testing.assert_close(logits, model(**inputs)["logits"][..., :TOKENS])
    torch.autograd.backward(logits.sum())
    assert model.head.weight.grad is not None
    assert model.head.weight.grad.shape == (64, WIDTH)
    assert not model.head.weight.grad[TOKENS:].any()


def test_taps_are_captured_beside_the_hidden_states(inputs: dict[str, torch.Tensor]) -> None:
    held = Tapped(Small(), head=HeadPlan("head", TOKENS))
    outputs = held.outputs(held(inputs, ("layer", "head:in")))
    assert set(outputs.features) == {"layer", "head:in"}
    assert outputs.hidden is not None
    torch.testing.assert_close(outputs.features["head:in"], outputs.hidden)
    features = held.outputs(held(inputs, ("layer",), logits=False))
    assert features.hidden is None
    assert features.stored_logits is None


def test_other_parameters_make_the_logits_too(inputs: dict[str, torch.Tensor]) -> None:
    model = Small()
    held = Tapped(model, head=HeadPlan("head", TOKENS))
    params = {name: (value * 2).detach() for name, value in model.named_parameters()}
    result = torch.func.functional_call(held, {f"model.{name}": v for name, v in params.items()}, (inputs,))
    wanted = torch.func.functional_call(model, params, (), inputs)["logits"]
    torch.testing.assert_close(held.outputs(result, params).logits, wanted)


def test_soft_cap_and_scale_are_the_heads(inputs: dict[str, torch.Tensor]) -> None:
    model = Small()
    held = Tapped(model, head=HeadPlan("head", TOKENS, softcap=0.5, scale=3.0))
    wanted = 3 * 0.5 * torch.tanh(model(**inputs)["logits"] / 0.5)
    torch.testing.assert_close(held.outputs(held(inputs)).logits, wanted)


def test_a_constant_head_gets_no_gradient(inputs: dict[str, torch.Tensor]) -> None:
    model = Small().requires_grad_(False)
    held = Tapped(model, head=HeadPlan("head", TOKENS))
    outputs = held.outputs(held(inputs))
    model.requires_grad_(True)
    assert outputs.head is not None
    assert not outputs.head.weight.requires_grad


def test_the_spec_has_as_many_outputs_as_there_are_tokens(inputs: dict[str, torch.Tensor]) -> None:
    spec = ModelSpec.of("model", Small(rows=64), inputs, head=HeadPlan("head", TOKENS))
    assert (spec.outputs, spec.head, spec.pooled) == (TOKENS, "head", "head:in")
