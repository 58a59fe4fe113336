"""Vision transformers on their visible patches: any plain one, each token what it is with all patches in sight."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tutelage.engine.taps import Tapped
from tutelage.methods.dmae.decoder import Decoder, sincos_positions
from tutelage.methods.dmae.vit import IMAGES, VISIBLE, MaskedViT, NotPlainError, check_same_patches
from tutelage.models import build_model
from tutelage.recipe.schema import ModelConfig

SIZES: dict[str, Any] = {"patch_size": 4, "embed_dim": 16, "depth": 3, "num_heads": 2}


def timm_vit(name: str = "vit_tiny_patch16_224", **options: Any) -> nn.Module:
    config = ModelConfig(model=f"timm:{name}", options=SIZES | {"img_size": 16} | options)
    module: nn.Module = build_model(config, outputs=5, input_shape=(3, 16, 16)).module
    return module


def hf_vit(**options: Any) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    settings = {
        "hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 32,
        "image_size": 16, "patch_size": 4, "num_labels": 5,
    }  # fmt: skip
    torch.manual_seed(0)
    module: nn.Module = transformers.ViTForImageClassification(transformers.ViTConfig(**settings | options))
    return module


def images(size: int = 16) -> Tensor:
    return torch.rand(2, 3, size, size, generator=torch.Generator().manual_seed(0))


KINDS: dict[str, Callable[[], nn.Module]] = {
    "timm": lambda: timm_vit(),
    "timm-average": lambda: timm_vit(global_pool="avg"),
    "timm-registers": lambda: timm_vit(reg_tokens=3),
    "timm-registers-without-positions": lambda: timm_vit(reg_tokens=2, no_embed_class=True),
    "timm-clip": lambda: timm_vit(pre_norm=True),
    "timm-any-size": lambda: timm_vit(dynamic_img_size=True),
    "hf": hf_vit,
}


@pytest.mark.parametrize("kind", KINDS)
def test_without_attention_a_token_is_the_same_whatever_is_masked(kind: str) -> None:
    """With the blocks' attention off, tokens do not see one another: so each visible one is what the whole image gives
    there, and the order of the output is that of ids_keep."""
    vit = KINDS[kind]()
    held = MaskedViT("x", vit, images())
    for name, parameter in vit.named_parameters():
        if any(part in name for part in ("attn.proj", "o_proj", "attention.output")):
            nn.init.zeros_(parameter)
    held.eval()
    chosen = torch.tensor([[5, 2, 11], [0, 15, 7]])
    last = held.blocks[-1]
    whole = Tapped(held)(images(), (last,), False)[f"tap:{last}"]
    found = Tapped(held)({IMAGES: images(), VISIBLE: chosen}, (last,))
    assert found["hidden"].shape == (2, held.prefix_tokens + 3, 16)
    wanted = torch.stack([row[held.prefix_tokens + ids] for row, ids in zip(whole, chosen, strict=True)])
    torch.testing.assert_close(found["hidden"][:, held.prefix_tokens :], wanted, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(
        found["hidden"][:, : held.prefix_tokens], whole[:, : held.prefix_tokens], rtol=1e-4, atol=1e-5
    )
    assert torch.equal(held.without_registers(found["hidden"])[:, 0], found["hidden"][:, 0])
    assert held.without_registers(found["hidden"]).shape == (2, 4, 16)


@pytest.mark.parametrize("kind", KINDS)
def test_masked_patches_are_not_seen(kind: str) -> None:
    held = MaskedViT("x", KINDS[kind](), images()).eval()
    chosen = torch.tensor([[5, 2], [0, 15]])
    changed = images()
    changed[0, :, :4, :4] = 9  # patch 0 of the first row, which is masked there
    first, second = (held(pixels, chosen)["hidden"] for pixels in (images(), changed))
    assert torch.equal(first, second)


def test_the_first_block_tapped_stops_the_forward() -> None:
    held: Any = MaskedViT("x", timm_vit(), images()).eval()
    ran: list[int] = []
    for i, block in enumerate(held.vit.blocks):
        block.register_forward_hook(lambda *_, i=i: ran.append(i))
    Tapped(held)({IMAGES: images(), VISIBLE: torch.tensor([[1], [2]])}, (held.blocks[1],), False)
    assert ran == [0, 1]


def test_whole_images_go_through_the_model_as_it_is() -> None:
    vit = timm_vit()
    held = MaskedViT("x", vit, images()).eval()
    assert torch.equal(held(images()), vit(images()))


def test_what_is_trained_on_visible_patches() -> None:
    """Not the positions, the final norm, nor the classifier."""
    for vit, gone in (
        (timm_vit(pre_norm=True, reg_tokens=1), {"pos_embed", "norm", "head"}),
        (hf_vit(), {"embeddings", "layernorm", "classifier"}),
    ):
        held = MaskedViT("x", vit, images())
        trained = {id(parameter) for parameter in held.encoder_parameters()}
        left = [name for name, parameter in vit.named_parameters() if id(parameter) not in trained]
        assert {name.removeprefix("vit.").partition(".")[0] for name in left} == gone
        assert [name for name in left if "embeddings" in name] in ([], ["vit.embeddings.position_embeddings"])


def test_nothing_is_dropped_at_random_but_patches() -> None:
    vit = timm_vit(drop_path_rate=0.5, pos_drop_rate=0.5, proj_drop_rate=0.5)
    held = MaskedViT("x", vit, images()).train()
    chosen = torch.tensor([[1, 2], [3, 4]])
    assert torch.equal(held(images(), chosen)["hidden"], held(images(), chosen)["hidden"])
    vit.train()  # on its own it drops as it was built to
    assert not torch.equal(vit(images()), vit(images()))


class Twisted(nn.Module):
    """A transformer with all the parts, and one more step between embedding and blocks."""

    def __init__(self) -> None:
        super().__init__()
        inner: Any = timm_vit()
        self.patch_embed, self.cls_token, self.pos_embed = inner.patch_embed, inner.cls_token, inner.pos_embed
        self.pos_drop, self.blocks, self.head = inner.pos_drop, inner.blocks, inner.head

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), self.patch_embed(x)], dim=1) + self.pos_embed
        logits: Tensor = self.head(self.blocks(x.roll(1, dims=1) * 2)[:, 0])
        return logits


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (
            lambda: build_model("cifar:resnet8", outputs=5, input_shape=(3, 16, 16)).module,
            "it has no patch_embed, cls_token, pos_embed, blocks",
        ),
        (lambda: timm_vit(class_token=False, global_pool="avg"), "it has no cls_token"),
        (lambda: timm_vit(pos_embed="none"), "it has no pos_embed"),
        (Twisted, "its blocks do not get just"),
        (
            lambda: timm_vit("eva02_tiny_patch14_224", embed_dim=16),
            "its blocks do not get just",
        ),  # rotary positions
    ],
    ids=["convolutional", "no-class-token", "no-positions", "twisted", "rotary"],
)
def test_what_is_no_plain_vision_transformer_is_refused(build: Any, message: str) -> None:
    with pytest.raises(NotPlainError, match=message):
        MaskedViT("the student", build(), images())


def test_other_patches_are_refused_naming_both() -> None:
    ours = MaskedViT("the student", timm_vit(), images())
    theirs = MaskedViT("the teacher", timm_vit(patch_size=8), images())
    with pytest.raises(
        ValueError, match=r"the student has patches of side 4 \(4×4\), the teacher .* 8 \(2×2\)"
    ):
        check_same_patches(ours, theirs)


def test_positions() -> None:
    found = sincos_positions((2, 3), 8)
    assert found.shape == (1, 7, 8)
    assert not found[0, 0].any()
    table = found[0, 1:].reshape(2, 3, 8)
    assert torch.equal(table[0, :, :4], table[1, :, :4])  # the first half knows the column alone
    assert torch.equal(table[:, 0, 4:], table[:, 2, 4:])  # the second the row
    torch.testing.assert_close(table[0, 2, 0], torch.tensor(2.0).sin())
    torch.testing.assert_close(table[0, 2, 1], torch.tensor(2 / 100.0).sin())
    with pytest.raises(ValueError, match="multiple of 4; got 6"):
        sincos_positions((2, 2), 6)


def test_the_decoder_puts_patches_back_in_their_places() -> None:
    """A visible token reaches its own pixels whatever the order in which it came."""
    decoder = Decoder(8, (2, 2), 5, width=8, depth=1, heads=2).eval()
    tokens = torch.rand(1, 3, 8)
    first = decoder(tokens, torch.tensor([[0, 2, 1, 3]]))  # visible patches 0 and 2
    second = decoder(tokens[:, [0, 2, 1]], torch.tensor([[1, 2, 0, 3]]))  # the same two, in the other order
    assert first.shape == (1, 4, 5)
    torch.testing.assert_close(first, second)
    third = decoder(tokens, torch.tensor([[2, 0, 1, 3]]))  # visible patches 1 and 2
    assert not torch.allclose(first, third)
    with pytest.raises(ValueError, match="decoder_width 8 is no multiple of decoder_heads 3"):
        Decoder(8, (2, 2), 5, width=8, depth=1, heads=3)
