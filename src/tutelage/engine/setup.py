"""Student, teachers and method, made into the one module that is trained."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import nn

from tutelage.engine.activations import checkpoint_activations
from tutelage.engine.compile import compile_regions
from tutelage.engine.distributed import over_all_ranks, shard
from tutelage.engine.ema import Ema
from tutelage.engine.heads import check_spread, few_tokens
from tutelage.engine.memory import ModelSize
from tutelage.engine.method import Method
from tutelage.engine.needs import PairingError
from tutelage.engine.offload import offload
from tutelage.engine.plain import Blueprint
from tutelage.engine.quantize import prepare
from tutelage.engine.runtime import Runtime
from tutelage.engine.spec import ModelSpec
from tutelage.engine.step import TrainStep
from tutelage.engine.taps import Tapped
from tutelage.engine.teacher import Teacher
from tutelage.engine.types import Batch, Taps, first_tensor
from tutelage.recipe.schema import TrainConfig


@dataclass
class Wiring:
    """Attributes:
    whole: all that is trained.
    taps: by exact module path.
    ema: the moving average of the student, where the recipe wants one.
    shipped: what is evaluated and ships, held as the student is: the average where there is one, else the student.
    plan, teacher_plans: of sharded models, what makes them plain again: of the student, of teachers by name.
    sizes: of the student, under that name, and of the teachers that are models here.
    items: that a row counts for in these sizes: the tokens of a language model's, else 1.
    """

    whole: TrainStep
    taps: Taps
    ema: Ema | None
    shipped: Tapped
    plan: Blueprint[Tapped] | None = None
    teacher_plans: dict[str, Blueprint[nn.Module]] = field(default_factory=dict)
    sizes: dict[str, ModelSize] = field(default_factory=dict)
    items: int = 1


def wire(
    runtime: Runtime,
    student: Tapped,
    method: Method,
    teachers: Mapping[str, Teacher],
    example: Batch,
    config: TrainConfig,
) -> Wiring:
    """Let the method say its taps and make what it trains, resolve every tap, and shard what is to be sharded.

    Raises:
        TapError: a path that matches nothing.
        PairingError: the method trains its teachers, and one of them cannot learn, or is to be shared by ranks in
            another way than the student, or to stay in CPU memory; a sharded student is to be quantised; heads cannot
            be spread.
        ValueError: no layer of the student can be quantised, or no block of it computed again.
    """
    trained = method.needs.teacher == "trained"
    shard_teachers = _shard_teachers(runtime, config, method, trained=trained)
    fixed = [name for name, teacher in teachers.items() if not teacher.offers.trainable]
    if trained and fixed:
        raise PairingError(
            f"`{method.config.name}` trains its teachers; {', '.join(fixed)} cannot be trained (frozen or stored): "
            "give a live model"
        )
    if trained and config.offload_teacher:
        raise PairingError(
            f"`{method.config.name}` trains its teachers; train.offload_teacher is for frozen ones: set it to false"
        )
    if config.shard_head and runtime.sharding == "fsdp":
        live = {name: module for name, t in teachers.items() if isinstance(module := t.module, Tapped)}
        check_spread(
            {name: (held.head, held.model) for name, held in ({"student": student} | live).items()},
            runtime.world,
            whole_teachers=not shard_teachers,
        )
    if config.quantize is not None:
        if runtime.sharding == "fsdp":
            raise PairingError("train.quantize does not go with train.sharding: fsdp; set it to ddp")
        prepare(student.model, config.quantize, compiled=config.compile)
    spec = ModelSpec.of("student", student.model, student.normalise(example.inputs), head=student.head)
    first = next(iter(teachers.values())).spec if teachers else None
    taps = method.taps(first, spec)
    method.build(first, spec, example)
    method.to(runtime.device)
    if runtime.world > 1:
        over_all_ranks(method)
    wanted = dict(taps.teachers)
    if taps.teacher and teachers:
        wanted.setdefault(next(iter(teachers)), taps.teacher)
    resolved = Taps(
        student=spec.resolve(taps.student),
        student_logits=taps.student_logits,
        teacher_logits=taps.teacher_logits,
        teachers={name: teacher.spec.resolve(wanted.get(name, ())) for name, teacher in teachers.items()},
    )
    modules = {name: t.module for name, t in teachers.items() if t.module is not None}
    sizes = {"student": ModelSize.of(student.model, spec, student.head)} | {
        name: ModelSize.of(module.model, teachers[name].spec, module.head)
        for name, module in modules.items()
        if isinstance(module, Tapped)
    }
    if config.activation_checkpointing:
        inputs = student.normalise(example.inputs)
        checkpoint_activations(student.model, few_tokens(inputs) if student.head is not None else inputs)
    if config.compile:
        compile_regions(student.model, resolved.student)
        for name, module in modules.items():
            compile_regions(module.model if isinstance(module, Tapped) else module, resolved.teachers[name])
    average = Ema(student.model, config.ema) if config.ema else None
    shipped = (
        Tapped(average.module, mean=student.mean, std=student.std, head=student.head) if average else student
    )
    plan, teacher_plans = None, {}
    if runtime.sharding == "fsdp":
        plan = Blueprint(student)
        # Student, average, method and each teacher apart: each is a root of its own.
        for held in dict.fromkeys((student, shipped)):
            shard(held, _units(held, spec), keep_root=held is student, dtype=runtime.half)
            held.keep_shards(spread=config.shard_head and held is student)
        shard(method)
    if shard_teachers:
        teacher_plans = {name: Blueprint(module) for name, module in modules.items()}
        for name, module in modules.items():
            units = _units(module, teachers[name].spec)
            shard(module, units, keep_root=trained, offload=config.offload_teacher)
            if isinstance(module, Tapped):
                module.keep_shards(spread=config.shard_head)
    elif config.offload_teacher:
        for module in modules.values():
            if isinstance(module, Tapped):
                offload(module, runtime.device)
    whole = TrainStep(student, method, _held(modules) if trained else {})
    items = 1 if student.head is None else first_tensor(example.inputs).shape[1]
    return Wiring(whole, resolved, average, shipped, plan, teacher_plans, sizes, items)


def _units(held: nn.Module, spec: ModelSpec) -> list[nn.Module]:
    """The stages, each of which is gathered and let go of by itself; and a language model's head, which a forward that
    stops before it never gathers. One that shares its weight with the embedding goes with that."""
    model = held.model if isinstance(held, Tapped) else held
    units = [model.get_submodule(path) for path in spec.stages()]
    plan = held.head if isinstance(held, Tapped) else None
    return units if plan is None or plan.tied(model) else [*units, model.get_submodule(plan.path)]


def _shard_teachers(runtime: Runtime, config: TrainConfig, method: Method, *, trained: bool) -> bool:
    shared = runtime.shares_teachers(config)
    if trained and shared != (runtime.sharding == "fsdp"):
        raise PairingError(
            f"`{method.config.name}` trains its teachers, and ranks share these as they share the student "
            f"(train.sharding is {runtime.sharding}); train.shard_teacher is for frozen ones: leave it out"
        )
    return shared


def _held(modules: dict[str, nn.Module]) -> dict[str, nn.Module]:
    for module in modules.values():
        module.requires_grad_(True)
    return modules
