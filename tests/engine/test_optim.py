"""Who trains which parameter, the rates, the options, and state that resumes bit for bit."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tutelage.engine.checkpoint import CheckpointFolder, Snapshot
from tutelage.engine.method import OptimSpec
from tutelage.engine.optim import Optim, OptimError, build_optimizers
from tutelage.engine.optim_groups import layer_depths
from tutelage.engine.optim_names import optimizer_names
from tutelage.engine.schedules import rate
from tutelage.recipe.schema import OptimizerConfig, ScheduleConfig

MAIN = {"main": OptimSpec(("student.*", "method.*"))}
CONSTANT = ScheduleConfig(name="constant")


def network(seed: int = 0) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        student = nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(16, 3))
        return nn.ModuleDict({"student": student, "method": nn.Linear(3, 3)})


def build(
    whole: nn.Module,
    config: OptimizerConfig,
    schedule: ScheduleConfig = CONSTANT,
    total: int = 20,
    **options: Any,
) -> Optim:
    return build_optimizers(dict(whole.named_parameters()), MAIN, config, schedule, total, **options)["main"]


def train(whole: Any, optim: Optim, steps: range) -> None:
    for step in steps:
        draw = torch.Generator().manual_seed(step)
        optim.set_step(step)
        optim.optimizer.zero_grad()
        outputs = whole["method"](whole["student"](torch.randn(5, 2, 4, 4, generator=draw)))
        outputs.square().mean().backward()
        optim.optimizer.step()


def weights(whole: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in whole.state_dict().items()}


def resumed(
    tmp_path: Path,
    config: OptimizerConfig,
    schedule: ScheduleConfig,
    *,
    total: int,
    stop: int,
    reverse: bool = False,
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Weights of a run that went through, and of one that was stopped, saved and loaded."""
    straight = network()
    train(straight, build(straight, config, schedule, total), range(total))
    first = network()
    optim = build(first, config, schedule, total)
    train(first, optim, range(stop))
    tensors, state = optim.state()
    folder = CheckpointFolder(tmp_path, 1)
    folder.save(Snapshot(stop, {"model": first.state_dict(), "optimizer": tensors}, {"optimizer": state}))
    saved = folder.latest()
    assert saved is not None
    second = network(seed=1)
    second.load_state_dict(saved.tensors["model"])
    named = dict(second.named_parameters())
    if reverse:
        named = dict(reversed(named.items()))
    again = build_optimizers(named, MAIN, config, schedule, total)["main"]
    again.load(saved.tensors["optimizer"], saved.state["optimizer"])
    train(second, again, range(stop, total))
    return weights(straight), weights(second)


def assert_same_bits(left: dict[str, Tensor], right: dict[str, Tensor]) -> None:
    assert left.keys() == right.keys()
    for name in left:
        assert torch.equal(left[name].view(-1).view(torch.uint8), right[name].view(-1).view(torch.uint8)), (
            name
        )


# -- exact resume -------------------------------------------------------------------------------------------------

EXACT = {
    "sgd": (
        OptimizerConfig(name="sgd", lr=0.1, weight_decay=1e-3),
        ScheduleConfig(name="cosine", warmup=0.2),
    ),
    "sgd, several groups": (
        OptimizerConfig(name="sgd", lr=0.1, weight_decay=0.1, decay_norms=False),
        ScheduleConfig(name="multistep", milestones=(0.5,)),
    ),
    "adamw": (
        OptimizerConfig(name="adamw", lr=0.01, weight_decay=0.05),
        ScheduleConfig(name="linear", final=0.1),
    ),
    "adamw, not fused": (
        OptimizerConfig(name="adamw", lr=0.01, options={"fused": False}),
        ScheduleConfig(name="StepLR", options={"step_size": 2, "gamma": 0.5}),
    ),
    "lamb": (OptimizerConfig(name="lamb", lr=0.01), ScheduleConfig(name="CosineAnnealingLR")),
    "rmsprop": (
        OptimizerConfig(name="rmsprop", lr=0.01, momentum=0.5),
        ScheduleConfig(name="CosineAnnealingWarmRestarts", options={"T_0": 3}),
    ),
    "one cycle": (OptimizerConfig(name="adam", lr=0.01), ScheduleConfig(name="OneCycleLR")),
    "cyclic": (
        OptimizerConfig(name="sgd", lr=0.01),
        ScheduleConfig(name="CyclicLR", options={"base_lr": 0.01, "max_lr": 0.1, "step_size_up": 3}),
    ),
    "steps": (
        OptimizerConfig(name="sgd", lr=0.1),
        ScheduleConfig(name="MultiStepLR", options={"milestones": (3.0, 6.0)}),
    ),
}


