"""The `cifar:` nets: published sizes, stages, taps, and that they learn from one another."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from support import Rows, train_config
from tutelage import catalogue
from tutelage.engine.compile import compile_regions
from tutelage.engine.loop import Trainer
from tutelage.engine.runtime import Runtime
from tutelage.engine.spec import ModelSpec
from tutelage.engine.taps import Tapped
from tutelage.models import ModelError, build_model, split, tap_table
from tutelage.models.names import CIFAR
from tutelage.tasks import build_task
from tutelage.teachers.local import LocalTeacher

SMALL = ("resnet8", "wrn-10-1", "vgg8", "mobilenetv2", "shufflenetv1", "shufflenetv2")
"""One of each family."""

# parameters in millions with 100 classes, channels and sizes of the stages, width of the pooled feature
THREE = (32, 16, 8)
LIGHT = (16, 8, 4)
FIVE = (32, 16, 8, 4, 4)
PUBLISHED: dict[str, tuple[float, tuple[int, ...], tuple[int, ...], int]] = {
    "resnet8": (0.08, (16, 32, 64), THREE, 64),
    "resnet14": (0.18, (16, 32, 64), THREE, 64),
    "resnet20": (0.28, (16, 32, 64), THREE, 64),
    "resnet32": (0.47, (16, 32, 64), THREE, 64),
    "resnet44": (0.67, (16, 32, 64), THREE, 64),
    "resnet56": (0.86, (16, 32, 64), THREE, 64),
    "resnet110": (1.74, (16, 32, 64), THREE, 64),
    "resnet8x4": (1.23, (64, 128, 256), THREE, 256),
    "resnet32x4": (7.43, (64, 128, 256), THREE, 256),
    "wrn-16-1": (0.18, (16, 32, 64), THREE, 64),
    "wrn-16-2": (0.70, (32, 64, 128), THREE, 128),
    "wrn-40-1": (0.57, (16, 32, 64), THREE, 64),
    "wrn-40-2": (2.26, (32, 64, 128), THREE, 128),
    "vgg8": (3.97, (64, 128, 256, 512, 512), FIVE, 512),
    "vgg13": (9.46, (64, 128, 256, 512, 512), FIVE, 512),
    "vgg16": (14.77, (64, 128, 256, 512, 512), FIVE, 512),
    "vgg19": (20.09, (64, 128, 256, 512, 512), FIVE, 512),
    "mobilenetv2": (0.81, (12, 16, 48, 160), (16, 8, 4, 2), 1280),
    "shufflenetv1": (0.95, (240, 480, 960), LIGHT, 960),
    "shufflenetv2": (1.36, (116, 232, 464), LIGHT, 1024),
}


def net(name: str, outputs: int = 10) -> nn.Module:
    return build_model(f"cifar:{name}", outputs=outputs, input_shape=(3, 32, 32)).module


def test_every_name_is_held_here() -> None:
    assert tuple(PUBLISHED) == CIFAR


@pytest.mark.parametrize("name", CIFAR)
def test_published_sizes_and_stages(name: str) -> None:
    millions, widths, sides, pooled = PUBLISHED[name]
    module = net(name, outputs=100)
    assert round(sum(parameter.numel() for parameter in module.parameters()) / 1e6, 2) == millions
    spec = ModelSpec.of(name, module, torch.randn(1, 3, 32, 32))
    stages = tuple(f"layer{number}" for number in range(1, len(widths) + 1))
    assert (spec.outputs, spec.head, spec.stages()) == (100, "head", stages)
    wanted = [(width, side, side) for width, side in zip(widths, sides, strict=True)]
    assert [spec.shape(stage) for stage in stages] == wanted
    assert spec.shape(spec.pooled) == (pooled,)


def test_any_depth_and_width_of_the_two_residual_families() -> None:
    widths = [parameter.shape[0] for parameter in net("wrn-10-3").parameters() if parameter.dim() == 4]
    assert max(widths) == 192
    blocks = [path for path, _ in net("resnet26x4").named_modules() if path.count(".") == 1]
    assert blocks == [f"layer{stage}.{block}" for stage in (1, 2, 3) for block in range(4)]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("resnet30", r"cifar:resnet30: a depth is 6n \+ 2 \(8, 14, 20, …\); got 30, the nearest is 32"),
        ("resnet2", r"the nearest is 8"),
        ("resnet9x4", r"cifar:resnet9x4: a depth is 6n \+ 2"),
        ("wrn-41-2", r"cifar:wrn-41-2: a depth is 6n \+ 4 \(10, 16, 22, …\); got 41, the nearest is 40"),
        ("vgg12", r"unknown model 'cifar:vgg12'; did you mean .*'cifar:vgg13'"),
        ("wrn-40", r"did you mean .*'cifar:wrn-40-1'"),
        ("resnet20x2", r"did you mean 'cifar:resnet20'"),
    ],
)
def test_names_that_are_no_nets(name: str, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        net(name)


def test_a_name_without_its_family() -> None:
    with pytest.raises(ModelError, match=r"did you mean 'cifar:wrn-40-2'"):
        build_model("wrn-40-2", outputs=2, input_shape=(3, 32, 32))


@pytest.mark.parametrize("name", SMALL)
def test_other_images(name: str) -> None:
    module = build_model(f"cifar:{name}", outputs=3, input_shape=(1, 20, 28)).module
    assert module(torch.randn(2, 1, 20, 28)).shape == (2, 3)
    with pytest.raises(ModelError, match="takes images"):
        build_model(f"cifar:{name}", outputs=2, input_shape=(13,))


@pytest.mark.parametrize(
    ("name", "before", "after"),
    [
        ("resnet8", "layer*.-1.relu2:in", "layer*"),
        ("vgg8", "layer*.-1:in", "layer*"),
        ("shufflenetv1", "layer*.-1.relu3:in", "layer*"),
        ("shufflenetv2", "layer*.-1.relu2:in", "layer*.-1.relu2"),
    ],
)
def test_maps_before_a_stages_last_activation(name: str, before: str, after: str) -> None:
    """They have negative entries, and the stage's own map is their positive part (v2 shuffles it afterwards)."""
    inputs, stages = tapped(name, (before,)).values(), tapped(name, (after,)).values()
    assert len(inputs) >= 3
    for early, late in zip(inputs, stages, strict=True):
        assert (early < 0).any()
        assert torch.equal(early.relu(), late)


