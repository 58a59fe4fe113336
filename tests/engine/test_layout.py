"""How tapped features lie, as probed on models of every family."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
from torch import nn

from tutelage.engine.layout import Layout, layout_of
from tutelage.engine.spec import ModelSpec
from tutelage.engine.taps import Tapped


def spec_of(name: str, size: tuple[int, int], **options: Any) -> ModelSpec:
    model = timm.create_model(name, num_classes=3, **options)
    return ModelSpec.of(name, model, torch.rand(2, 3, *size))


TINY_VIT = {"img_size": 32, "patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2}


@pytest.mark.parametrize(
    ("name", "size", "options", "stage", "wanted"),
    [
        ("vit_tiny_patch16_224", (32, 32), TINY_VIT, 0, Layout("tokens", 16, (4, 4), 1)),
        (
            "vit_tiny_patch16_224",
            (16, 64),
            TINY_VIT | {"img_size": (16, 64)},
            1,
            Layout("tokens", 16, (2, 8), 1),
        ),
        ("vit_tiny_patch16_224", (16, 16), TINY_VIT | {"img_size": 16}, 1, Layout("tokens", 16, (2, 2), 1)),
        (
            "vit_tiny_patch16_224",
            (32, 32),
            TINY_VIT | {"class_token": False, "global_pool": "avg"},
            0,
            Layout("tokens", 16, (4, 4), 0),
        ),
        (
            "vit_tiny_patch16_224",
            (16, 16),
            TINY_VIT | {"img_size": 16, "reg_tokens": 4},
            0,
            Layout("tokens", 16, (2, 2), 5),
        ),
        ("deit_tiny_distilled_patch16_224", (32, 32), TINY_VIT, 1, Layout("tokens", 16, (4, 4), 2)),
        (
            "mixer_s16_224",
            (32, 32),
            {"img_size": 32},
            0,
            Layout("tokens", 512, (2, 2), 0),
        ),
        ("test_resnet", (64, 64), {}, 1, Layout("channels_first", 32, (16, 16))),
        (
            "swin_tiny_patch4_window7_224",
            (32, 32),
            {"img_size": 32, "window_size": 4, "embed_dim": 16, "depths": (1, 1), "num_heads": (2, 2)},
            0,
            Layout("channels_last", 16, (8, 8)),
        ),
    ],
    ids=["vit", "wide images", "four patches", "no class token", "registers", "distilled", "mixer", "cnn", "swin"],
)  # fmt: skip
def test_layouts(
    name: str, size: tuple[int, int], options: dict[str, Any], stage: int, wanted: Layout
) -> None:
    spec = spec_of(name, size, **options)
    path = spec.stages()[stage]
    layout = layout_of(spec, path)
    assert layout == wanted
    assert spec.module is not None
    feature = Tapped(spec.module).eval()(torch.rand(2, 3, *size), (path,))[f"tap:{path}"]
    assert layout.to_map(feature).shape == (2, *layout.shape) == (2, wanted.channels, *wanted.grid)
    tokens = layout.to_tokens(feature)
    assert tokens.shape == (2, wanted.prefix + wanted.grid[0] * wanted.grid[1], wanted.channels)
    torch.testing.assert_close(layout.to_map(feature).flatten(2).mT, tokens[:, wanted.prefix :])


def fixed(module: nn.Module | None = None, **shapes: tuple[int, ...]) -> ModelSpec:
    return ModelSpec("net", module, 3, None, shapes=shapes)


def test_a_vector_stays_one() -> None:
    layout = layout_of(fixed(pooled=(5,)), "pooled")
    assert layout == Layout("vector", 5, (1, 1))
    feature = torch.randn(2, 5)
    assert layout.to_map(feature) is feature
    assert layout.to_tokens(feature).shape == (2, 1, 5)
    assert layout.shape == (5,)


def test_a_cube_has_its_channels_where_the_model_says() -> None:
    assert layout_of(fixed(map=(8, 8, 8)), "map").kind == "channels_first"
    model = nn.Identity()
    model.output_fmt = "NHWC"  # type: ignore[assignment]
    assert layout_of(fixed(model, map=(8, 8, 8)), "map").kind == "channels_last"
    assert layout_of(fixed(model, map=(4, 8, 16)), "map") == Layout("channels_last", 16, (4, 8))
    assert layout_of(fixed(model, map=(4, 8, 8)), "map").kind == "channels_first"


@pytest.mark.parametrize(("tokens", "grid", "prefix"), [(49, (7, 7), 0), (50, (7, 7), 1), (1, (1, 1), 0)])
def test_without_a_convolution_tokens_fill_a_square(tokens: int, grid: Any, prefix: int) -> None:
    assert layout_of(fixed(block=(tokens, 6)), "block") == Layout("tokens", 6, grid, prefix)


def test_what_has_no_layout_is_refused() -> None:
    with pytest.raises(ValueError, match=r"net: the 48 tokens of 'block' fit no grid"):
        layout_of(fixed(block=(48, 6)), "block")
    with pytest.raises(ValueError, match=r"net: tap 'cloud' gives shape \(2, 3, 4, 5\)"):
        layout_of(fixed(cloud=(2, 3, 4, 5)), "cloud")