@pytest.mark.parametrize("reverse", [False, True], ids=["same order", "other order"])
@pytest.mark.parametrize("case", EXACT)
def test_a_stopped_run_goes_on_bit_for_bit(tmp_path: Path, case: str, reverse: bool) -> None:
    config, schedule = EXACT[case]
    straight, second = resumed(tmp_path, config, schedule, total=10, stop=4, reverse=reverse)
    assert_same_bits(straight, second)


def test_a_stopped_run_with_layers_goes_on_bit_for_bit(tmp_path: Path) -> None:
    config = OptimizerConfig(name="adamw", lr=0.1, weight_decay=0.1, decay_norms=False, layer_decay=0.5)
    assert_same_bits(*resumed(tmp_path, config, ScheduleConfig(), total=6, stop=3))


@pytest.mark.parametrize("name", optimizer_names())
def test_every_offered_optimizer_resumes_bit_for_bit(tmp_path: Path, name: str) -> None:
    config = OptimizerConfig(name=name, lr=1e-3)
    straight, second = resumed(tmp_path, config, CONSTANT, total=3, stop=2)
    assert_same_bits(straight, second)
    assert not torch.equal(straight["student.0.weight"], weights(network())["student.0.weight"])


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_channels_last_state_resumes_bit_for_bit(name: str) -> None:
    runs = []
    for stop in (None, 3):
        whole: Any = network().to(memory_format=torch.channels_last)
        optim = build(whole, OptimizerConfig(name=name, lr=0.01))
        train(whole, optim, range(stop or 6))
        if stop:
            tensors, state = optim.state()
            kept = {key: value.contiguous() for key, value in tensors.items()}  # as safetensors keeps them
            optim = build(whole, OptimizerConfig(name=name, lr=0.01))
            optim.load(kept, state)
            train(whole, optim, range(stop, 6))
        runs.append({key: value.contiguous() for key, value in weights(whole).items()})
    assert_same_bits(*runs)


def test_loaded_state_is_a_copy() -> None:
    whole: Any = network()
    optim = build(whole, OptimizerConfig(name="sgd"))
    train(whole, optim, range(2))
    tensors, state = optim.state()
    kept = {key: value.clone() for key, value in tensors.items()}
    before = copy.deepcopy(state)
    optim.load(kept, state)
    expected = {key: value.clone() for key, value in kept.items()}
    train(whole, optim, range(2, 4))
    assert_same_bits(kept, expected)
    assert state == before


def test_state_goes_by_parameter_names() -> None:
    whole: Any = network()
    optim = build(whole, OptimizerConfig(name="sgd", lr=0.5, decay_norms=False))
    train(whole, optim, range(1))
    tensors, state = optim.state()
    names = [name for name, _ in whole.named_parameters()]
    assert sorted(tensors) == sorted(f"{name}/momentum_buffer" for name in names)
    assert torch.equal(tensors["student.3.weight/momentum_buffer"], whole["student"][3].weight.grad)
    assert sorted(name for group in state["groups"] for name in group["names"]) == sorted(names)
    assert sorted(optim.names) == sorted(names)


def test_tuples_come_back_as_tuples(tmp_path: Path) -> None:
    optim = build(network(), OptimizerConfig(name="adamw", options={"betas": (0.8, 0.9)}))
    tensors, state = optim.state()
    CheckpointFolder(tmp_path, 1).save(Snapshot(0, {"optimizer": tensors}, state))
    saved = CheckpointFolder(tmp_path, 1).load(0)
    optim.load(saved.tensors["optimizer"], saved.state)
    assert optim.optimizer.param_groups[0]["betas"] == (0.8, 0.9)


