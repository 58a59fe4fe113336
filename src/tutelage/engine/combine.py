"""Several methods as one: one forward of each model serves all, and the label loss counts once."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tutelage.engine.method import Method
from tutelage.engine.needs import Needs, PairingError
from tutelage.engine.spec import ModelSpec
from tutelage.engine.step import Step
from tutelage.engine.types import Batch, Outputs, Taps, Term, Terms
from tutelage.recipe.config import MethodConfig

_ONE_LOOP_ONLY = ("step", "optimizers", "active", "combine_gradients", "sampler")


class Combined(Method):
    """Weighted sum of methods that each have an ``objective`` alone.

    The term ``label`` is taken from the first method that has one, or weighed by ``label_weight`` where that is given.
    A term name that two methods share gets the method's name before it.

    Raises:
        PairingError: a method that runs a step, a sampler or optimisers of its own.
    """

    def __init__(self, methods: Sequence[Method], label_weight: float | None = None) -> None:
        super().__init__(MethodConfig(name="+".join(method.config.name for method in methods)))
        for method in methods:
            own = [
                name for name in _ONE_LOOP_ONLY if getattr(type(method), name) is not getattr(Method, name)
            ]
            if own:
                raise PairingError(
                    f"`{method.config.name}` cannot be combined with other methods: it has its own {', '.join(own)}; "
                    "run it alone"
                )
        self.methods: Any = nn.ModuleList(methods)
        self.label_weight = label_weight
        self.needs = merged([method.needs for method in methods])

    def taps(self, teacher: ModelSpec | None, student: ModelSpec) -> Taps:
        taps = [method.taps(teacher, student) for method in self.methods]
        names = {name for tap in taps for name in tap.teachers}
        return Taps(
            student=_union(tap.student for tap in taps),
            teacher=_union(tap.teacher for tap in taps),
            student_logits=any(tap.student_logits for tap in taps),
            teacher_logits=any(tap.teacher_logits for tap in taps),
            teachers={name: _union(tap.teachers.get(name, ()) for tap in taps) for name in names},
        )

    def build(self, teacher: ModelSpec | None, student: ModelSpec, example: Batch) -> None:
        for method in self.methods:
            method.build(teacher, student, example)

    def prepare(self, data: Any, student: nn.Module, teacher: Any) -> None:
        for method in self.methods:
            method.prepare(data, student, teacher)

    def count(self, batch: Batch) -> dict[str, int | Tensor]:
        counts: dict[str, int | Tensor] = {}
        for method in self.methods:
            counts |= method.count(batch)
        return counts

    def transform(self, batch: Batch, ctx: Step) -> Batch:
        for method in self.methods:
            batch = method.transform(batch, ctx)
        return batch

    def objective(self, student: Outputs, teacher: Outputs | None, batch: Batch, ctx: Step) -> Terms:
        terms: Terms = {}
        for method in self.methods:
            for name, term in method.objective(student, teacher, batch, ctx).items():
                if name == "label":
                    terms.setdefault("label", term)
                    continue
                unique = name if name not in terms else f"{method.config.name}.{name}"
                terms[unique] = Term(method.config.weight * term.mean, term.items)
        if self.label_weight is not None:
            label = ctx.label_loss(student, batch)
            terms["label"] = Term(self.label_weight * label.mean, label.items)
        return terms

    @torch.no_grad()
    def after_step(self, ctx: Step) -> None:
        for method in self.methods:
            method.after_step(ctx)

    def after_evaluation(self, metrics: dict[str, float], ctx: Step) -> None:
        for method in self.methods:
            method.after_evaluation(metrics, ctx)

    def finish(self, student: nn.Module) -> nn.Module:
        for method in self.methods:
            student = method.finish(student)
        return student


def merged(needs: Sequence[Needs]) -> Needs:
    """What all of several methods need together.

    Raises:
        PairingError: no form of teacher logits serves all, or no task.
    """
    first = needs[0]
    readers = [need for need in needs if need.teacher != "none" and need.logits]
    logits = (
        tuple(form for form in readers[0].logits if all(form in r.logits for r in readers)) if readers else ()
    )
    tasks = tuple(task for task in first.tasks if all(task in need.tasks for need in needs))
    if (readers and not logits) or not tasks:
        raise PairingError(
            "these methods cannot be combined: no form of teacher logits or no task serves all of them"
        )
    order = {"teacher": ("none", "frozen", "trained"), "sharding": ("any", "ddp", "single")}
    values: dict[str, Any] = {"logits": logits, "tasks": tasks, "scale": "raw"}
    if all(reader.scale == "log_probs" for reader in readers):
        values["scale"] = "log_probs"
    for field in dataclasses.fields(Needs):
        if field.name in values:
            continue
        found = [getattr(need, field.name) for need in needs]
        if field.name in order:
            values[field.name] = max(found, key=order[field.name].index)
        elif isinstance(found[0], tuple):
            values[field.name] = _union(found)
        else:
            values[field.name] = max(found)
    return Needs(**values)


def _union(parts: Any) -> tuple[str, ...]:
    return tuple(dict.fromkeys(name for part in parts for name in part))
