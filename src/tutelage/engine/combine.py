"""Several methods as one: one forward of each model serves all, and the label loss counts once."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from tutelage.engine.method import Method
from tutelage.engine.needs import Needs, PairingError
from tutelage.engine.spec import ModelSpec
from tutelage.engine.step import Step
from tutelage.engine.types import Batch, Outputs, Table, Taps, Term, Terms
from tutelage.recipe.config import MethodConfig
from tutelage.recipe.schema import TrainConfig

if TYPE_CHECKING:
    from tutelage.engine.loading import Sampler

_ALONE = {
    "step": "its step is more than one forward of each model",
    "optimizers": "it has optimisers of its own",
    "active": "it says itself which optimisers move",
    "combine_gradients": "it weighs the gradients of its own terms against each other",
}
"""What a method has of its own that leaves no room for another."""


class Combined(Method):
    """Weighted sum of methods that each have an ``objective`` alone.

    Every method sees the features that it tapped and no others. The label loss is the first method's that has one, or
    weighed by ``label_weight`` where that is given. A name that an earlier method took for a term or a table gets the
    method's title before it: its name, numbered from the second of the same name on.

    Raises:
        PairingError: methods that cannot share a step; every reason at once.
    """

    def __init__(self, methods: Sequence[Method], label_weight: float | None = None) -> None:
        super().__init__(MethodConfig(name="+".join(method.config.name for method in methods)))
        self.titles = _titles([method.config.name for method in methods])
        needs = {title: method.needs for title, method in zip(self.titles, methods, strict=True)}
        reasons = [*_own_loops(methods), *_conflicts(needs)]
        if reasons:
            raise PairingError("\n".join(reasons))
        self.methods: Any = nn.ModuleList(methods)
        for method in methods:
            method.alone = False
        self.label_weight = label_weight
        self.needs = merged(list(needs.values()))
        self.tapped: list[tuple[tuple[str, ...], tuple[str, ...]]] = []
        """Module paths that each method wants, of the student and of the teacher; `taps` finds them."""

    def taps(self, teacher: ModelSpec | None, student: ModelSpec) -> Taps:
        wanted = [method.taps(teacher, student) for method in self.methods]
        self.tapped = [(student.resolve(taps.student), _of_teacher(taps, teacher)) for taps in wanted]
        readers = [
            taps for taps, method in zip(wanted, self.methods, strict=True) if method.needs.teacher != "none"
        ]
        return Taps(
            student=_union(ours for ours, _ in self.tapped),
            teacher=_union(theirs for _, theirs in self.tapped),
            student_logits=any(taps.student_logits for taps in wanted),
            teacher_logits=any(taps.teacher_logits for taps in readers),
        )

    def build(self, teacher: ModelSpec | None, student: ModelSpec, example: Batch) -> None:
        for method in self.methods:
            method.build(teacher, student, example)

    def prepare(self, data: Any, student: nn.Module, teacher: Any) -> None:
        for method in self.methods:
            method.prepare(data, student, teacher)

    def sampler(self, source: Any, train: TrainConfig) -> Sampler | None:
        found = (method.sampler(source, train) for method in self.methods)
        return next((sampler for sampler in found if sampler is not None), None)

    @property
    def ended(self) -> bool:
        return any(method.ended for method in self.methods)

    def count(self, batch: Batch) -> dict[str, int | Tensor]:
        """Rows, and what a method counts in its own way apart from the others' kinds."""
        counts = super().count(batch)
        for title, method in zip(self.titles, self.methods, strict=True):
            if _counts_itself(method):
                counts |= {f"{title}.{kind}": number for kind, number in method.count(batch).items()}
        return counts

    def transform(self, batch: Batch, ctx: Step) -> Batch:
        for method in self.methods:
            batch = method.transform(batch, ctx)
        return batch

    @property
    def sees_all_ranks(self) -> bool:
        """No: each method says so for itself."""
        return False

    def objective(self, student: Outputs, teacher: Outputs | None, batch: Batch, ctx: Step) -> Terms:
        label: Term | None = None
        terms: Terms = {}
        for title, method, (ours, theirs) in zip(self.titles, self.methods, self.tapped, strict=True):
            knowledge = None if teacher is None or method.needs.teacher == "none" else _only(teacher, theirs)
            for name, term in method.terms(_only(student, ours), knowledge, ctx).items():
                items = f"{title}.{term.items}" if _counts_itself(method) else term.items
                if name == "label":
                    label = label or Term(term.mean, items)
                else:
                    unique = name if name not in terms else f"{title}.{name}"
                    terms[unique] = Term(method.config.weight * term.mean, items)
        if self.label_weight is not None:
            whole = ctx.label_loss(student, batch)
            label = Term(self.label_weight * whole.mean, label.items if label else whole.items)
        return {"label": label} | terms if label else terms

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

    def tables(self) -> dict[str, Table]:
        return self._named([method.tables() for method in self.methods])

    def measure(self, ctx: Step) -> dict[str, Table]:
        return self._named([method.measure(ctx) for method in self.methods])

    def _named(self, found: Sequence[Mapping[str, Table]]) -> dict[str, Table]:
        named: dict[str, Table] = {}
        for title, tables in zip(self.titles, found, strict=True):
            for name, table in tables.items():
                named[name if name not in named else f"{title}.{name}"] = table
        return named