def test_a_state_of_something_else_is_refused_and_nothing_changes() -> None:
    whole: Any = network()
    optim = build(whole, OptimizerConfig(name="sgd"))
    train(whole, optim, range(1))
    before = {key: value.clone() for key, value in optim.state()[0].items()}
    other = build(network(), OptimizerConfig(name="adamw"))
    with pytest.raises(OptimError, match="saved state is of AdamW; this optimiser is SGD"):
        optim.load(*other.state())
    fewer = build(nn.ModuleDict({"student": network()["student"]}), OptimizerConfig(name="sgd"))  # type: ignore[index]
    with pytest.raises(OptimError, match=r"other parameters .* method.bias, method.weight"):
        optim.load(*fewer.state())
    split = build(network(), OptimizerConfig(name="sgd", decay_norms=False, weight_decay=0.1))
    with pytest.raises(OptimError, match="was several when saved"):
        optim.load(*split.state())
    halving = ScheduleConfig(name="ExponentialLR", options={"gamma": 0.5})
    with pytest.raises(OptimError, match=r"saved schedule has state \(.*last_epoch"):
        optim.load(*build(network(), OptimizerConfig(name="sgd"), halving).state())
    tensors, state = optim.state()
    with pytest.raises(OptimError, match=r"saved schedule is not that of ExponentialLR: .*last_epoch"):
        build(network(), OptimizerConfig(name="sgd"), halving).load(tensors, state)
    with pytest.raises(OptimError, match=r"saved tensors belong to .*: stranger"):
        optim.load({**tensors, "stranger/x": torch.ones(1)}, state)
    assert_same_bits(before, optim.state()[0])


def test_how_a_machine_computes_is_not_part_of_the_state() -> None:
    whole: Any = network()
    fused = build(whole, OptimizerConfig(name="adamw"))
    assert fused.optimizer.param_groups[0]["fused"] is True
    train(whole, fused, range(2))
    plain = build(whole, OptimizerConfig(name="adamw", options={"fused": False}))
    plain.load(*fused.state())
    assert plain.optimizer.param_groups[0]["fused"] is False
    train(whole, plain, range(2, 3))


# -- who owns what ------------------------------------------------------------------------------------------------


def parameters(*names: str) -> dict[str, nn.Parameter]:
    return {name: nn.Parameter(torch.ones(2, 2)) for name in names}


def test_the_first_matching_spec_owns_a_parameter() -> None:
    named = parameters("student.a", "student.b", "method.c", "teachers.t.d")
    named["student.frozen"] = nn.Parameter(torch.ones(1), requires_grad=False)
    specs = {
        "b": OptimSpec(("*.b", "method.*"), OptimizerConfig(name="adamw", lr=0.3)),
        "rest": OptimSpec(("student.*", "teachers.*"), schedule=ScheduleConfig(name="linear", warmup=0.5)),
    }
    built = build_optimizers(named, specs, OptimizerConfig(lr=0.2), CONSTANT, 10)
    assert {name: optim.names for name, optim in built.items()} == {
        "b": ["student.b", "method.c"],
        "rest": ["student.a", "teachers.t.d"],
    }
    assert isinstance(built["b"].optimizer, torch.optim.AdamW)
    assert isinstance(built["rest"].optimizer, torch.optim.SGD)
    assert built["b"].lr == 0.3
    assert built["rest"].lr == pytest.approx(0.2 / 5), "the rate of step 0 is set"


def test_parameters_that_nobody_trains_are_named() -> None:
    with pytest.raises(
        OptimError, match=r"no optimiser trains teachers.t.x, teachers.t.y; .*student\.\*, method\.\*"
    ):
        build_optimizers(
            parameters("student.a", "teachers.t.x", "teachers.t.y"), MAIN, OptimizerConfig(), CONSTANT, 1
        )


@pytest.mark.parametrize(
    ("second", "reason"),
    [
        (("teachers.*",), r"no trainable parameter matches it; there are \['student"),
        (("*.a",), "earlier optimisers own"),
    ],
)
def test_an_optimiser_without_parameters_is_named(second: tuple[str, ...], reason: str) -> None:
    specs = {"main": OptimSpec(("student.*",)), "other": OptimSpec(second)}
    with pytest.raises(OptimError, match=f"optimiser 'other' .*{reason}"):
        build_optimizers(parameters("student.a"), specs, OptimizerConfig(), CONSTANT, 1)


