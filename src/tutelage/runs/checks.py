"""What a run is held against before anything is trained or written."""

from __future__ import annotations

import difflib
from collections.abc import Mapping

from tutelage.data import Data, RowSource
from tutelage.data.cache import SharedRows
from tutelage.engine.loading import Source
from tutelage.engine.method import Method
from tutelage.engine.needs import PairingError, Setting, check_pairing
from tutelage.engine.runtime import Runtime
from tutelage.engine.types import Batch
from tutelage.engine.views import to_float
from tutelage.procedures.procedure import Procedure
from tutelage.recipe.schema import Recipe
from tutelage.tasks import Task
from tutelage.tasks.task import RowNames
from tutelage.teachers.local import LocalTeacher


def check_fit(
    recipe: Recipe,
    method: Method | Procedure,
    teachers: Mapping[str, LocalTeacher],
    data: Data,
    runtime: Runtime,
) -> None:
    """Method, teachers, data and launch.

    Raises:
        PairingError: every reason why they do not fit together.
    """
    name = "+".join(config.name for config in recipe.method)
    sources = {"train"} | ({"validation"} if data.validation is not None else set())
    setting = Setting(
        task=recipe.task,
        fields=frozenset(data.info.fields),
        loaders=frozenset(sources),
        views=64 if recipe.data.views else 1,
        sharding=runtime.sharding,
    )
    reasons = check_pairing(
        name, method.needs, {n: teacher.offers for n, teacher in teachers.items()}, setting
    )
    for title, teacher in teachers.items():
        if teacher.spec.outputs != data.info.outputs:
            reasons.append(
                f"teacher `{title}` gives {teacher.spec.outputs} outputs, the data has {data.info.outputs} "
                f"({recipe.data.path}); give a teacher for these classes, or train one by `teacher: {{recipe: …}}`"
            )
    if reasons:
        raise PairingError("\n".join(reasons))


def check_evaluation(recipe: Recipe, task: Task, data: Data) -> None:
    """Names in ``evaluation`` and ``train.early_stop``.

    Raises:
        ValueError: metrics that the task does not have, or a column that the rows do not carry.
    """
    early, options = recipe.train.early_stop, recipe.evaluation
    wanted = {"evaluation.best": options.best, "train.early_stop.metric": early and early.metric}
    wanted |= {f"evaluation.metrics.{i}": name for i, name in enumerate(options.metrics)}
    unknown = [
        f"{field} is {name!r}" for field, name in wanted.items() if name and name not in task.higher_is_better
    ]
    if unknown:
        raise ValueError(f"{'; '.join(unknown)}; {task.name} has {', '.join(task.higher_is_better)}")
    columns = sorted(data.info.fields - {"target", "index"})
    group = options.group_by
    if group is not None and group not in columns:
        near = difflib.get_close_matches(group, columns, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else f"; name it in data.columns too: [{group}]"
        raise ValueError(
            f"evaluation.group_by is {group!r}; columns that travel with the rows: {', '.join(columns) or 'none'}{hint}"
        )


def check_rows(data: Data, task: Task) -> None:
    """Targets of training rows where they are at hand, and all of the held-out rows that stay in memory anyway: what is
    wrong with those would only show after training.

    Raises:
        ValueError: a row that cannot be read or used.
    """
    train = data.train
    if isinstance(train, RowSource) and train.target is not None:
        rows = Batch(inputs=train.target, target=train.target, index=train.ids)
        task.check_target(train.target, RowNames(rows))
    for part, source in {"validation": data.validation, "test": data.test}.items():
        if source is not None and SharedRows.fits(len(source), data.info.input_shape):
            _read_all(part, source, task)


def _read_all(part: str, source: Source, task: Task) -> None:
    for start in range(0, len(source), 512):
        try:
            task.check(to_float(source.fetch(range(start, min(start + 512, len(source))))))
        except ValueError as error:
            raise ValueError(f"{part} data: {error}") from error
