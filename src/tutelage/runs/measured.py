"""What is measured once a student is trained: metrics, cost, and single answers for the report."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from tutelage.engine.taps import Tapped
from tutelage.engine.types import Batch, Head, Outputs
from tutelage.engine.views import to_float
from tutelage.models import profile_model
from tutelage.procedures.procedure import Procedure
from tutelage.runs.analysis import analyse
from tutelage.runs.assemble import Assembly
from tutelage.runs.embeddings import embeddings
from tutelage.teachers.local import LocalTeacher

_REMEMBERED = 2**30
"""Bytes of a split's outputs up to which they are kept."""


def add_profiles(result: dict[str, Any], assembly: Assembly, student: nn.Module) -> None:
    """Parameters, FLOPs and latency of the student and its teachers; of a teacher that is still sharded, the first."""
    result["student"] = {
        "model": assembly.recipe.student.model,
        **_profile(assembly, held_student(assembly, student)),
    }
    for name, model in assembly.teacher_models.items():
        if model.store is not None:
            part = model.store.plan.teacher
            profile = {"parameters": part.parameters, "flops": part.flops}
        else:
            whole = assembly.whole_teachers.get(name)
            profile = _profile(assembly, whole.held) if whole else {"parameters": model.parameters}
        result["teachers"][name] = {**result["teachers"].get(name, {}), "model": model.name, **profile}


def evaluations(assembly: Assembly, student: nn.Module) -> dict[str, Any]:
    """Metrics of what ships, and of the teachers, on validation and test data. Agreement is with the first teacher that
    is a model; a store brings what was measured when it was made, where that was on the same rows."""
    predict = predictor(assembly, student)
    students: dict[str, dict[str, float]] = {}
    teachers: dict[str, dict[str, dict[str, float]]] = {name: {} for name in assembly.teachers}
    for split, source in (("validation", assembly.data.validation), ("test", assembly.data.test)):
        # Ids are unique within a split only, so each split is remembered apart.
        remembered = {name: Remembered(teacher) for name, teacher in assembly.live_teachers.items()}
        students[split] = assembly.evaluate(predict, source, next(iter(remembered.values()), None))
        for name, teacher in remembered.items():
            teachers[name][split] = assembly.evaluate(teacher, source)
        for name, model in assembly.teacher_models.items():
            if model.store is not None and source is not None:
                teachers[name][split] = model.store.metrics(split, source.fingerprint)
    return {"validation": students["validation"], "test": students["test"] or None, "teachers": teachers}


def analysis_of(assembly: Assembly, student: nn.Module) -> dict[str, Any] | None:
    """What the report shows of single answers; for a classifier that one training loop made, on held-out rows."""
    split = "test" if assembly.data.test is not None else "validation"
    source = assembly.data.test if assembly.data.test is not None else assembly.data.validation
    if source is None or isinstance(assembly.method, Procedure):
        return None
    if assembly.task.name not in ("classification", "token-classification"):
        return None
    teacher = next(iter(assembly.live_teachers.values()), None)
    found = analyse(
        predictor(assembly, student),
        None if teacher is None else teacher.outputs,
        source,
        classes=assembly.task.outputs,
        class_names=assembly.data.info.class_names,
        batch_size=assembly.recipe.evaluation.batch_size,
        device=assembly.runtime.device,
        tokenizer=assembly.data.info.tokenizer,
    )
    if found["items"] == "tokens":  # their last features have a place a token: no picture of so many
        return {"split": split, **found}
    models = {"student": held_student(assembly, student)}
    if teacher is not None:
        models["teacher"] = teacher.held
    seen = embeddings(
        models,
        source,
        batch_size=assembly.recipe.evaluation.batch_size,
        device=assembly.runtime.device,
    )
    return {"split": split, **found, "embeddings": seen}


class Remembered:
    """A teacher's outputs for evaluation batches, computed once where they are not too large: agreement and the
    teacher's own metrics share them. Of a language model the hidden states are kept, and its head once: a sharded one
    is gathered anew for every batch, as large as it is."""

    def __init__(self, teacher: LocalTeacher) -> None:
        self.teacher = teacher
        self._kept: dict[tuple[int, ...], Tensor] = {}
        self._head: Head | None = None
        self._bytes = 0

    def __call__(self, batch: Batch) -> Outputs:
        key = tuple(batch.index.tolist()) if batch.index is not None else ()
        if key in self._kept:
            kept = self._kept[key]
            return Outputs(kept) if self._head is None else Outputs(hidden=kept, head=self._head)
        outputs = self.teacher.outputs(batch)
        kept = outputs.logits if outputs.hidden is None else outputs.hidden
        self._bytes += kept.nbytes
        if self._bytes <= _REMEMBERED:
            self._kept[key], self._head = kept, outputs.head
        return outputs


def held_student(assembly: Assembly, student: nn.Module) -> Tapped:
    """What ships, with its normalisation, on the device and in eval mode."""
    held = Tapped(student, mean=assembly.student.mean, std=assembly.student.std, head=assembly.head)
    return held.to(assembly.runtime.device).eval()


def predictor(assembly: Assembly, student: nn.Module) -> Callable[[Batch], Outputs]:
    """The student's outputs of a batch, normalised, in eval mode and without gradients."""
    held = held_student(assembly, student)

    def predict(batch: Batch) -> Outputs:
        with torch.no_grad(), assembly.runtime.autocast():
            return held.outputs(held(batch.inputs))

    return predict


def _profile(assembly: Assembly, held: Tapped) -> dict[str, Any]:
    row = to_float(assembly.data.train.fetch([0]).to(assembly.runtime.device))
    return dict(profile_model(held.model.eval(), held.normalise(row.inputs))._asdict())
