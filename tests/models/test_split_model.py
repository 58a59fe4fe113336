"""Two parts of one model: together they are it, and they share its weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tutelage.engine.taps import TapError
from tutelage.models import ModelError, build_model, split
from tutelage.recipe.schema import ModelConfig

CASES = [
    ("digits:mlp-8-6", {}, (1, 8, 8), "layer1"),
    ("digits:cnn-4-6", {}, (1, 8, 8), "layer1"),
    ("cifar:resnet20", {}, (3, 16, 16), "layer2.1"),
    ("timm:resnet10t", {}, (3, 32, 32), "layer2"),
    ("timm:convnext_atto", {}, (3, 32, 32), "stages.1"),
    ("timm:vit_tiny_patch16_224", {"depth": 3, "patch_size": 4}, (3, 8, 8), "blocks.1"),
]


@pytest.mark.parametrize(("name", "options", "shape", "path"), CASES)
def test_the_parts_are_the_model(
    name: str, options: dict[str, Any], shape: tuple[int, ...], path: str
) -> None:
    model = build_model(ModelConfig(model=name, options=options), outputs=4, input_shape=shape).module.train()
    x = torch.randn(3, *shape)
    lower, upper = split(model, path, x)
    assert all(module.training for module in model.modules())
    model.eval()
    lower.eval()
    upper.eval()
    other = torch.randn(5, *shape)
    assert torch.equal(upper(lower(other)), model(other))
    assert {id(p) for p in lower.parameters()} == {id(p) for p in model.parameters()}
    assert {id(p) for p in upper.parameters()} < {id(p) for p in model.parameters()}


@pytest.mark.parametrize(("name", "options", "shape", "path"), CASES[2:])
def test_gradients_reach_the_hidden_state_and_the_weights_above(
    name: str, options: dict[str, Any], shape: tuple[int, ...], path: str
) -> None:
    model = build_model(ModelConfig(model=name, options=options), outputs=4, input_shape=shape).module.eval()
    lower, upper = split(model, path, torch.randn(2, *shape))
    hidden = lower(torch.randn(3, *shape)).detach().requires_grad_()
    upper.eval()(hidden).square().sum().backward()
    assert hidden.grad is not None
    assert hidden.grad.abs().sum() > 0
    below = model.get_submodule(path)
    assert all(parameter.grad is None for parameter in below.parameters())
    assert any(parameter.grad is not None for parameter in model.parameters())


class Around(nn.Module):
    """The head also reads what lies below the cut."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        low = self.first(x)
        return self.head(low.relu() + self.second(low) * 3)


def test_a_skip_around_the_cut_is_refused() -> None:
    with pytest.raises(
        ModelError, match="Around cannot be split at 'second': what is above the cut also reads"
    ):
        split(Around(), "second", torch.randn(3, 4))


def test_an_unknown_path_lists_the_near_ones() -> None:
    with pytest.raises(TapError, match="near: second"):
        split(Around(), "secnod", torch.randn(3, 4))


def test_a_start_that_would_learn_from_zeros_is_refused() -> None:
    class Positions(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.norm = nn.Linear(4, 4), nn.BatchNorm1d(4)
            self.blocks = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
            self.positions, self.head = nn.Parameter(torch.ones(4)), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.blocks(self.norm(self.stem(x)) + self.positions))

    with pytest.raises(ModelError, match="norm below the cut would take its statistics from zeros"):
        split(Positions(), "blocks.0", torch.randn(3, 4))
