"""Student, teachers and method, made into the one module that is trained."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn

from tutelage.engine.compile import compile_regions
from tutelage.engine.distributed import over_all_ranks, shard
from tutelage.engine.method import Method
from tutelage.engine.needs import PairingError
from tutelage.engine.runtime import Runtime
from tutelage.engine.spec import ModelSpec
from tutelage.engine.step import TrainStep
from tutelage.engine.taps import Tapped
from tutelage.engine.teacher import Teacher
from tutelage.engine.types import Batch, Taps


@dataclass
class Wiring:
    """The whole that is trained, and the taps by exact module path."""

    whole: TrainStep
    taps: Taps


def wire(
    runtime: Runtime,
    student: Tapped,
    method: Method,
    teachers: Mapping[str, Teacher],
    example: Batch,
    *,
    compile_models: bool,
) -> Wiring:
    """Let the method say its taps and make what it trains, and resolve every tap.

    Raises:
        TapError: a path that matches nothing.
        PairingError: the method trains its teachers, and one of them cannot learn.
    """
    trained = method.needs.teacher == "trained"
    fixed = [name for name, teacher in teachers.items() if not teacher.offers.trainable]
    if trained and fixed:
        raise PairingError(
            f"`{method.config.name}` trains its teachers; {', '.join(fixed)} cannot be trained (frozen or stored): "
            "give a live model"
        )
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
    if compile_models:
        compile_regions(student.model, resolved.student)
        for name, module in modules.items():
            compile_regions(module.model if isinstance(module, Tapped) else module, resolved.teachers[name])
    if runtime.sharding == "fsdp":
        # Student, method and each teacher apart: each is a root of its own.
        shard(student, [student.model.get_submodule(path) for path in spec.stages()])
        shard(method)
        for name, module in modules.items():
            inner = teachers[name].spec
            blocks = [inner.module.get_submodule(path) for path in inner.stages()] if inner.module else []
            shard(module, blocks)
    return Wiring(TrainStep(student, method, _held(modules) if trained else {}), resolved)


def _held(modules: dict[str, nn.Module]) -> dict[str, nn.Module]:
    for module in modules.values():
        module.requires_grad_(True)
    return modules
