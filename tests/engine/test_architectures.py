"""Taps, stages and the classifier in 20 architectures of timm and 5 of transformers, with random weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tutelage.engine.calling import first_tensor_in
from tutelage.engine.spec import ModelSpec, match_stages
from tutelage.engine.taps import Tapped
from tutelage.engine.types import Inputs

CLASSES = 7

# name: side of the images, options, path of the classifier, last stage, number of stages
TIMM: dict[str, tuple[int, dict[str, Any], str | None, str, int]] = {
    "resnet18": (32, {}, "fc", "layer4", 4),
    "convnext_atto": (32, {}, "head.fc", "stages.3", 4),
    "vit_tiny_patch16_224": (32, {"img_size": 32}, "head", "blocks.11", 12),
    "swin_tiny_patch4_window7_224": (32, {"img_size": 32}, "head.fc", "layers.3", 4),
    "mixer_s32_224": (32, {"img_size": 32}, "head", "blocks.7", 8),
    "efficientnet_b0": (32, {}, "classifier", "blocks.6", 5),
    "mobilenetv2_050": (32, {}, "classifier", "blocks.6", 5),
    "mobilenetv3_small_050": (32, {}, "classifier", "blocks.4", 5),
    "regnetx_002": (32, {}, "head.fc", "s4", 4),
    "densenet121": (32, {}, "classifier", "features.denseblock4", 4),
    "deit_tiny_patch16_224": (32, {"img_size": 32}, "head", "blocks.11", 12),
    # Two heads are averaged: no single layer gives the logits.
    "deit_tiny_distilled_patch16_224": (32, {"img_size": 32}, None, "blocks.11", 12),
    "cait_xxs24_224": (32, {"img_size": 32}, "head", "blocks.23", 24),
    "pvt_v2_b0": (32, {}, "head", "stages.3", 4),
    "poolformer_s12": (32, {}, "head.fc", "stages.3", 4),
    "inception_v3": (80, {}, "fc", "Mixed_7c", 3),
    "repvgg_a0": (32, {}, "head.fc", "stages.3", 4),
    "resmlp_12_224": (32, {"img_size": 32}, "head", "blocks.11", 12),
    "edgenext_xx_small": (64, {}, "head.fc", "stages.3", 4),
    "vgg11": (32, {}, "head.fc", "features.19", 5),
}
HEAVY = {"vgg11"}


def by_plain_hooks(model: nn.Module, inputs: Inputs, paths: tuple[str, ...]) -> dict[str, Tensor]:
    """The reference: each module's first output, copied at once."""
    found: dict[str, Tensor] = {}

    def keep(path: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            tensor = first_tensor_in(output)
            assert tensor is not None
            found.setdefault(path, tensor.clone())

        return hook

    handles = [model.get_submodule(path).register_forward_hook(keep(path)) for path in paths]
    with torch.no_grad():
        model(inputs) if isinstance(inputs, Tensor) else model(**inputs)
    for handle in handles:
        handle.remove()
    return found


def check(model: nn.Module, inputs: Inputs, head: str | None, last: str, count: int) -> ModelSpec:
    """Every stage and some inner modules give what plain hooks see, whole and stopped."""
    model.eval()
    spec = ModelSpec.of("model", model, inputs)
    assert (spec.outputs, spec.head) == (CLASSES, head)
    assert (len(spec.stages()), spec.stages()[-1]) == (count, last)
    inner = [info.path for info in spec.infos if info.shape is not None][1::7]
    taps = tuple(dict.fromkeys([*spec.stages(), *inner]))
    expected = by_plain_hooks(model, inputs, taps)
    tapped = Tapped(model)
    with torch.no_grad():
        for logits in (True, False, True):
            result = tapped(inputs, taps, logits)
            assert ("logits" in result) == logits
            for tap in taps:
                assert torch.equal(result[f"tap:{tap}"], expected[tap]), tap
                assert spec.shape(tap) == tuple(expected[tap].shape[1:])
        if head is not None:
            pooled = tapped(inputs, (spec.pooled,), logits=False)[f"tap:{spec.pooled}"]
            torch.testing.assert_close(
                model.get_submodule(head)(pooled).flatten(1), expected_logits(tapped, inputs)
            )
    assert spec.resolve(["-1"]) == (last,)
    return spec


def expected_logits(tapped: Tapped, inputs: Inputs) -> Tensor:
    return tapped(inputs)["logits"]


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow if name in HEAVY else ()) for name in TIMM]
)
def test_timm(name: str) -> None:
    timm = pytest.importorskip("timm")
    side, options, head, last, count = TIMM[name]
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=CLASSES, **options)
    check(model, torch.randn(2, 3, side, side), head, last, count)


def test_there_are_twenty() -> None:
    assert len(TIMM) == 20