def decays(optim: Optim) -> dict[str, float]:
    groups = iter(optim.names)
    return {
        next(groups): group["weight_decay"] for group in optim.optimizer.param_groups for _ in group["params"]
    }


def test_norms_and_biases_decay_only_where_asked() -> None:
    whole = network()
    everything = decays(build(whole, OptimizerConfig(weight_decay=0.1)))
    assert set(everything.values()) == {0.1}
    some = decays(build(whole, OptimizerConfig(weight_decay=0.1, decay_norms=False)))
    assert {name for name, decay in some.items() if decay == 0.1} == {
        "student.0.weight",
        "student.3.weight",
        "method.weight",
    }
    assert {name for name, decay in some.items() if decay == 0} == some.keys() - {
        "student.0.weight",
        "student.3.weight",
        "method.weight",
    }


# -- layers -------------------------------------------------------------------------------------------------------


def rates(optim: Optim) -> dict[str, float]:
    groups = iter(optim.names)
    return {next(groups): group["lr"] for group in optim.optimizer.param_groups for _ in group["params"]}


def test_layer_decay_multiplies_the_rate_layer_by_layer() -> None:
    whole = network()
    optim = build(whole, OptimizerConfig(lr=1.0, layer_decay=0.5), ScheduleConfig(name="linear"), total=2)
    optim.set_step(1)
    found = rates(optim)
    assert found["method.weight"] == found["student.3.weight"] == 0.5
    assert found["student.1.weight"] == found["student.1.bias"] == 0.25
    assert found["student.0.weight"] == 0.125
    assert optim.lr == 0.5


def test_layers_are_numbered_blocks_and_what_lies_around_them() -> None:
    names = [f"student.{name}" for name in ("stem.conv", "stem.norm", "layer1.0.a", "layer1.0.sub.2.b")]
    names += [f"student.{name}" for name in ("layer1.1.a", "layer2.0.a", "norm.w", "fc.w")] + ["method.3.x"]
    depths = layer_depths(parameters(*names))
    assert [depths.get(name) for name in names] == [0, 0, 1, 1, 2, 3, 4, 4, None]


def test_timm_models_say_their_own_layers() -> None:
    timm = pytest.importorskip("timm")
    student = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=3, num_classes=3)
    whole = nn.ModuleDict({"student": nn.ModuleDict({"model": student})})
    optim = build(whole, OptimizerConfig(lr=1.0, layer_decay=0.5), student=whole)
    found = rates(optim)
    assert found["student.model.head.weight"] == 1
    assert [found[f"student.model.blocks.{i}.attn.qkv.weight"] for i in (0, 1, 2)] == [0.125, 0.25, 0.5]
    assert found["student.model.cls_token"] == found["student.model.patch_embed.proj.weight"] == 0.0625


