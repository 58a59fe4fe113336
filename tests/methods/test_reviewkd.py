"""reviewkd: fusions against official values, its term, which taps it finds, and what it refuses."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision
from objectives import ROWS, FakeStep, Pairing
from pydantic import ValidationError
from torch import Tensor, nn

from tutelage.engine.spec import ModelSpec
from tutelage.engine.taps import Tapped
from tutelage.functional import hcl_loss
from tutelage.methods.baselines.model import AttentionFusion
from tutelage.methods.baselines.reviewkd import ReviewKD
from tutelage.methods.baselines.stages import before_last_activation
from tutelage.models import build_model

GOLDEN = Path(__file__).parent.parent / "golden" / "baselines"
MASK = torch.tensor([1, 1, 0, 0, 1, 0])


def reviewkd(**options: Any) -> ReviewKD:
    return ReviewKD(ReviewKD.Config(name="reviewkd", **options))


@pytest.mark.parametrize("case", ["reviewkd_abf_fuse", "reviewkd_abf_last"])
def test_fusion_golden(case: str) -> None:
    with np.load(GOLDEN / f"{case}.npz") as data:
        arrays = {name: torch.from_numpy(np.asarray(data[name])) for name in data}
    x = arrays["in_x"].requires_grad_()
    residual = arrays["in_residual"].requires_grad_() if "in_residual" in arrays else None
    out_width, mid = arrays["in_conv2_0_weight"].shape[:2]
    fusion = AttentionFusion(x.shape[1], mid, out_width, residual is not None).double().train()
    loaded = {
        "reduce.weight": "conv1_0_weight",
        "reduce_norm.weight": "conv1_1_weight",
        "reduce_norm.bias": "conv1_1_bias",
        "expand.weight": "conv2_0_weight",
        "expand_norm.weight": "conv2_1_weight",
        "expand_norm.bias": "conv2_1_bias",
    }
    if residual is not None:
        loaded |= {"attention.weight": "att_conv_0_weight", "attention.bias": "att_conv_0_bias"}
    missing, unexpected = fusion.load_state_dict(
        {ours: arrays[f"in_{theirs}"] for ours, theirs in loaded.items()}, strict=False
    )
    assert not unexpected
    assert all("running" in name or "tracked" in name for name in missing)
    out, handed = fusion(x, residual, tuple(arrays["out_features"].shape[2:]))
    (out.square().sum() + handed.square().sum()).backward()
    torch.testing.assert_close(out, arrays["out_features"], rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(handed, arrays["out_residual"], rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(x.grad, arrays["grad_x"], rtol=1e-8, atol=1e-10)
    if residual is not None:
        torch.testing.assert_close(residual.grad, arrays["grad_residual"], rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize(("own", "deeper", "size"), [((4, 4), (1, 1), (8, 6)), ((7, 5), (3, 2), (7, 5))])
def test_fusion_of_any_sizes_is_that_of_the_joined_maps(
    own: tuple[int, int], deeper: tuple[int, int], size: tuple[int, int]
) -> None:
    """The paper's form: enlarge, join, convolve, weigh."""
    fusion = AttentionFusion(3, 4, 5, fuse=True).eval()
    x, residual = torch.randn(2, 3, *own), torch.randn(2, 4, *deeper)
    reduced, enlarged = fusion.reduce_norm(fusion.reduce(x)), F.interpolate(residual, own)
    assert fusion.attention is not None
    weights = fusion.attention(torch.cat([reduced, enlarged], 1)).sigmoid()
    fused = F.interpolate(reduced * weights[:, :1] + enlarged * weights[:, 1:], size)
    out, handed = fusion(x, residual, size)
    torch.testing.assert_close(handed, fused)
    torch.testing.assert_close(out, fusion.expand_norm(fusion.expand(fused)))
    assert out.shape == (2, 5, *size)


def test_fusion_refuses_what_it_was_not_built_for() -> None:
    x, residual = torch.randn(2, 3, 4, 4), torch.randn(2, 4, 2, 2)
    with pytest.raises(ValueError, match="to take a residual; got none"):
        AttentionFusion(3, 4, 5, fuse=True)(x, None, (4, 4))
    with pytest.raises(ValueError, match="it takes no residual"):
        AttentionFusion(3, 4, 5, fuse=False)(x, residual, (4, 4))
    with pytest.raises(ValueError, match=r"cannot train on 1 row\(s\) of a 1x1 map; use at least 2 rows"):
        AttentionFusion(3, 4, 5, fuse=False)(x[:1, :, :1, :1], None, (1, 1))