def merged(needs: Sequence[Needs]) -> Needs:
    """What all of several methods need together; what `_conflicts` looks for is not among them."""
    readers = [need for need in needs if _reads_logits(need)]
    values: dict[str, Any] = {
        "logits": _shared([need.logits for need in readers]),
        "scale": "raw" if any(need.scale == "raw" for need in readers) or not readers else "log_probs",
        "tasks": _shared([need.tasks for need in needs]),
    }
    order: dict[str, tuple[str | None, ...]] = {
        "teacher": ("none", "frozen", "trained"),
        "couples_rows": (None, "norm", "loss"),
        "sharding": ("any", "ddp", "single"),
    }
    for field in dataclasses.fields(Needs):
        found = [getattr(need, field.name) for need in needs]
        if field.name in order:
            values[field.name] = max(found, key=order[field.name].index)
        elif field.name not in values:
            values[field.name] = _union(found) if isinstance(found[0], tuple) else max(found)
    return Needs(**values)


def _own_loops(methods: Sequence[Method]) -> list[str]:
    """Why methods cannot run in one loop."""
    reasons = []
    for method in methods:
        own = [why for hook, why in _ALONE.items() if _overrides(method, hook)]
        if own:
            reasons.append(
                f"`{method.config.name}` cannot be combined with other methods: {', and '.join(own)}; run it alone"
            )
    samplers = [f"`{method.config.name}`" for method in methods if _overrides(method, "sampler")]
    if len(samplers) > 1:
        reasons.append(f"{' and '.join(samplers)} cannot be combined: each chooses the rows of a step")
    return reasons


def _conflicts(needs: Mapping[str, Needs]) -> list[str]:
    """Needs that no run can meet together."""
    reasons = []
    logits = {title: need.logits for title, need in needs.items() if _reads_logits(need)}
    if logits and not _shared(list(logits.values())):
        reasons.append(f"no form of teacher logits serves all: {_listed(logits)}")
    tasks = {title: need.tasks for title, need in needs.items()}
    if not _shared(list(tasks.values())):
        reasons.append(f"no task is one of all: {_listed(tasks)}")
    by_role = {
        role: [f"`{t}`" for t, need in needs.items() if need.teacher == role]
        for role in ("frozen", "trained")
    }
    if all(by_role.values()):
        reasons.append(
            f"{', '.join(by_role['trained'])} trains the teacher, {', '.join(by_role['frozen'])} learns from one "
            "that stays as it is; run them apart"
        )
    return reasons


def _reads_logits(need: Needs) -> bool:
    return need.teacher != "none" and bool(need.logits)


def _shared(options: Sequence[tuple[str, ...]]) -> tuple[str, ...]:
    """What stands in all, in the order of the first."""
    return tuple(name for name in (options[0] if options else ()) if all(name in other for other in options))


def _listed(options: Mapping[str, tuple[str, ...]]) -> str:
    return ", ".join(f"`{title}` takes {' or '.join(names)}" for title, names in options.items())


def _titles(names: Sequence[str]) -> list[str]:
    """Names made unique: ``kd``, ``kd.2``."""
    counts = [names[: position + 1].count(name) for position, name in enumerate(names)]
    return [name if count == 1 else f"{name}.{count}" for name, count in zip(names, counts, strict=True)]


def _overrides(method: Method, hook: str) -> bool:
    # An option may give an instance a hook that its class leaves out.
    return hook in vars(method) or getattr(type(method), hook) is not getattr(Method, hook)


def _counts_itself(method: Method) -> bool:
    return _overrides(method, "count")


def _of_teacher(taps: Taps, teacher: ModelSpec | None) -> tuple[str, ...]:
    """Paths of the one teacher that an ``objective`` gets, asked for with its name or without."""
    if teacher is None:
        return ()
    return teacher.resolve((*taps.teacher, *taps.teachers.get(teacher.name, ())))


def _only(outputs: Outputs, taps: tuple[str, ...]) -> Outputs:
    """The same outputs with these features alone."""
    view = copy.copy(outputs)
    view.features = {path: outputs.features[path] for path in taps}
    return view


def _union(parts: Iterable[Sequence[str]]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(name for part in parts for name in part))
