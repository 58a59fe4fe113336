"""What a method knows of a model before the first step."""

from __future__ import annotations

from collections import OrderedDict

import pytest
import torch
from torch import Tensor, nn

from tutelage.engine.spec import ModelSpec, match_stages
from tutelage.engine.taps import TapError, TapInfo


def plain(*, head: nn.Module | None = None, classes: int = 5) -> nn.Sequential:
    return nn.Sequential(
        OrderedDict(
            layer1=nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(inplace=True)),
            layer2=nn.Sequential(nn.Conv2d(4, 6, 3, stride=2, padding=1), nn.ReLU()),
            pool=nn.AdaptiveAvgPool2d(1),
            flatten=nn.Flatten(),
            last=head or nn.Linear(6, classes),
        )
    )


@pytest.fixture
def images() -> Tensor:
    return torch.randn(2, 3, 8, 8)


def test_of_a_model(images: Tensor) -> None:
    spec = ModelSpec.of("student", plain(), images, mean=[0.5], std=[2.0])
    assert (spec.outputs, spec.head, spec.pooled) == (5, "last", "last:in")
    assert spec.stages() == ("layer1", "layer2")
    assert spec.shape("layer2") == (6, 4, 4)
    assert spec.shape(spec.pooled) == (6,)
    assert (spec.mean, spec.std) == ((0.5,), (2.0,))


def test_resolving_knows_stages_and_head(images: Tensor) -> None:
    spec = ModelSpec.of("student", plain(), images)
    assert spec.resolve(["head:in", "-1", "layer1.0"]) == ("layer1.0", "layer2", "last:in")
    with pytest.raises(TapError, match=r"^student: tap 'layr1' names no module.*near: layer1"):
        spec.resolve(["layr1"])
    with pytest.raises(TapError, match=r"^student: tap 'layer2.4' gives no tensor"):
        spec.shape("layer2.4")


class Wrapped(nn.Module):
    """A head whose output is changed on its way out."""

    def __init__(self, change: str) -> None:
        super().__init__()
        self.body, self.first, self.second, self.change = (
            nn.Linear(6, 6),
            nn.Linear(6, 5),
            nn.Linear(6, 5),
            change,
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.body(x)
        if self.change == "mean of two":
            return (self.first(x) + self.second(x)) / 2
        if self.change == "view":
            return self.first(x)[:, None].flatten(1)
        if self.change == "softcap":
            return 30 * torch.tanh(self.first(x) / 30)
        return self.first(x).softmax(-1) @ self.second.weight


@pytest.mark.parametrize(
    ("change", "head"),
    [("mean of two", None), ("view", "first"), ("softcap", "first"), ("another layer's", None)],
)
def test_the_head_is_the_layer_that_gives_the_logits(change: str, head: str | None) -> None:
    model = Wrapped(change)
    if change == "another layer's":
        model.first = nn.Linear(6, 5)
    spec = ModelSpec.of("model", model, torch.randn(2, 6))
    assert spec.head == head
    if head is None:
        with pytest.raises(TapError, match="no single layer gives its logits"):
            _ = spec.pooled


def test_a_convolution_as_classifier(images: Tensor) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Conv2d(4, 5, 1), nn.Flatten())
    spec = ModelSpec.of("model", model, images)
    assert (spec.head, spec.outputs) == ("2", 5)
    assert spec.shape(spec.pooled) == (4, 1, 1)


@pytest.mark.parametrize(("shape", "outputs"), [((2,), 1), ((2, 9), 9), ((2, 5, 9), 9), ((2, 9, 4, 4), 9)])
def test_classes_by_the_shape_of_logits(shape: tuple[int, ...], outputs: int) -> None:
    class Fixed(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.zeros(shape)

    assert ModelSpec.of("model", Fixed(), torch.randn(2, 3)).outputs == outputs


def test_a_model_without_logits() -> None:
    class Encoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(3, 4)

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            return {"states": self.fc(x)}

    spec = ModelSpec.of("model", Encoder(), torch.randn(2, 3))
    assert (spec.outputs, spec.head, spec.shape("fc")) == (None, None, (4,))


def test_a_store_knows_what_it_keeps() -> None:
    spec = ModelSpec("store", None, 5, "fc", shapes={"layer1": (4, 8, 8), "layer2": (6, 4, 4), "fc:in": (6,)})
    assert spec.resolve(["head:in", "layer*"]) == ("layer1", "layer2", "fc:in")
    assert spec.shape("layer2") == (6, 4, 4)
    with pytest.raises(TapError, match="'layer3' is not stored; stored are layer1, layer2, fc:in"):
        spec.resolve(["layer3"])
    with pytest.raises(TapError, match="near: layer1, layer2, fc:in"):
        spec.shape("layer3")


def test_a_module_under_two_paths_is_known_by_both() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(3, 4)
            self.alias = self.first

        def forward(self, x: Tensor) -> Tensor:
            return self.alias(x)

    spec = ModelSpec.of("model", Tied(), torch.randn(2, 3))
    assert spec.shape("first") == spec.shape("alias") == (4,)
    assert spec.resolve(["alias"]) == ("alias",)


def test_default_map_of_two_models(images: Tensor) -> None:
    parts = dict(plain().named_children())
    more = nn.Sequential(nn.Conv2d(6, 6, 3, padding=1), nn.ReLU())
    deep = nn.Sequential(
        OrderedDict(layer1=parts.pop("layer1"), layer2=parts.pop("layer2"), layer3=more, **parts)
    )
    student, teacher = ModelSpec.of("student", plain(), images), ModelSpec.of("teacher", deep, images)
    assert len(teacher.stages()) == 3
    pairs = match_stages(student, teacher)
    assert [ours for ours, _ in pairs] == ["layer1", "layer2"]
    theirs = [teacher.stages().index(path) for _, path in pairs]
    assert theirs == sorted(set(theirs))
    assert all(isinstance(info, TapInfo) for info in teacher.infos)
