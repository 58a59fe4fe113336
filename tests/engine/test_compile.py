"""Regions: as many graphs as there are regions, and taps fire as before."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tutelage.engine.compile import compile_regions, eager, uncompile
from tutelage.engine.taps import TapError, Tapped

# torch reads `.grad` of a region's inputs and hides the warning by its printer, which an error does not reach.
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.up, self.act, self.down = nn.Linear(width, width), nn.ReLU(inplace=True), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(self.act(self.up(x)))


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        OrderedDict(
            stem=nn.Linear(6, 4),
            layer1=nn.Sequential(Block(4), Block(4)),
            layer2=nn.Sequential(Block(4), Block(4)),
            layer3=nn.Sequential(Block(4), nn.LayerNorm(4)),
            head=nn.Linear(4, 3),
        )
    )


class Counter:
    """A backend that counts graphs and runs them as they are."""

    def __init__(self) -> None:
        self.graphs = 0

    def __call__(self, graph: torch.fx.GraphModule, example_inputs: Any) -> Any:
        self.graphs += 1
        return graph.forward


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize(
    ("taps", "regions", "graphs"),
    [
        ((), 1, 1),
        # The two layers are built alike and share a graph.
        (("layer1",), 3, 2),
        (("layer1", "layer3"), 3, 2),
        (("layer2:in", "head:in"), 3, 2),
        (("layer1.0",), 4, 3),
        (("layer2.1:in",), 4, 3),
        # Block 0 holds a tap: its layers stay eager, its sibling is a region.
        (("layer1.0.up",), 3, 3),
    ],
)
def test_graphs_and_values(taps: tuple[str, ...], regions: int, graphs: int) -> None:
    model, x, backend = net(), torch.randn(5, 6), Counter()
    expected = Tapped(copy.deepcopy(model))(x, taps)
    assert compile_regions(model, taps, backend) == regions
    tapped = Tapped(model)
    for _ in range(3):
        result = tapped(x, taps)
        assert result.keys() == expected.keys()
        for key, value in expected.items():
            torch.testing.assert_close(result[key], value)
    assert backend.graphs == graphs


def test_gradients_and_an_early_stop_through_regions() -> None:
    model, x, backend = net(), torch.randn(5, 6), Counter()
    plain = copy.deepcopy(model)
    compile_regions(model, ("layer1",), backend)
    for held in (model, plain):
        Tapped(held)(x, ("layer1",), logits=False)["tap:layer1"].square().sum().backward()
    assert backend.graphs == 1
    for ours, theirs in zip(model.parameters(), plain.parameters(), strict=True):
        assert (ours.grad is None) == (theirs.grad is None)
        if ours.grad is not None:
            torch.testing.assert_close(ours.grad, theirs.grad)


def test_a_tap_inside_a_region_is_an_error_not_a_silence() -> None:
    model, x = net(), torch.randn(5, 6)
    compile_regions(model, (), Counter())
    tapped = Tapped(model)
    tapped(x)
    with pytest.raises(TapError, match="did not fire"):
        tapped(x, ("layer1.0",))


def test_names_state_and_copies() -> None:
    model, x = net(), torch.randn(5, 6)
    names = list(model.state_dict())
    compile_regions(model, ("layer1",), Counter())
    assert list(model.state_dict()) == names
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
    assert twin(x).abs().max() == 0
    assert model(x).abs().max() > 0


def test_uncompile_and_eager() -> None:
    model, x, backend = net(), torch.randn(5, 6), Counter()
    compile_regions(model, ("layer1",), backend)
    with eager(model):
        model(x)
        assert backend.graphs == 0
    model(x)
    assert backend.graphs == 2
    assert compile_regions(model, (), backend) == 1
    uncompile(model)
    model(x)
    assert backend.graphs == 2
    assert not any("forward" in module.__dict__ for module in model.modules())


def test_many_different_regions_are_all_compiled() -> None:
    """More than torch keeps for one code object."""
    widths = range(3, 15)
    wide = nn.ModuleList(
        [nn.Sequential(nn.Linear(2, width), nn.ReLU(), nn.Linear(width, 2)) for width in widths]
    )

    class Chain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.parts = wide

        def forward(self, x: Tensor) -> Tensor:
            for part in self.parts:
                x = part(x)
            return x

    model, backend = Chain(), Counter()
    taps = tuple(f"parts.{number}" for number in range(len(widths)))
    assert compile_regions(model, taps, backend) == len(widths)
    Tapped(model)(torch.randn(2, 2), taps)
    assert backend.graphs == len(widths)


def test_a_shared_module_is_one_region() -> None:
    block = Block(4)
    model = nn.ModuleDict({"a": block, "b": block})
    assert compile_regions(model, (), Counter()) == 1
