"""What is learnt: the label loss, its checks and its metrics, one file a task."""

from __future__ import annotations

import difflib
from collections.abc import Sequence

from tutelage.tasks.classification import Classification
from tutelage.tasks.language_model import LanguageModel
from tutelage.tasks.metrics import RowMetric, valid_rows
from tutelage.tasks.multilabel import Multilabel
from tutelage.tasks.regression import Regression
from tutelage.tasks.task import Task
from tutelage.tasks.token_classification import TokenClassification

__all__ = [
    "Classification",
    "LanguageModel",
    "Multilabel",
    "Regression",
    "RowMetric",
    "Task",
    "TokenClassification",
    "build_task",
    "valid_rows",
]

_TASKS: dict[str, type[Task]] = {
    task.name: task for task in (Classification, LanguageModel, Multilabel, Regression, TokenClassification)
}


def build_task(
    name: str, outputs: int, *, label_smoothing: float = 0.0, class_names: Sequence[str] | None = None
) -> Task:
    """A task by name, for a model of ``outputs`` outputs.

    Args:
        class_names: in the order of the ids, where they have names: tags of entities have a metric of their own.

    Raises:
        ValueError: no such task, or label smoothing for one that has no classes.
    """
    if name not in _TASKS:
        near = difflib.get_close_matches(name, _TASKS, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"no task {name!r}; allowed: {', '.join(_TASKS)}{hint}")
    if name == Classification.name:
        return Classification(outputs, label_smoothing)
    if name == TokenClassification.name:
        return TokenClassification(outputs, label_smoothing, class_names)
    if label_smoothing:
        smoothed = f"{Classification.name} and {TokenClassification.name}"
        raise ValueError(
            f"train.label_smoothing is {label_smoothing}, but only {smoothed} smooth labels; {name} takes 0"
        )
    return _TASKS[name](outputs)
