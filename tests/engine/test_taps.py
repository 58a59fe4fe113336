"""Taps: what is captured is what the module gave, no deeper is run than needed, and the model is left as it was."""

from __future__ import annotations

import copy
from collections import OrderedDict, namedtuple
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tutelage.engine.taps import (
    TapError,
    TapInfo,
    Tapped,
    list_taps,
    match_depth,
    outputs_of,
    probe_shapes,
    resolve_taps,
    stages,
)


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1)
        self.bn = nn.BatchNorm2d(width)
        self.act = nn.ReLU(inplace=True)
        self.out = nn.Conv2d(width, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.out(self.act(self.bn(self.conv(x))))


def net(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(
        OrderedDict(
            stem=nn.Conv2d(3, 4, 3, padding=1),
            layer1=nn.Sequential(Block(4), Block(4)),
            layer2=nn.Sequential(Block(4), Block(4)),
            pool=nn.AdaptiveAvgPool2d(1),
            flatten=nn.Flatten(),
            fc=nn.Linear(4, 5),
        )
    )


@pytest.fixture
def images() -> Tensor:
    return torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def runs_of(model: nn.Module) -> list[str]:
    """Names of the modules that finish, filled as forwards run."""
    done: list[str] = []
    for name, module in model.named_modules():
        module.register_forward_hook(lambda *_, name=name: done.append(name))
    return done


def hook_count(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


# --- what is captured


def test_outputs_and_inputs_are_those_of_the_modules(images: Tensor) -> None:
    model = net().eval()
    result = Tapped(model)(images, ("layer1", "layer2.0:in", "fc:in"))
    at_layer1 = model.layer1(model.stem(images))
    torch.testing.assert_close(result["tap:layer1"], at_layer1)
    torch.testing.assert_close(result["tap:layer2.0:in"], at_layer1)
    torch.testing.assert_close(result["logits"], model.fc(result["tap:fc:in"]))
    assert list(result) == ["logits", "tap:layer1", "tap:layer2.0:in", "tap:fc:in"]


@pytest.mark.parametrize("mode", ["grad", "no_grad", "inference"])
@pytest.mark.parametrize("logits", [True, False])
def test_a_tap_before_an_inplace_relu_is_what_the_module_returned(
    images: Tensor, mode: str, logits: bool
) -> None:
    model = net().eval()
    taps = ("layer1.0.bn", "layer1.0.act:in", "layer1.0.act", "layer2.1")
    inner = model.layer1[0]
    expected = inner.bn(inner.conv(model.stem(images))).detach()
    assert bool((expected < 0).any())
    tapped = Tapped(model)
    guard = {"grad": torch.enable_grad, "no_grad": torch.no_grad, "inference": torch.inference_mode}[mode]
    for _ in range(3):
        with guard():
            result = tapped(images, taps, logits)
        torch.testing.assert_close(result["tap:layer1.0.bn"], expected)
        torch.testing.assert_close(result["tap:layer1.0.act:in"], expected)
        torch.testing.assert_close(result["tap:layer1.0.act"], expected.relu())


def test_gradients_through_a_tap_before_an_inplace_relu(images: Tensor) -> None:
    """The same gradients as those of a net without in-place operations, in the first call and in later ones."""
    plain = net().eval()
    for module in plain.modules():
        if isinstance(module, nn.ReLU):
            module.inplace = False
    tapped, reference = Tapped(net().eval()), Tapped(plain)
    for _ in range(2):
        for holder in (tapped, reference):
            holder.zero_grad()
            result = holder(images, ("layer1.0.bn", "layer2.0"))
            (
                result["tap:layer1.0.bn"].sin().sum()
                + result["tap:layer2.0"].mean()
                + result["logits"].square().sum()
            ).backward()
        for ours, theirs in zip(tapped.parameters(), reference.parameters(), strict=True):
            torch.testing.assert_close(ours.grad, theirs.grad)


def test_what_is_not_overwritten_is_not_copied(images: Tensor) -> None:
    model = net()
    given: list[Tensor] = []
    model.layer2.register_forward_hook(lambda module, args, output: given.append(output))
    tapped = Tapped(model)
    for _ in range(2):
        assert tapped(images, ("layer2",))["tap:layer2"] is given[-1]


class Whim(nn.Module):
    """Changes its first layer's output in place only when told to."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.spoil = nn.Linear(3, 3), nn.Linear(3, 2), False

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x)
        return self.second(hidden.mul_(2) if self.spoil else hidden * 2)


def test_an_inplace_change_that_the_first_call_did_not_show_is_an_error() -> None:
    model = Whim()
    tapped = Tapped(model)
    tapped(torch.randn(2, 3), ("first",))
    model.spoil = True
    with pytest.raises(TapError, match="'first' was changed in place"):
        tapped(torch.randn(2, 3), ("first",))


class Shared(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer, self.head = nn.Linear(3, 3), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer(self.layer(x)))


def test_a_module_that_runs_twice_is_tapped_at_its_first_run() -> None:
    model, x = Shared(), torch.randn(2, 3)
    whole, stopped = Tapped(model)(x, ("layer",)), Tapped(model)(x, ("layer",), logits=False)
    torch.testing.assert_close(whole["tap:layer"], model.layer(x))
    torch.testing.assert_close(stopped["tap:layer"], model.layer(x))


# --- what models return

Pair = namedtuple("Pair", ["logits", "aux"])


@pytest.mark.parametrize(
    ("wrap", "extra"),
    [
        (lambda x: x, {}),
        (lambda x: (x, x + 1), {"1": 1.0}),
        (
            lambda x: {"logits": x, "aux": x + 1, "note": "text", "states": (x + 2,)},
            {"aux": 1.0, "states.0": 2.0},
        ),
        (lambda x: Pair(x, x + 1), {"aux": 1.0}),
    ],
)
def test_every_kind_of_output(wrap: Any, extra: dict[str, float]) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(3, 2)

        def forward(self, x: Tensor) -> Any:
            return wrap(self.fc(x))

    model, x = Model(), torch.randn(2, 3)
    outputs = outputs_of(Tapped(model)(x, ("fc",)))
    torch.testing.assert_close(outputs.logits, model.fc(x))
    torch.testing.assert_close(outputs.feature(), model.fc(x))
    assert set(outputs.extra) == set(extra)
    for name, shift in extra.items():
        torch.testing.assert_close(outputs.extra[name], model.fc(x) + shift)


def test_a_tap_on_a_module_that_gives_a_dict_or_tuple_is_its_first_tensor() -> None:
    class Inner(nn.Module):
        def forward(self, x: Tensor) -> Any:
            return {"none": None, "list": [(x + 1,)], "later": x}

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Inner()

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x)["later"]

    x = torch.randn(2, 3)
    torch.testing.assert_close(Tapped(Model())(x, ("inner",))["tap:inner"], x + 1)


def test_no_logits_is_said_and_taps_alone_still_work() -> None:
    class Encoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(3, 2)

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            return {"last_hidden_state": self.fc(x)}

    tapped = Tapped(Encoder())
    with pytest.raises(TapError, match="no logits, only extra:last_hidden_state"):
        tapped(torch.randn(2, 3))
    assert tapped(torch.randn(2, 3), ("fc",), logits=False)["tap:fc"].shape == (2, 2)
    with pytest.raises(TapError, match="nothing was asked for"):
        tapped(torch.randn(2, 3), logits=False)


def test_a_model_that_returns_something_else_is_refused() -> None:
    class Model(nn.Module):
        def forward(self, x: Tensor) -> str:
            return "text"

    with pytest.raises(TapError, match="returned a str"):
        Tapped(Model())(torch.randn(2, 3))


# --- early stop, exceptions, re-entry


def test_the_forward_runs_only_as_deep_as_the_deepest_tap(images: Tensor) -> None:
    model = net()
    done = runs_of(model)
    tapped = Tapped(model)
    tapped(images, ("layer1.0", "stem"), logits=False)
    assert done == ["stem", "layer1.0.conv", "layer1.0.bn", "layer1.0.act", "layer1.0.out", "layer1.0"]
    done.clear()
    tapped(images, ("layer1.1:in",), logits=False)
    assert done[-1] == "layer1.0"
    done.clear()
    tapped(images, ("layer1.0",))
    assert done[-1] == ""


def test_a_stopped_forward_gives_what_a_whole_one_gives(images: Tensor) -> None:
    tapped = Tapped(net().eval())
    whole, stopped = (
        tapped(images, ("layer1", "layer2.0")),
        tapped(images, ("layer1", "layer2.0"), logits=False),
    )
    assert list(stopped) == ["tap:layer1", "tap:layer2.0"]
    for key in stopped:
        assert torch.equal(whole[key], stopped[key])


def test_hooks_are_gone_after_a_call_a_stop_and_an_exception(images: Tensor) -> None:
    model = net()
    before = hook_count(model)
    tapped = Tapped(model)
    tapped(images, ("layer1", "fc:in"))
    tapped(images, ("layer1",), logits=False)
    with pytest.raises(RuntimeError):
        tapped(torch.randn(2, 7, 8, 8), ("layer1",))
    with pytest.raises(TapError):
        tapped(images, ("layer1", "layer9"))
    assert hook_count(model) == before
    assert tapped(images, ("layer1",))["tap:layer1"].shape == (2, 4, 8, 8)


def test_a_models_own_exception_comes_through(images: Tensor) -> None:
    class Broken(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            raise ValueError("as it is")

    with pytest.raises(ValueError, match="as it is"):
        Tapped(Broken())(torch.randn(1, 3), ("fc",))


def test_two_holders_and_different_taps_in_one_step(images: Tensor) -> None:
    teacher, student = Tapped(net(1).eval()), Tapped(net(2).eval())
    first = student(images, ("layer1",))
    other = teacher(images, ("layer2",), logits=False)
    second = student(images, ("layer2", "stem"))
    assert set(other) == {"tap:layer2"}
    assert set(second) == {"logits", "tap:layer2", "tap:stem"}
    torch.testing.assert_close(first["logits"], second["logits"])
    assert not torch.equal(other["tap:layer2"], second["tap:layer2"])


def test_a_holder_inside_a_held_model_stops_only_itself(images: Tensor) -> None:
    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.head = Tapped(net()), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            features = self.inner(x, ("layer1",), logits=False)["tap:layer1"]
            return self.head(features.mean((2, 3)))

    outer = Tapped(Outer())
    assert outer(images)["logits"].shape == (2, 2)
    assert set(outer(images, ("inner.model.stem",), logits=False)) == {"tap:inner.model.stem"}


@pytest.mark.parametrize("taps", [("layer2.0", "layer1"), ("layer1", "layer1"), ("fc:in", "fc")])
def test_any_order_and_doubles(images: Tensor, taps: tuple[str, ...]) -> None:
    stopped = Tapped(net())(images, taps, logits=False)
    assert set(stopped) == {f"tap:{tap}" for tap in taps}


# --- swaps, copies, feeding, normalisation


def test_functional_call_uses_the_swapped_parameters(images: Tensor) -> None:
    tapped = Tapped(net().eval())
    doubled = {f"model.{name}": 2 * p for name, p in tapped.model.named_parameters()}
    result = torch.func.functional_call(tapped, doubled, (images, ("stem", "layer1.0.bn")))
    torch.testing.assert_close(result["tap:stem"], 2 * tapped.model.stem(images))
    gradients = torch.func.grad(
        lambda p: torch.func.functional_call(tapped, p, (images, ("layer1.0.bn",)))["tap:layer1.0.bn"].sum()
    )(dict(tapped.named_parameters()))
    assert gradients["model.stem.weight"].abs().sum() > 0
    assert gradients["model.fc.weight"].abs().sum() == 0


def test_a_deep_copy_works_on_its_own(images: Tensor) -> None:
    tapped = Tapped(net().eval(), mean=[0.5, 0.5, 0.5], std=[1.0, 2.0, 3.0])
    tapped(images, ("layer1.0.bn",))
    twin = copy.deepcopy(tapped)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
    assert twin(images, ("layer1.0.bn",))["logits"].abs().max() == 0
    assert tapped(images, ("layer1.0.bn",))["logits"].abs().max() > 0
    assert hook_count(twin) == 0


def test_feeding_a_tap_runs_onward_from_it(images: Tensor) -> None:
    model = net().eval()
    tapped = Tapped(model)
    state = torch.randn(2, 4, 8, 8, requires_grad=True)
    result = tapped(images, ("layer1", "layer2"), feed=("layer1", state))
    torch.testing.assert_close(result["tap:layer1"], state)
    torch.testing.assert_close(result["tap:layer2"], model.layer2(state))
    result["logits"].sum().backward()
    assert state.grad is not None
    assert all(p.grad is None for p in model.layer1.parameters())
    with pytest.raises(TapError, match="'layer7' names no module"):
        tapped(images, feed=("layer7", state))


def test_a_fed_tensor_is_not_changed_in_place(images: Tensor) -> None:
    state = torch.randn(2, 4, 8, 8)
    before = state.clone()
    with torch.no_grad():
        Tapped(net())(images, feed=("layer1.0.bn", state))
    assert torch.equal(state, before)


def test_normalisation_by_channel(images: Tensor) -> None:
    mean, std = (0.1, 0.2, 0.3), (1.0, 2.0, 4.0)
    model = net().eval()
    tapped = Tapped(model, mean=mean, std=std)
    expected = torch.stack([(images[:, c] - mean[c]) / std[c] for c in range(3)], dim=1)
    torch.testing.assert_close(tapped.normalise(images), expected)
    torch.testing.assert_close(tapped(images)["logits"], model(expected))
    torch.testing.assert_close(tapped.normalise({"pixel_values": images})["pixel_values"], expected)
    assert not set(tapped.state_dict()) & {"mean", "std"}
    rows = torch.randn(4, 3)
    torch.testing.assert_close(tapped.normalise(rows), (rows - torch.tensor(mean)) / torch.tensor(std))
    torch.testing.assert_close(Tapped(model, mean=[0.5], std=[2.0]).normalise(images), (images - 0.5) / 2)


@pytest.mark.parametrize(
    ("mean", "std", "message"),
    [
        ((0.0,), None, "together"),
        ((0.0,), (0.0,), "above 0"),
        ((0.0, 0.0), (1.0, 1.0), "3 channels, mean and std have 2"),
    ],
)
def test_wrong_normalisation(images: Tensor, mean: Any, std: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Tapped(net(), mean=mean, std=std)(images)


# --- errors


def test_a_tap_that_does_not_fire_is_an_error_every_time() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.unused = nn.Linear(3, 2), nn.Linear(3, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.used(x)

    tapped = Tapped(Model())
    for logits in (True, False, True):
        with pytest.raises(TapError, match="'unused' did not fire"):
            tapped(torch.randn(2, 3), ("used", "unused"), logits)


def test_an_unknown_path_lists_the_near_ones(images: Tensor) -> None:
    with pytest.raises(TapError, match=r"'layer1\.0\.cnov'.*near: .*layer1\.0\.conv"):
        Tapped(net())(images, ("layer1.0.cnov",))


# --- patterns


@pytest.mark.parametrize(
    ("patterns", "found"),
    [
        (["layer1.0.conv"], ["layer1.0.conv"]),
        (["layer*.1"], ["layer1.1", "layer2.1"]),
        (["layer*.-1"], ["layer1.1", "layer2.1"]),
        (["layer2.-2.conv"], ["layer2.0.conv"]),
        (["**.bn"], ["layer1.0.bn", "layer1.1.bn", "layer2.0.bn", "layer2.1.bn"]),
        (["layer1.**.act"], ["layer1.0.act", "layer1.1.act"]),
        (["-1", "-2"], ["layer1", "layer2"]),
        (["head:in"], ["fc:in"]),
        (["fc", "fc:in", "stem"], ["stem", "fc:in", "fc"]),
        (["layer1.?", "layer1.1", "layer*.1:in"], ["layer1.0", "layer1.1:in", "layer1.1", "layer2.1:in"]),
    ],
)
def test_patterns(patterns: list[str], found: list[str]) -> None:
    assert list(resolve_taps(net(), patterns, stages=("layer1", "layer2"), head="fc")) == found


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("layr1", "near: layer1"),
        ("layer1.5.conv", r"near: .*layer1\.0\.conv"),
        ("layer9.*", "names no module"),
        ("layer1.-3", "names no module"),
        ("", "is empty"),
        (":in", "is empty"),
        ("-3", "has 2 stages"),
    ],
)
def test_a_pattern_that_fits_nothing(pattern: str, message: str) -> None:
    with pytest.raises(TapError, match=message):
        resolve_taps(net(), [pattern], stages=("layer1", "layer2"))


def test_a_module_list_never_fires() -> None:
    model = nn.Module()
    model.blocks = nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)])
    with pytest.raises(
        TapError, match=r"ModuleList, which never runs; tap what it holds: blocks\.0, blocks\.1"
    ):
        resolve_taps(model, ["blocks"])
    assert resolve_taps(model, ["**"]) == ("blocks.0", "blocks.1")


# --- probing


def test_probing_leaves_the_model_as_it_was(images: Tensor) -> None:
    model = net().train()
    model.layer1.eval()
    model.drop = nn.Dropout(0.5)
    model.register_buffer("count", torch.zeros(()))
    model.register_forward_pre_hook(lambda module, args: module.count.add_(1) and None)
    state = copy.deepcopy(model.state_dict())
    modes = [module.training for module in model.modules()]
    generator = torch.get_rng_state()
    probe_shapes(model, images, ["layer1", "fc:in"])
    list_taps(model, images)
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), generator)
    for name, value in model.state_dict().items():
        assert torch.equal(value, state[name]), name
    assert all(parameter.grad is None for parameter in model.parameters())
    with pytest.raises(RuntimeError):
        probe_shapes(model, torch.randn(2, 9, 8, 8), ["layer1"])
    assert [module.training for module in model.modules()] == modes
    assert hook_count(model) == 1


def test_shapes(images: Tensor) -> None:
    assert probe_shapes(net(), images, ["layer1", "fc:in", "fc"]) == {
        "layer1": (4, 8, 8),
        "fc:in": (4,),
        "fc": (5,),
    }
    with pytest.raises(TapError, match=r"near: .*layer1"):
        probe_shapes(net(), images, ["layer"])


def test_a_tensor_without_a_row_axis_has_no_shape() -> None:
    class Windows(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fold, self.head = nn.Identity(), nn.Linear(2, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.fold(x.reshape(-1, 2)).reshape(len(x), -1, 2).mean(1))

    x = torch.randn(2, 6)
    assert {info.path: info.shape for info in list_taps(Windows(), x)} == {"fold": None, "head": (2,)}
    with pytest.raises(TapError, match="whose first axis is not the 2 rows"):
        probe_shapes(Windows(), x, ["fold"])


def test_list_taps_is_in_firing_order_with_rising_depth(images: Tensor) -> None:
    infos = list_taps(net(), images)
    assert [info.path for info in infos][:3] == ["stem", "layer1.0.conv", "layer1.0.bn"]
    depths = [info.depth for info in infos]
    assert depths == sorted(depths)
    assert 0 < depths[0] < depths[-1] <= 1
    assert next(info for info in infos if info.path == "layer1.0").kind == "Block"


def test_stages_of_plain_nets(images: Tensor) -> None:
    assert stages(net(), images) == ("layer1", "layer2")
    mlp = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 4), nn.ReLU(), nn.Dropout(), nn.Linear(4, 3))
    assert stages(mlp, torch.randn(2, 6)) == ("1", "3")


# --- depth ratio


def infos(*depths: float) -> list[TapInfo]:
    return [TapInfo(f"at{depth}", "Block", None, depth) for depth in depths]


@pytest.mark.parametrize(
    ("student", "teacher", "pairs"),
    [
        ((0.5, 1.0), (0.25, 0.5, 0.75, 1.0), [(0.5, 0.5), (1.0, 1.0)]),
        ((0.3, 0.6, 0.9), (0.5, 0.95), [(0.6, 0.5), (0.9, 0.95)]),
        ((0.9, 0.95), (0.1, 0.2, 0.3), [(0.9, 0.2), (0.95, 0.3)]),
        ((), (0.5,), []),
    ],
)
def test_depths_are_matched_in_order_and_once(student: Any, teacher: Any, pairs: Any) -> None:
    assert match_depth(infos(*student), infos(*teacher)) == [(f"at{a}", f"at{b}") for a, b in pairs]