def bert() -> tuple[Any, str | None, str]:
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig(
        vocab_size=50,
        hidden_size=16,
        num_hidden_layers=3,
        num_attention_heads=2,
        intermediate_size=32,
        num_labels=CLASSES,
    )
    return BertForSequenceClassification(config), "classifier", "bert.encoder.layer.2"


def distilbert() -> tuple[Any, str | None, str]:
    from transformers import DistilBertConfig, DistilBertForSequenceClassification

    config = DistilBertConfig(vocab_size=50, dim=16, n_layers=3, n_heads=2, hidden_dim=32, num_labels=CLASSES)
    return DistilBertForSequenceClassification(config), "classifier", "distilbert.transformer.layer.2"


def gpt2() -> tuple[Any, str | None, str]:
    from transformers import GPT2Config, GPT2ForSequenceClassification

    config = GPT2Config(vocab_size=50, n_embd=16, n_layer=3, n_head=2, num_labels=CLASSES, pad_token_id=0)
    return GPT2ForSequenceClassification(config), "score", "transformer.h.2"


def llama() -> tuple[Any, str | None, str]:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=CLASSES,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=3,
        num_attention_heads=2,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    return LlamaForCausalLM(config), "lm_head", "model.layers.2"


@pytest.mark.parametrize("make", [bert, distilbert, gpt2, llama])
def test_transformers_on_text(make: Callable[[], tuple[Any, str | None, str]]) -> None:
    pytest.importorskip("transformers")
    torch.manual_seed(0)
    model, head, last = make()
    ids = torch.randint(1, CLASSES, (2, 6))
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if make in (bert, distilbert):
        check(model, inputs, head, last, 3)
        return
    # The classifier of a decoder gives a row of logits a token, of which the model keeps one.
    model.eval()
    spec = ModelSpec.of("model", model, inputs)
    assert (spec.outputs, spec.head) == (CLASSES, head)
    assert (len(spec.stages()), spec.stages()[-1]) == (3, last)
    expected = by_plain_hooks(model, inputs, spec.stages())
    tapped = Tapped(model)
    with torch.no_grad():
        whole = tapped(inputs, spec.stages())
        stopped = tapped(inputs, spec.stages()[:1], logits=False)
    assert whole["logits"].shape[-1] == CLASSES
    for tap, tensor in expected.items():
        assert torch.equal(whole[f"tap:{tap}"], tensor)
    assert torch.equal(stopped[f"tap:{spec.stages()[0]}"], expected[spec.stages()[0]])


def test_transformers_on_images() -> None:
    pytest.importorskip("transformers")
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(
        hidden_size=16,
        num_hidden_layers=3,
        num_attention_heads=2,
        intermediate_size=32,
        image_size=16,
        patch_size=8,
        num_labels=CLASSES,
    )
    torch.manual_seed(0)
    model = ViTForImageClassification(config)
    last = [path for path, module in model.named_modules() if type(module).__name__ == "ViTLayer"][-1]
    check(model, torch.randn(2, 3, 16, 16), "classifier", last, 3)


def test_hidden_states_and_attentions_have_their_names() -> None:
    pytest.importorskip("transformers")
    model, _, _ = bert()
    model.set_attn_implementation("eager")
    model.config.output_hidden_states = model.config.output_attentions = True
    result = Tapped(model.eval())({"input_ids": torch.ones(2, 4, dtype=torch.long)})
    assert {f"attention:{layer}" for layer in range(3)} <= set(result)
    assert {f"extra:hidden_states.{layer}" for layer in range(4)} <= set(result)


def test_the_default_map_between_a_vit_and_a_resnet() -> None:
    timm = pytest.importorskip("timm")
    x = torch.randn(2, 3, 32, 32)
    student = ModelSpec.of("student", timm.create_model("resnet18", num_classes=CLASSES).eval(), x)
    vit = timm.create_model("vit_tiny_patch16_224", num_classes=CLASSES, img_size=32)
    pairs = match_stages(student, ModelSpec.of("teacher", vit.eval(), x))
    assert [ours for ours, _ in pairs] == ["layer1", "layer2", "layer3", "layer4"]
    blocks = [int(theirs.rpartition(".")[2]) for _, theirs in pairs]
    assert blocks == sorted(set(blocks))
    assert blocks[-1] == 11


def test_a_model_that_another_one_holds_keeps_its_stages() -> None:
    class Holder(nn.Module):
        def __init__(self, model: nn.Module) -> None:
            super().__init__()
            self.held = model

        def forward(self, x: Tensor) -> Tensor:
            return self.held(x)

    import timm

    inputs = torch.rand(2, 3, 32, 32)
    for name, options in (("vit_tiny_patch16_224", {"img_size": 32, "depth": 3}), ("resnet18", {})):
        model = timm.create_model(name, num_classes=CLASSES, **options)
        found = ModelSpec.of("held", Holder(model), inputs)
        assert found.stages() == tuple(
            f"held.{path}" for path in ModelSpec.of("bare", model, inputs).stages()
        )