# -- names and options --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "kind", "expected"),
    [
        (OptimizerConfig(name="SGD"), torch.optim.SGD, {"momentum": 0.9, "nesterov": False}),
        (OptimizerConfig(momentum=0.0), torch.optim.SGD, {"momentum": 0.0}),
        (OptimizerConfig(options={"nesterov": True}), torch.optim.SGD, {"momentum": 0.9, "nesterov": True}),
        (
            OptimizerConfig(name="adamw", options={"betas": (0.8, 0.9)}),
            torch.optim.AdamW,
            {"betas": (0.8, 0.9)},
        ),
        (OptimizerConfig(name="AdamW"), torch.optim.AdamW, {"betas": (0.9, 0.999), "weight_decay": 0.0}),
        (OptimizerConfig(name="rmsprop"), torch.optim.RMSprop, {"momentum": 0}),
        (OptimizerConfig(name="Adafactor"), torch.optim.Adafactor, {}),
    ],
)
def test_names_and_defaults(config: OptimizerConfig, kind: type, expected: dict[str, Any]) -> None:
    optim = build(network(), config)
    assert type(optim.optimizer) is kind
    group = optim.optimizer.param_groups[0]
    assert {key: group[key] for key in expected} == expected


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (OptimizerConfig(name="adamm"), r"unknown optimizer 'adamm'; did you mean .*adam"),
        (OptimizerConfig(name="xyzzy"), r"unknown optimizer 'xyzzy'; allowed: .*adamw.*lamb.*sgd"),
        (
            OptimizerConfig(options={"nesterv": True}),
            r"option of optimizer 'sgd': 'nesterv'; did you mean nesterov",
        ),
        (OptimizerConfig(options={"beta": 1}), r"'beta'; allowed: .*dampening.*nesterov"),
        (OptimizerConfig(options={"lr": 1}), r"give it as train.optimizer.lr"),
        (OptimizerConfig(name="adam", options={"momentum": 1}), r"give it as train.optimizer.momentum"),
        (OptimizerConfig(name="adam", momentum=0.5), r"'adam' has no momentum; set options.betas"),
        (OptimizerConfig(name="rprop", weight_decay=0.1), r"'rprop' has no weight decay"),
        (OptimizerConfig(name="adam", options={"betas": (2.0, 0.9)}), r"'adam' refuses its options: .*2\.0"),
        (OptimizerConfig(name="lbfgs"), r"'lbfgs' is not offered: it evaluates the loss several times"),
        (OptimizerConfig(name="kron"), r"'kron' is not offered: .*random generator"),
    ],
)
def test_what_does_not_fit_is_named(config: OptimizerConfig, message: str) -> None:
    with pytest.raises(OptimError, match=message):
        build(network(), config)


def test_fused_only_where_nobody_chose_otherwise() -> None:
    assert build(network(), OptimizerConfig(name="sgd")).optimizer.param_groups[0]["fused"] is True
    unfused = build(network(), OptimizerConfig(name="sgd", options={"foreach": True}))
    assert not unfused.optimizer.param_groups[0]["fused"]
    with pytest.raises(OptimError, match="refuses its options"):
        build(network(), OptimizerConfig(name="sgd", options={"foreach": True, "fused": True}))


# -- schedules ----------------------------------------------------------------------------------------------------


def curve(total: int = 8, **options: Any) -> list[float]:
    return [rate(ScheduleConfig(**options), step, total) for step in range(total)]


def test_rates_by_step() -> None:
    assert curve(name="constant") == [1.0] * 8
    assert curve(name="constant", warmup=0.5) == [0.25, 0.5, 0.75, 1, 1, 1, 1, 1]
    assert curve(4, name="linear") == [1.0, 0.75, 0.5, 0.25]
    assert curve(4, name="linear", final=0.5) == [1.0, 0.875, 0.75, 0.625]
    assert curve(4, name="cosine") == pytest.approx([0.5 * (1 + math.cos(math.pi * i / 4)) for i in range(4)])
    assert curve(8, name="cosine", warmup=0.25)[:3] == [0.5, 1.0, 1.0]
    assert curve(10, name="multistep", milestones=(0.3, 0.7), gamma=0.5) == [1] * 3 + [0.5] * 4 + [0.25] * 3
    assert curve(1, name="cosine", warmup=0.9) == [1.0]
    assert rate(ScheduleConfig(name="cosine", final=0.2), 100, 10) == pytest.approx(0.2)


def test_a_schedule_does_not_depend_on_the_steps_before() -> None:
    optim = build(network(), OptimizerConfig(lr=0.3), ScheduleConfig(name="cosine", warmup=0.1), total=50)
    forward = []
    for step in range(50):
        optim.set_step(step)
        forward.append(optim.lr)
    for step in reversed(range(50)):
        optim.set_step(step)
        assert optim.lr == forward[step]


def test_torch_schedules_give_torchs_rates() -> None:
    config = ScheduleConfig(name="CosineAnnealingLR", options={"eta_min": 0.01})
    whole: Any = network()
    optim = build(whole, OptimizerConfig(lr=0.3), config, total=6)
    seen = []
    for step in range(6):
        train(whole, optim, range(step, step + 1))
        seen.append(optim.lr)
    expected = [0.01 + 0.29 * 0.5 * (1 + math.cos(math.pi * step / 6)) for step in range(6)]
    assert seen == pytest.approx(expected)


