"""Weight aligning: classes arrive in groups; one network learns them all without favouring the newest.

Zhao, Xiao, Gan, Zhang, Xia: Maintaining Discrimination and Fairness in Class Incremental Learning. CVPR 2020.
"""

from __future__ import annotations

import copy
import warnings
from typing import Any, Literal

import numpy as np
import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from tutelage.data import subset, targets
from tutelage.engine.loading import Source
from tutelage.engine.method import Method, Paper
from tutelage.engine.needs import Needs
from tutelage.engine.rng import derive_seed, seeded
from tutelage.engine.spec import ModelSpec
from tutelage.engine.step import Step
from tutelage.engine.types import Batch, Outputs, Table, Term, Terms
from tutelage.engine.views import to_float
from tutelage.functional import (
    herding_selection,
    incremental_accuracy,
    old_to_new_rate,
    wa_distillation_loss,
    weight_align,
)
from tutelage.procedures.procedure import Artifacts, Procedure
from tutelage.procedures.run import Run
from tutelage.procedures.stages import Relabelled, copy_weights, predictions, rows_of
from tutelage.recipe.config import MethodConfig
from tutelage.teachers.local import LocalTeacher

TABLE = [
    "step", "classes", "memory", "gamma", "norm_old", "norm_new", "accuracy_before", "accuracy", "top5",
    "accuracy_new", "accuracy_old", "old_to_new_before", "old_to_new",
]  # fmt: skip


class WAConfig(MethodConfig):
    """Options of weight aligning; defaults are the official code's."""

    steps: int = Field(5, ge=2, le=1000, description="Groups that the classes arrive in.")
    first: int | None = Field(
        None, ge=1, description="Classes of the first group; left out: groups of equal size."
    )
    memory_size: int | None = Field(
        None, ge=0, description="Rows of old classes kept in all; left out: 20 a class."
    )
    temperature: float = Field(2.0, gt=0, le=100, description="Softens both sides of the distillation term.")
    distill: bool = Field(True, description="Distil from the network of the step before.")
    align: bool = Field(True, description="Scale the newest rows of the head after each step.")
    norm: Literal[1, 2] = Field(1, description="Which norm of a head row is aligned.")
    clamp_max: float | None = Field(1.0, gt=0, description="Largest alignment factor; null: none.")
    clip_weights: bool = Field(True, description="Keep head weights non-negative after every optimiser step.")
    bias: bool = Field(False, description="Give the head a bias; alignment scales it too.")
    herding: bool = Field(True, description="Choose the rows kept by herding; else at random.")
    class_order_seed: int | None = Field(
        1993, ge=0, le=2**32 - 1, description="Seed of the class order; null: as numbered."
    )
    head_init: Literal["reset", "copy"] = Field(
        "reset", description="Draw the head anew at each step, or keep old rows."
    )
    variant: Literal["wa", "pycil"] = Field(
        "wa",
        description="pycil: CE + 2 KD, norm 2, no clamp, no clipping, a bias that is not scaled; for comparison.",
    )

    @model_validator(mode="before")
    @classmethod
    def _pycil(cls, values: Any) -> Any:
        if isinstance(values, dict) and values.get("variant") == "pycil":
            return {"norm": 2, "clamp_max": None, "clip_weights": False, "bias": True} | values
        return values


def class_order(num_classes: int, *, seed: int | None = 1993) -> list[int]:
    """Order in which classes arrive: ``order[new_id]`` is the class. numpy's legacy generator, as the official code
    draws it; ``seed=None`` keeps the natural order."""
    order = list(range(num_classes))
    if seed is not None:
        np.random.RandomState(seed).shuffle(order)
    return order


def class_steps(num_classes: int, steps: int, *, first: int | None = None) -> list[range]:
    """Ranges of new ids, one a step.

    Raises:
        ValueError: the classes do not divide into equal groups.
    """
    start = 0 if first is None else first
    rest, groups = num_classes - start, steps - (first is not None)
    if rest <= 0 or groups <= 0 or rest % groups:
        taken = "" if first is None else f" after the first {first}"
        raise ValueError(
            f"{num_classes} classes{taken} do not divide into {groups} equal steps; change method.steps or method.first"
        )
    size = rest // groups
    ranges = [range(start + i * size, start + (i + 1) * size) for i in range(groups)]
    return ranges if first is None else [range(first), *ranges]


