"""What the baselines that read inner tensors share: which taps they read, their options' names, their label term."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from tutelage.engine.calling import TapError
from tutelage.engine.spec import match_stages
from tutelage.engine.types import Batch, Outputs, Term, Terms
from tutelage.recipe.config import MethodConfig

if TYPE_CHECKING:
    from tutelage.engine.spec import ModelSpec
    from tutelage.engine.step import Step

Side = Literal["student", "teacher"]
Paths = tuple[str, ...]


class OneTapConfig(MethodConfig):
    """Options of a baseline that compares one tensor of each model."""

    label_weight: float = Field(1.0, ge=0, description="Weight of the label loss.")
    student_tap: str | None = Field(None, description="The student's module path; see `tutelage taps`.")
    teacher_tap: str | None = Field(None, description="The teacher's module path; see `tutelage taps`.")


class StageTapsConfig(MethodConfig):
    """Options of a baseline that compares maps of several stages."""

    label_weight: float = Field(1.0, ge=0, description="Weight of the label loss.")
    student_taps: Paths | None = Field(
        None,
        min_length=1,
        description="Module paths (or patterns) of the student's maps; left out: its stages. See `tutelage taps`.",
    )
    teacher_taps: Paths | None = Field(
        None, min_length=1, description="Likewise of the teacher, as many as of the student."
    )


def one_tap(spec: ModelSpec, side: Side, path: str | None, default: Callable[[ModelSpec, Side], str]) -> str:
    """The one tap that ``method.<side>_tap`` names; where it is not set, what ``default`` finds.

    Raises:
        ValueError: the path fits no module, or several.
    """
    if path is None:
        return default(spec, side)
    found = spec.resolve((path,))
    if len(found) != 1:
        raise ValueError(
            f"method.{side}_tap={path!r} must name one module of {spec.name}; it matches {', '.join(found)}"
        )
    return found[0]


def pooled_feature(spec: ModelSpec, side: Side) -> str:
    """The classifier's input.

    Raises:
        ValueError: no single layer gives the logits.
    """
    try:
        return spec.pooled
    except TapError as error:
        raise ValueError(f"{error}, with method.{side}_tap") from None


def last_stage(spec: ModelSpec, side: Side) -> str:
    """The deepest stage.

    Raises:
        ValueError: the model has none.
    """
    return stage_taps(spec, side, None, option=f"{side}_tap")[-1]


def stage_taps(spec: ModelSpec, side: Side, paths: Paths | None, option: str | None = None) -> Paths:
    """The taps that ``method.<side>_taps`` names, shallow to deep; where it is not set, all stages.

    Args:
        option: what a message calls the option, where it is not ``<side>_taps``.

    Raises:
        ValueError: a path fits no module, or the model has no stages.
    """
    found = spec.stages() if paths is None else spec.resolve(paths)
    if not found:
        raise ValueError(
            f"no stages found in the {side} {spec.name}; set method.{option or f'{side}_taps'} "
            "(`tutelage taps MODEL` lists what there is)"
        )
    return found


def stage_pairs(
    student: ModelSpec, teacher: ModelSpec, student_paths: Paths | None, teacher_paths: Paths | None
) -> tuple[Paths, Paths]:
    """Equally many taps of student and teacher, paired in order.

    Stages of models that have unequally many are paired by depth, and some of the longer side's are left out.

    Raises:
        ValueError: as `stage_taps`, or named paths are not equally many.
    """
    ours = stage_taps(student, "student", student_paths)
    theirs = stage_taps(teacher, "teacher", teacher_paths)
    if len(ours) == len(theirs):
        return ours, theirs
    if student_paths is None and teacher_paths is None:
        pairs = match_stages(student, teacher)
        return tuple(path for path, _ in pairs), tuple(path for _, path in pairs)
    raise ValueError(
        f"taps are paired in order, shallow to deep: the student has {len(ours)} ({', '.join(ours)}), the teacher "
        f"{len(theirs)} ({', '.join(theirs)}); set method.student_taps and method.teacher_taps to equally many"
    )


def warmup(epoch: int, epochs: int) -> float:
    """Share of a loss in an epoch (counted from 0): it grows to 1 over the first ``epochs``; 0 of them: 1 at once."""
    return min((epoch + 1) / epochs, 1.0) if epochs else 1.0


def label_term(weight: float, student: Outputs, batch: Batch, ctx: Step) -> Terms:
    """The task's label loss with its weight."""
    label = ctx.label_loss(student, batch)
    return {"label": Term(weight * label.mean, label.items)}