def test_a_wide_net_gives_its_stages_before_their_activation() -> None:
    seen = tapped("wrn-10-1", ("layer*", "layer2.0.relu1:in", "layer3.0.relu1:in", "relu:in"))
    module = net("wrn-10-1").eval()
    norms = {"layer1": "layer2.0.bn1", "layer2": "layer3.0.bn1", "layer3": "bn"}
    for stage, norm in norms.items():
        assert (seen[stage] < 0).any()
        normalised = seen[f"{norm.replace('bn', 'relu')}:in"]
        torch.testing.assert_close(module.get_submodule(norm)(seen[stage]), normalised)


def tapped(name: str, patterns: tuple[str, ...]) -> dict[str, Tensor]:
    module = net(name).eval()
    inputs = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    paths = ModelSpec.of(name, module, inputs).resolve(patterns)
    with torch.no_grad():
        result = Tapped(module)(inputs, paths)
    return {path: result[f"tap:{path}"] for path in paths}


def test_the_table_of_taps() -> None:
    depths = {info.path: info.depth for info in tap_table("cifar:wrn-40-2")}
    shapes = {info.path: info.shape for info in tap_table("cifar:wrn-40-2")}
    assert shapes["layer2.5.conv2"] == (64, 16, 16)
    assert depths["layer1"] < depths["layer2"] < depths["layer3"] < depths["head"]
    assert list(depths)[-3:] == ["pool", "flatten", "head"]


@pytest.mark.parametrize("name", SMALL)
def test_channels_last_and_compiled_regions_change_nothing(name: str) -> None:
    inputs = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    module = net(name).eval()
    with torch.no_grad():
        wanted = Tapped(module)(inputs, ("layer2",))
        module.to(memory_format=torch.channels_last)
        found = Tapped(module)(inputs.to(memory_format=torch.channels_last), ("layer2",))
        assert found["tap:layer2"].is_contiguous(memory_format=torch.channels_last)
        assert compile_regions(module, ("layer2",), backend="eager") >= 2
        compiled = Tapped(module)(inputs, ("layer2",))
    for key, value in wanted.items():
        torch.testing.assert_close(found[key], value, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(compiled[key], value, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", SMALL)
def test_every_weight_learns(name: str) -> None:
    module = net(name)
    module(torch.randn(4, 3, 32, 32)).square().mean().backward()
    idle = [
        path for path, p in module.named_parameters() if p.grad is None or not torch.isfinite(p.grad).all()
    ]
    assert idle == []


@pytest.mark.parametrize("name", SMALL)
def test_it_splits_after_a_stage(name: str) -> None:
    module, inputs = net(name).eval(), torch.randn(2, 3, 32, 32)
    lower, upper = split(module, "layer2", inputs)
    assert torch.equal(upper(lower(inputs)), module(inputs))


PAIRS = [
    ("resnet32x4", "resnet8x4"),
    ("wrn-40-2", "wrn-16-2"),
    ("resnet32x4", "shufflenetv2"),
    ("vgg13", "vgg8"),
    ("vgg13", "mobilenetv2"),
]


@pytest.mark.parametrize("method", ["fitnet", "kd"])
@pytest.mark.parametrize(("teacher", "student"), PAIRS, ids=["-".join(pair) for pair in PAIRS])
def test_a_step_of_the_published_pairs(teacher: str, student: str, method: str) -> None:
    generator = torch.Generator().manual_seed(0)
    source = Rows(torch.rand(4, 3, 32, 32, generator=generator), torch.randint(10, (4,), generator=generator))
    found = catalogue.load(method)
    trainer = Trainer(
        Runtime("cpu"),
        net(student),
        found(found.Config(name=method)),
        build_task("classification", 10),
        source,
        train_config(steps=1, batch_size=4),
        teachers={"teacher": LocalTeacher("teacher", net(teacher), source.inputs[:2]).freeze()},
    )
    before = {name: parameter.detach().clone() for name, parameter in trainer.parameters.items()}
    trainer.run()
    terms = {name: float(value) for name, value in trainer.last[0].items()}
    assert terms.keys() == {"label", "hint" if method == "fitnet" else "kd"}
    assert all(value > 0 for value in terms.values())
    assert all(
        not torch.equal(trainer.parameters[name], value) for name, value in before.items() if value.dim() > 1
    )
