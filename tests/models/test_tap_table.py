"""What `tutelage taps MODEL` shows."""

from __future__ import annotations

from pathlib import Path

import pytest

from tutelage.models import ModelError, tap_table
from tutelage.recipe.schema import ModelConfig


def test_the_default_size_is_the_architectures_own() -> None:
    shapes = {info.path: info.shape for info in tap_table("timm:resnet10t")}
    assert shapes["layer1"] == (64, 44, 44)
    assert shapes["fc"] == (10,)
    assert {info.path: info.shape for info in tap_table("digits:cnn-4")}["layer1"] == (4, 8, 8)
    assert {info.path: info.shape for info in tap_table("cifar:resnet20", outputs=3)}["head"] == (3,)


def test_a_given_size_and_options() -> None:
    config = ModelConfig(
        model="timm:vit_tiny_patch16_224", options={"depth": 2, "patch_size": 4}, weights="pretrained"
    )
    infos = tap_table(config, input_shape=(1, 8, 8))
    assert {info.path: info.shape for info in infos}["blocks.1"] == (5, 192)
    assert infos[-1].depth <= 1


def test_text(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    transformers.GPT2Config(vocab_size=50, n_embd=16, n_layer=2, n_head=2).save_pretrained(tmp_path)
    shapes = {info.path: info.shape for info in tap_table(f"hf:{tmp_path}", outputs=3)}
    assert shapes["transformer.h.1"] == (16, 16)


def test_rows_that_the_model_cannot_take() -> None:
    with pytest.raises(ModelError, match=r"does not run on rows of shape \[3, 8, 8\]"):
        tap_table("timm:inception_v3", input_shape=(3, 8, 8))