def exemplars_per_class(memory_size: int, seen_classes: int) -> int:
    """``floor(memory_size / seen_classes)``."""
    return memory_size // seen_classes


class _Stage(Method):
    """One step's training: classification, distillation from the step before, clipped head weights."""

    Config = WAConfig
    needs = Needs(teacher="none", logits=())

    def __init__(self, config: WAConfig, head: str, old_classes: int) -> None:
        super().__init__(config)
        self.head_path, self.old_classes = head, old_classes
        if config.distill and old_classes:
            self.needs = Needs()  # type: ignore[misc]

    def build(self, teacher: ModelSpec | None, student: ModelSpec, example: Batch) -> None:
        assert student.module is not None
        head = student.module.get_submodule(self.head_path)
        self._clipped: list[Tensor] = [head.get_parameter("weight")]  # in a list: the student owns it

    def objective(self, student: Outputs, teacher: Outputs | None, batch: Batch, ctx: Step) -> Terms:
        label = ctx.label_loss(student, batch)
        if teacher is None:
            return {"label": label}
        soft = wa_distillation_loss(student.logits, teacher.logits, temperature=self.config.temperature)
        if self.config.variant == "pycil":
            return {"label": label, "kd": Term(2 * soft)}
        share = self.old_classes / student.logits.shape[1]
        return {"label": Term((1 - share) * label.mean), "kd": Term(share * soft)}

    def after_step(self, ctx: Step) -> None:
        if self.config.clip_weights:
            self._clipped[0].clamp_(min=0)


class WA(Procedure):
    """Class-incremental learning with rehearsal memory, distillation and weight aligning."""

    Config = WAConfig
    paper = Paper(
        title="Maintaining Discrimination and Fairness in Class Incremental Learning (Weight Aligning)",
        venue="CVPR",
        year=2020,
        arxiv="1911.07053",
        claim="With the same memory and schedule, distillation with weight aligning has a higher average incremental "
        "accuracy than distillation alone, and sends fewer old test samples to the new classes.",
        card="wa",
        family="incremental/novel class",
    )
    needs = Needs(
        teacher="none",
        logits=(),
        fields=("target", "index"),
        sharding="ddp",  # each stage copies, measures and scales the weights of the one before
    )

    def run(self, run: Run) -> Artifacts:
        """Train step by step. See `Procedure.run`."""
        config: WAConfig = self.config
        if run.data.test is None:
            raise ValueError("wa measures accuracy after every step; give data.test")
        classes = run.data.info.outputs
        order = class_order(classes, seed=config.class_order_seed)
        new_ids = torch.empty(classes, dtype=torch.int64)
        new_ids[order] = torch.arange(classes)
        work = _Work(run, config, Relabelled(run.data.train, new_ids), Relabelled(run.data.test, new_ids))
        for t, group in enumerate(class_steps(classes, config.steps, first=config.first)):
            work.step(t, group, last=t == config.steps - 1)
        return work.artifacts(order)