@pytest.mark.parametrize("mask", [None, MASK], ids=["all", "masked"])
@pytest.mark.parametrize("student", ["cnn-4-6", "mlp-7-9"])
def test_terms(mask: Tensor | None, student: str) -> None:
    pairing = Pairing(reviewkd(loss_weight=2.0, label_weight=0.5), student, mask=mask)
    method = pairing.method.eval()
    terms = pairing.terms(FakeStep(epoch=4))
    theirs = [pairing.teacher.features[path] for path in pairing.taps.teacher]
    theirs[-1] = theirs[-1][..., None, None]
    residual, found = None, []
    for stage in (2, 1, 0):
        features = pairing.student.features[pairing.taps.student[stage]]
        features = features[..., None, None] if features.dim() == 2 else features
        out, residual = method.fusions[stage](features, residual, tuple(theirs[stage].shape[2:]))
        found.insert(0, out)
    rows = slice(None) if mask is None else mask.bool()
    wanted = hcl_loss([each[rows] for each in found], [each[rows] for each in theirs])
    torch.testing.assert_close(terms["review"].mean, 2 * 5 / 20 * wanted)
    label = FakeStep().label_loss(pairing.student, pairing.batch)
    torch.testing.assert_close(terms["label"].mean, 0.5 * label.mean)


@pytest.mark.parametrize(("warmup", "share"), [(0, 1.0), (1, 1.0), (4, 0.75), (20, 0.15)])
def test_warm_up(warmup: int, share: float) -> None:
    """In the third epoch."""
    pairing = Pairing(reviewkd(warmup_epochs=warmup, label_weight=0))
    pairing.method.eval()
    found = pairing.terms(FakeStep(epoch=2))["review"].mean
    torch.testing.assert_close(found, share * pairing.terms(FakeStep(epoch=1000))["review"].mean)


def test_card_defaults() -> None:
    config = ReviewKD.Config(name="reviewkd")
    assert (config.label_weight, config.loss_weight, config.warmup_epochs, config.max_width) == (
        1,
        1,
        20,
        512,
    )
    pairing = Pairing(reviewkd())
    assert pairing.taps.student == ("layer1", "layer2", "head:in")
    assert pairing.taps.teacher == ("layer1.2:in", "layer2.2:in", "head:in")
    assert not pairing.taps.teacher_logits
    fusions = pairing.method.fusions
    assert [fusion.attention is not None for fusion in fusions] == [True, True, False]
    assert [fusion.reduce.out_channels for fusion in fusions] == [6, 6, 6]
    bound = (6 / fusions[0].reduce.in_channels / 2) ** 0.5  # kaiming uniform, a = 1
    assert fusions[0].reduce.weight.abs().max() <= bound
    assert fusions[0].reduce.bias is None


def test_options_of_taps() -> None:
    assert Pairing(reviewkd(pooled=False)).taps.student == ("layer1", "layer2")
    assert Pairing(reviewkd(student_preact=True)).taps.student == ("layer1.2:in", "layer2.2:in", "head:in")
    assert Pairing(reviewkd(teacher_preact=False)).taps.teacher == ("layer1", "layer2", "head:in")
    named = Pairing(reviewkd(student_taps=["layer2"], teacher_taps=["layer1.0"], student_preact=True)).taps
    assert (named.student, named.teacher) == (("layer2", "head:in"), ("layer1.0", "head:in"))
    assert Pairing(reviewkd(max_width=3)).method.fusions[1].reduce.out_channels == 3
    with pytest.raises(ValueError, match=r"the student has 1 \(layer2\), the teacher 2"):
        Pairing(reviewkd(student_taps=["layer2"]))


def test_every_part_learns_and_the_teacher_does_not() -> None:
    pairing = Pairing(reviewkd(label_weight=0))
    for features in pairing.teacher.features.values():
        features.retain_grad()
    pairing.backward()
    assert all(features.grad is None for features in pairing.teacher.features.values())
    assert all(parameter.grad is not None for parameter in pairing.method.parameters())
    assert pairing.nets[0].model.layer2[0].weight.grad is not None
    assert pairing.nets[0].model.head.weight.grad.abs().sum() == 0


