"""What is learnt: the label loss, its checks and its metrics, one file a task."""

from __future__ import annotations

import difflib

from tutelage.tasks.classification import Classification
from tutelage.tasks.metrics import RowMetric, valid_rows
from tutelage.tasks.multilabel import Multilabel
from tutelage.tasks.regression import Regression
from tutelage.tasks.task import Task

__all__ = ["Classification", "Multilabel", "Regression", "RowMetric", "Task", "build_task", "valid_rows"]

_TASKS: dict[str, type[Task]] = {task.name: task for task in (Classification, Multilabel, Regression)}


def build_task(name: str, outputs: int, *, label_smoothing: float = 0.0) -> Task:
    """A task by name, for a model of ``outputs`` outputs.

    Raises:
        ValueError: no such task, or label smoothing for one that has no classes.
    """
    if name not in _TASKS:
        near = difflib.get_close_matches(name, _TASKS, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"no task {name!r}; allowed: {', '.join(_TASKS)}{hint}")
    if name == Classification.name:
        return Classification(outputs, label_smoothing)
    if label_smoothing:
        raise ValueError(
            f"train.label_smoothing is {label_smoothing}, but only classification smooths labels; {name} takes 0"
        )
    return _TASKS[name](outputs)