class _Work:
    """The state that goes from step to step; all of it follows from the run's journal and checkpoints."""

    def __init__(self, run: Run, config: WAConfig, train: Source, test: Source) -> None:
        self.run, self.config, self.train, self.test = run, config, train, test
        self.targets, self.test_targets = targets(train), targets(test)
        self.memory_size = 20 * run.data.info.outputs if config.memory_size is None else config.memory_size
        self.memory: dict[int, list[int]] = {}
        self.model: nn.Module | None = None
        self.head = ""
        self.rows: list[list[Any]] = []
        self.correct: list[Tensor] = []
        self.last: dict[str, float] = {}

    def step(self, t: int, group: range, *, last: bool) -> None:
        """Train on a group of classes and the memory, align, measure, and choose what to remember."""
        old = group.start
        model = self._grow(t, group.stop)
        own = rows_of(self.targets, group)
        kept = [row for rows in self.memory.values() for row in rows]
        if not own:
            raise ValueError(f"step {t} of wa has no training rows for its classes {list(group)}")
        source = subset(self.train, own + kept)
        self._train(t, model, source, old)
        before = self._measure(f"before-{t}", model, group)
        gamma, norms = self._align(model, old) if t else (1.0, (0.0, 0.0))
        after = self._measure(f"after-{t}", model, group) if t else before
        self.model = model.eval()
        self.correct.append(torch.tensor(after["correct"], dtype=torch.float64))
        self.last = {name: value for name, value in after.items() if name != "correct"}
        # The first step has no old classes.
        of_old = (
            (after["accuracy_old"], before["old_to_new_rate"], after["old_to_new_rate"]) if t else (None,) * 3
        )
        self.rows.append([
            t, group.stop, len(kept), gamma, *norms, before["accuracy"], after["accuracy"], after["top5"],
            after["accuracy_new"], *of_old,
        ])  # fmt: skip
        if not last:
            self._remember(t, group, model)

    def _grow(self, t: int, classes: int) -> nn.Module:
        """The student with a head for all classes seen so far, and the weights of the step before."""
        example = to_float(self.train.fetch([0, 0]).to(self.run.runtime.device))
        model = self.run.new_student(classes).to(self.run.runtime.device)
        spec = ModelSpec.of("student", model, example.inputs)
        if spec.head is None:
            raise ValueError("wa needs a student that ends in one linear layer; this one has none")
        self.head = spec.head
        width = model.get_submodule(spec.head).get_parameter("weight").shape[1]
        with seeded(derive_seed(self.run.seed, "wa head", t)):
            head = nn.Linear(int(width), classes, bias=self.config.bias).to(self.run.runtime.device)
        model.set_submodule(spec.head, head)
        if self.model is not None:
            copy_weights(self.model, model, leave_out=spec.head)
            if self.config.head_init == "copy":
                self._copy_rows(head)
        elif self.config.clip_weights:
            self._warn_negative(spec, model, example)
        return model

    @torch.no_grad()
    def _copy_rows(self, head: nn.Linear) -> None:
        assert self.model is not None
        old = self.model.get_submodule(self.head)
        for name, value in old.named_parameters():
            head.get_parameter(name)[: len(value)] = value

    def _warn_negative(self, spec: ModelSpec, model: nn.Module, example: Batch) -> None:
        features = self._features(model, range(min(32, len(self.train))))
        if bool((features < 0).any()):
            warnings.warn(
                f"wa clips head weights at zero, but features before {spec.head} can be negative (no ReLU); "
                "set method.clip_weights=false",
                stacklevel=2,
            )

    def _train(self, t: int, model: nn.Module, source: Source, old: int) -> None:
        train = self.run.recipe.train
        teachers = {}
        if self.model is not None and self.config.distill:
            example = to_float(source.fetch([0, 0]).to(self.run.runtime.device))
            frozen = LocalTeacher(
                "the step before",
                copy.deepcopy(self.model),
                example.inputs,
                mean=self.run.mean,
                std=self.run.std,
            )
            teachers = {"teacher": frozen.freeze()}
        optimizer = train.optimizer.model_dump() | {"weight_decay": train.optimizer.weight_decay / (t + 1)}
        changes = {"optimizer": optimizer, "batch_size": min(train.batch_size, len(source))}
        stage = _Stage(self.config, self.head, old)
        self.run.train(f"step-{t}", model, stage, source, teachers=teachers, config=changes)

    @torch.no_grad()
    def _align(self, model: nn.Module, old: int) -> tuple[float, tuple[float, float]]:
        head = model.get_submodule(self.head)
        weight = head.get_parameter("weight")
        norms = weight.norm(p=self.config.norm, dim=1)
        means = (float(norms[:old].mean()), float(norms[old:].mean()))
        if not self.config.align:
            return 1.0, means
        if means[1] == 0.0:
            warnings.warn("wa: every new row of the head is zero; alignment leaves it as it is", stacklevel=2)
        aligned = weight_align(weight, old, norm=self.config.norm, clamp_max=self.config.clamp_max)
        weight.copy_(aligned.weight)
        if self.config.bias and self.config.variant == "wa":
            head.get_parameter("bias")[old:] *= aligned.gamma
        return float(aligned.gamma), means

    def _measure(self, name: str, model: nn.Module, group: range) -> dict[str, Any]:
        """Accuracy on the test rows of every class seen so far."""

        def make() -> dict[str, Any]:
            seen = subset(self.test, rows_of(self.test_targets, range(group.stop)))
            found = predictions(
                self.run.predictor(model),
                seen,
                self.run.runtime.device,
                self.run.recipe.evaluation.batch_size,
            )
            hit = found.logits.argmax(1) == found.target
            top = found.logits.topk(min(5, group.stop), dim=1).indices
            is_old = found.target < group.start
            return {
                "correct": torch.bincount(found.target[hit], minlength=group.stop).tolist(),
                "accuracy": float(hit.double().mean()),
                "top5": float((top == found.target[:, None]).any(1).double().mean()),
                "accuracy_old": float(hit[is_old].double().mean()) if is_old.any() else 0.0,
                "accuracy_new": float(hit[~is_old].double().mean()) if not is_old.all() else 0.0,
                "old_to_new_rate": float(old_to_new_rate(found.logits.argmax(1), found.target, group.start)),
            }

        return self.run.once(name, make)

    def _remember(self, t: int, group: range, model: nn.Module) -> None:
        """Cut old lists, and choose rows of the new classes from their own training data."""
        share = exemplars_per_class(self.memory_size, group.stop)

        def make() -> dict[str, Any]:
            chosen = {str(k): rows[:share] for k, rows in self.memory.items()}
            for k in group:
                rows = rows_of(self.targets, range(k, k + 1))
                chosen[str(k)] = self._choose(t, k, rows, share, model)
            return chosen

        self.memory = {int(k): rows for k, rows in self.run.once(f"memory-{t}", make).items()}

    def _choose(self, t: int, k: int, rows: list[int], share: int, model: nn.Module) -> list[int]:
        if not rows or not share:
            return []
        if self.config.herding:
            picked = herding_selection(self._features(model, rows), share)
        else:
            picked = torch.randperm(len(rows), generator=self.run.generator(f"memory {t} {k}"))[:share]
        return [rows[i] for i in picked.tolist()]

    def _features(self, model: nn.Module, rows: Any) -> Tensor:
        """Inputs of the head for training rows, without views."""
        tap = f"{self.head}:in"
        predict = self.run.predictor(model, taps=(tap,))
        found = []
        size = self.run.recipe.evaluation.batch_size
        for start in range(0, len(rows), size):
            batch = to_float(self.train.fetch(list(rows[start : start + size])).to(self.run.runtime.device))
            found.append(predict(batch).features[tap].float().cpu())
        return torch.cat(found)

    def artifacts(self, order: list[int]) -> Artifacts:
        """The classifier over all classes under their own numbers, and the figures by step."""
        assert self.model is not None
        total = torch.bincount(self.test_targets, minlength=len(order)).double()
        summary = incremental_accuracy(self.correct, total)
        metrics = self.last | {
            "average_incremental_accuracy": float(summary.average),
            "forgetting": float(summary.forgetting),
            "accuracy_gap": self.last["accuracy_new"] - self.last["accuracy_old"],
        }
        return Artifacts(
            student=self._plain(order),
            metrics=metrics,
            tables={"accuracy by step": Table(TABLE, self.rows)},
            figures={"train_seconds": self.run.trained_seconds, "class_order": order},
        )

    @torch.no_grad()
    def _plain(self, order: list[int]) -> nn.Module:
        """Head rows back in the data's own class order, with the (zero) bias that a plain model of this name has."""
        model = copy.deepcopy(self.model)
        assert model is not None
        head = model.get_submodule(self.head)
        weight = head.get_parameter("weight")
        plain = nn.Linear(weight.shape[1], weight.shape[0]).to(weight)
        plain.weight[order] = weight
        plain.bias[order] = (
            head.get_parameter("bias") if self.config.bias else torch.zeros(len(order)).to(weight)
        )
        model.set_submodule(self.head, plain)
        return model