def test_an_optimiser_that_waits_keeps_the_runs_time() -> None:
    optim = build(
        network(), OptimizerConfig(lr=1.0), ScheduleConfig(name="ExponentialLR", options={"gamma": 0.5})
    )
    optim.set_step(3)  # warns in torch, since no step of the optimiser came before
    assert optim.lr == 0.125
    with pytest.raises(OptimError, match="ExponentialLR is at step 3 and cannot go back to 2"):
        optim.set_step(2)


@pytest.mark.parametrize(
    ("schedule", "message"),
    [
        (ScheduleConfig(name="cosin"), r"unknown schedule 'cosin'; did you mean .*cosine"),
        (ScheduleConfig(name="ReduceLROnPlateau"), "is not offered: it follows a metric"),
        (ScheduleConfig(name="LambdaLR"), "is not offered: it needs a function"),
        (ScheduleConfig(name="SequentialLR"), "is not offered: it needs other schedulers"),
        (ScheduleConfig(name="MultiStep"), "multistep needs milestones"),
        (
            ScheduleConfig(name="cosine", milestones=(0.5,)),
            r"'cosine' has no use for milestones; it takes final, warmup",
        ),
        (ScheduleConfig(name="constant", final=0.1), "'constant' has no use for final"),
        (ScheduleConfig(name="cosine", options={"T_max": 3}), "'cosine' has no use for options"),
        (ScheduleConfig(name="StepLR", warmup=0.1), "'StepLR' has no use for warmup; it takes options"),
        (ScheduleConfig(name="StepLR"), r"'StepLR' needs schedule\.options\.step_size"),
        (ScheduleConfig(name="StepLR", options={"stepsize": 3}), r"'stepsize'; did you mean step_size"),
        (
            ScheduleConfig(name="OneCycleLR", options={"epochs": 3}),
            r"option of schedule 'OneCycleLR': 'epochs'",
        ),
        (ScheduleConfig(name="OneCycleLR", options={"pct_start": 7.0}), "'OneCycleLR' refuses its options"),
    ],
)
def test_schedules_that_do_not_fit_are_named(schedule: ScheduleConfig, message: str) -> None:
    with pytest.raises(OptimError, match=message):
        build(network(), OptimizerConfig(), schedule)


def test_configs_are_not_changed() -> None:
    config = OptimizerConfig(name="adamw", layer_decay=0.5, options={"betas": (0.8, 0.9)})
    schedule = ScheduleConfig(name="OneCycleLR", options={"pct_start": 0.4})
    before = config.model_dump_json(), schedule.model_dump_json()
    whole: Any = network()
    for _ in range(2):
        optim = build(whole, config, schedule)
        train(whole, optim, range(3))
    assert (config.model_dump_json(), schedule.model_dump_json()) == before


# -- sharded parameters -------------------------------------------------------------------------------------------


@pytest.fixture
def mesh(tmp_path: Path) -> Iterator[Any]:
    from torch.distributed.device_mesh import init_device_mesh

    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("everything", [True, False], ids=["all sharded", "some sharded"])
@pytest.mark.parametrize("name", ["sgd", "adamw", "rmsprop"])
def test_sharded_parameters_train_and_resume(mesh: Any, name: str, everything: bool) -> None:
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor

    ends = []
    for stop in (6, 3):
        whole: Any = network()
        for part in ("student", "method") if everything else ("student",):
            fully_shard(whole[part], mesh=mesh)
        config = OptimizerConfig(name=name, lr=0.01)
        optim = build(whole, config)
        train(whole, optim, range(stop))
        tensors, state = optim.state()
        key = next(key for key in tensors if key.startswith("student.0.weight/") and not key.endswith("step"))
        assert isinstance(tensors[key], DTensor)
        assert isinstance(tensors[key.replace("student.0", "method")], DTensor) is everything
        assert bool(optim.optimizer.param_groups[0].get("fused")) is (name == "adamw" and everything)
        if stop == 3:
            optim = build(whole, config)
            optim.load(tensors, state)
            train(whole, optim, range(3, 6))
        ends.append(
            {n: p.full_tensor() if isinstance(p, DTensor) else p for n, p in whole.named_parameters()}
        )
    assert_same_bits(*[{name: value.detach() for name, value in end.items()} for end in ends])
