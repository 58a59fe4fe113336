"""Student, teachers and method, made into the one module that is trained."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import nn

from tutelage.engine.compile import compile_regions
from tutelage.engine.distributed import over_all_ranks, shard
from tutelage.engine.ema import Ema
from tutelage.engine.method import Method
from tutelage.engine.needs import PairingError
from tutelage.engine.plain import Blueprint
from tutelage.engine.quantize import prepare
from tutelage.engine.runtime import Runtime
from tutelage.engine.spec import ModelSpec
from tutelage.engine.step import TrainStep
from tutelage.engine.taps import Tapped
from tutelage.engine.teacher import Teacher
from tutelage.engine.types import Batch, Taps
from tutelage.recipe.schema import TrainConfig


@dataclass
class Wiring:
    """Attributes:
    whole: all that is trained.
    taps: by exact module path.
    ema: the moving average of the student, where the recipe wants one.
    shipped: what is evaluated and ships, held as the student is: the average where there is one, else the student.
    plan, teacher_plans: of sharded models, what makes them plain again: of the student, of teachers by name.
    """

    whole: TrainStep
    taps: Taps
    ema: Ema | None
    shipped: Tapped
    plan: Blueprint[Tapped] | None = None
    teacher_plans: dict[str, Blueprint[nn.Module]] = field(default_factory=dict)


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
            another way than the student; a sharded student is to be quantised.
        ValueError: no layer of the student can be quantised.
    """
    trained = method.needs.teacher == "trained"
    shard_teachers = _shard_teachers(runtime, config, method, trained=trained)
    fixed = [name for name, teacher in teachers.items() if not teacher.offers.trainable]
    if trained and fixed:
        raise PairingError(
            f"`{method.config.name}` trains its teachers; {', '.join(fixed)} cannot be trained (frozen or stored): "
            "give a live model"
        )
    if config.quantize is not None:
        if runtime.sharding == "fsdp":
            raise PairingError("train.quantize does not go with train.sharding: fsdp; set it to ddp")
        prepare(student.model, config.quantize, compiled=config.compile)
    spec = ModelSpec.of("student", student.model, student.normalise(example.inputs))
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
    if config.compile:
        compile_regions(student.model, resolved.student)
        for name, module in modules.items():
            compile_regions(module.model if isinstance(module, Tapped) else module, resolved.teachers[name])
    average = Ema(student.model, config.ema) if config.ema else None
    shipped = Tapped(average.module, mean=student.mean, std=student.std) if average else student
    plan, teacher_plans = None, {}
    if runtime.sharding == "fsdp":
        plan = Blueprint(student)
        # Student, average, method and each teacher apart: each is a root of its own.
        for held in dict.fromkeys((student, shipped)):
            shard(held, _blocks(held, spec), keep_root=held is student)
        shard(method)
    if shard_teachers:
        teacher_plans = {name: Blueprint(module) for name, module in modules.items()}
        for name, module in modules.items():
            shard(module, _blocks(module, teachers[name].spec), keep_root=trained)
    whole = TrainStep(student, method, _held(modules) if trained else {})
    return Wiring(whole, resolved, average, shipped, plan, teacher_plans)


def _blocks(held: nn.Module, spec: ModelSpec) -> list[nn.Module]:
    """The stages, each of which is gathered and let go of by itself."""
    model = held.model if isinstance(held, Tapped) else held
    return [model.get_submodule(path) for path in spec.stages()]


def _shard_teachers(runtime: Runtime, config: TrainConfig, method: Method, *, trained: bool) -> bool:
    as_student = runtime.sharding == "fsdp"
    if runtime.world == 1 or config.shard_teacher is None:
        return as_student
    if trained and config.shard_teacher != as_student:
        raise PairingError(
            f"`{method.config.name}` trains its teachers, and ranks share these as they share the student "
            f"(train.sharding is {runtime.sharding}); train.shard_teacher is for frozen ones: leave it out"
        )
    return config.shard_teacher


def _held(modules: dict[str, nn.Module]) -> dict[str, nn.Module]:
    for module in modules.values():
        module.requires_grad_(True)
    return modules
