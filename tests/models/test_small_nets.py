"""The nets for digits: parameter counts, shapes, names that can be tapped."""

from __future__ import annotations

import pytest
import torch

from tutelage.engine.spec import ModelSpec
from tutelage.models import ModelError, build_model
from tutelage.recipe.schema import ModelConfig


@pytest.mark.parametrize(
    ("name", "stages", "shapes", "parameters"),
    [
        ("mlp-16", ("layer1",), [(16,)], 64 * 16 + 16 + 16 * 10 + 10),
        ("mlp-64-8", ("layer1", "layer2"), [(64,), (8,)], 64 * 64 + 64 + 64 * 8 + 8 + 8 * 10 + 10),
        ("cnn-4-8-16", ("layer1", "layer2", "layer3"), [(4, 8, 8), (8, 4, 4), (16, 2, 2)], None),
        (
            "cnn-2-3-4-5-6-7",
            ("layer1", "layer2", "layer3", "layer6"),
            [(2, 8, 8), (3, 4, 4), (4, 2, 2), (7, 1, 1)],
            None,
        ),
    ],
)
def test_digits_nets(
    name: str, stages: tuple[str, ...], shapes: list[tuple[int, ...]], parameters: int | None
) -> None:
    module = build_model(f"digits:{name}", outputs=10, input_shape=(1, 8, 8)).module
    spec = ModelSpec.of(name, module, torch.randn(2, 1, 8, 8))
    assert (spec.stages(), spec.head, spec.outputs) == (stages, "head", 10)
    assert [spec.shape(path) for path in stages] == shapes
    if parameters is not None:
        assert sum(parameter.numel() for parameter in module.parameters()) == parameters


def test_a_confident_net_is_surer_of_itself_than_it_was_trained_to_be() -> None:
    config = ModelConfig(model="digits:mlp-4", options={"confidence": 5.0})
    plain, sure = (
        build_model(each, outputs=3, input_shape=(13,), seed=1).module for each in ("digits:mlp-4", config)
    )
    assert sure.state_dict().keys() == plain.state_dict().keys()
    inputs = torch.randn(2, 13)
    torch.testing.assert_close(sure.train()(inputs), plain(inputs))
    torch.testing.assert_close(sure.eval()(inputs), 5 * plain(inputs))
    assert ModelSpec.of("net", sure, inputs).head == "head"


def test_an_mlp_takes_rows_of_numbers_and_a_cnn_does_not() -> None:
    assert build_model("digits:mlp-4", outputs=2, input_shape=(13,)).module(torch.randn(3, 13)).shape == (
        3,
        2,
    )
    with pytest.raises(ModelError, match=r"takes images \[channels, height, width\]; this data gives \[13\]"):
        build_model("digits:cnn-4", outputs=2, input_shape=(13,))
    with pytest.raises(ModelError, match="takes images"):
        build_model("cifar:resnet20", outputs=2, input_shape=(13,))