def test_shallow_teacher_maps_train_deep_student_stages() -> None:
    """The review: the loss of the shallowest pair alone reaches the deepest student map."""
    pairing = Pairing(reviewkd())
    deep = pairing.student.features["layer2"]
    deep.retain_grad()
    maps = pairing.method.student_maps(pairing.student.features)
    pairing.method._review(maps, pairing.method.teacher_maps(pairing.teacher.features))[0].sum().backward()
    assert deep.grad is not None


def test_without_rows_that_count_the_loss_is_zero_with_a_gradient() -> None:
    pairing = Pairing(reviewkd(label_weight=0), mask=torch.zeros(ROWS))
    term = pairing.terms()["review"].mean
    term.backward()
    assert term == 0
    assert all(parameter.grad is not None for parameter in pairing.method.parameters())


def cifar(name: str) -> tuple[nn.Module, Tensor]:
    inputs = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    return build_model(f"cifar:{name}", outputs=10, input_shape=(3, 32, 32)).module, inputs


def timm_net(name: str, **options: Any) -> tuple[nn.Module, Tensor]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = timm.create_model(name, num_classes=10, **options)
    return model, torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("model", "taps"),
    [
        (cifar("resnet20"), [f"layer{i}.2.relu2:in" for i in (1, 2, 3)]),
        (timm_net("resnet18", zero_init_last=False), [f"layer{i}.1.act2:in" for i in (1, 2, 3, 4)]),
        (timm_net("resnet26", zero_init_last=False), [f"layer{i}.1.act3:in" for i in (1, 2, 3, 4)]),
        (cifar("vgg8"), None),
    ],
    ids=["cifar", "timm basic", "timm bottleneck", "vgg"],
)
def test_maps_before_the_last_activation(model: tuple[nn.Module, Tensor], taps: list[str] | None) -> None:
    """What the activation makes of the tapped map is what the stage gives; timm's work in place."""
    module, inputs = model
    spec = ModelSpec.of("model", module, inputs)
    found = [before_last_activation(spec, stage) for stage in spec.stages()]
    if taps is not None:
        assert found == taps
    assert None not in found
    result = Tapped(module).eval()(inputs, (*spec.stages(), *found))
    for stage, before in zip(spec.stages(), found, strict=True):
        features = result[f"tap:{before}"]
        assert (features < 0).any()
        torch.testing.assert_close(features.relu(), result[f"tap:{stage}"])


@pytest.mark.parametrize(
    "model",
    [
        cifar("wrn-16-1"),  # blocks that are activated before, not after
        timm_net("mobilenetv2_050"),  # inverted residuals end without an activation
        (torchvision.models.resnet18(num_classes=10), timm_net("resnet18")[1]),  # one ReLU runs twice a block
    ],
    ids=["wrn", "mobilenet", "reused"],
)
def test_stages_without_such_a_map_are_taken_as_they_are_and_that_is_said(
    model: tuple[nn.Module, Tensor],
) -> None:
    spec, method = ModelSpec.of("big", *model), reviewkd()
    student = ModelSpec.of("small", *cifar("resnet8"))
    with pytest.warns(
        UserWarning, match=r"no activation module ends .* of the teacher big; .*method\.teacher_taps"
    ):
        taps = method.taps(spec, student)
    assert set(taps.teacher[:-1]) <= set(spec.stages())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        reviewkd(teacher_preact=False).taps(spec, student)


def test_tokens_are_maps_and_a_missing_head_is_named() -> None:
    tokens = {"layer1": (16, 8), "layer2": (16, 8)}
    stages = ("layer1", "layer2")
    spec = ModelSpec("vit", None, 5, None, shapes=tokens, stage_paths=stages)
    method = reviewkd(pooled=False, teacher_preact=False)
    method.build(spec, spec, Pairing(reviewkd()).batch)
    assert method.teacher_maps.shapes == [(8, 4, 4)] * 2
    with pytest.raises(ValueError, match=r"logits of the student vit, .* set method.pooled=false"):
        reviewkd(teacher_preact=False).taps(spec, spec)


@pytest.mark.parametrize("option", [{"warmup_epochs": -1}, {"max_width": 0}, {"loss_weight": -1}])
def test_bounds_are_refused_by_name(option: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match=next(iter(option))):
        reviewkd(**option)
