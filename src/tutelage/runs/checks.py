"""What a run is held against before anything is trained or written."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any

from tutelage.data import Data, RowSource
from tutelage.data.cache import SharedRows
from tutelage.data.tokens import TokenSource
from tutelage.engine.loading import Source
from tutelage.engine.method import Method
from tutelage.engine.needs import PairingError, Setting, check_pairing
from tutelage.engine.runtime import Runtime
from tutelage.engine.teacher import Teacher
from tutelage.engine.types import Batch
from tutelage.engine.views import Views, to_float
from tutelage.procedures.procedure import Procedure
from tutelage.recipe.schema import DataConfig, ModelConfig, Recipe, TeacherConfig, ViewConfig
from tutelage.runs.teachers import TeacherModel, teacher_configs
from tutelage.tasks import Task
from tutelage.tasks.task import RowNames
from tutelage.teachers.manifest import Plan, TokensPart

_MOST_VIEWS = 64
"""Views of a row that a step may show."""


def check_fit(
    recipe: Recipe,
    method: Method | Procedure,
    models: Mapping[str, TeacherModel],
    teachers: Mapping[str, Teacher],
    data: Data,
    runtime: Runtime,
) -> None:
    """Method, teachers, data and launch.

    Raises:
        PairingError: every reason why they do not fit together.
    """
    name = "+".join(config.name for config in recipe.method)
    setting = setting_of(recipe, data, runtime)
    reasons = check_pairing(
        name, method.needs, {n: teacher.offers for n, teacher in teachers.items()}, setting
    )
    reasons += flash_gaps(recipe, runtime)
    if method.needs.teacher == "trained":
        reasons += [
            f"`{name}` trains its teachers, and teacher `{title}` has weights in half precision, which lose small "
            "updates; leave its dtype out"
            for title, model in models.items()
            if model.built is not None and any(p.dtype.itemsize < 4 for p in model.built.module.parameters())
        ]
    if "validation" in method.needs.loaders and _validates_on_test(recipe, data):
        reasons.append(
            f"`{name}` learns from data.validation, and that is the test data: its result would mean nothing; give a "
            "share of the training rows in data.validation"
        )
    # A procedure that reads features alone also takes a teacher that never saw these classes, or any.
    classified = teachers if isinstance(method, Method) or method.needs.logits else {}
    for title, teacher in classified.items():
        if teacher.spec.outputs != data.info.outputs:
            reasons.append(
                f"teacher `{title}` gives {teacher.spec.outputs} outputs, the data has {data.info.outputs} "
                f"({recipe.data.path}); give a teacher for these classes, or train one by `teacher: {{recipe: …}}`"
            )
    for title, model in models.items():
        if model.store is not None and data.stream is not None:
            reasons.append(
                f"teacher `{title}` is a store, which a stream's rows outrun; set data.stream=false"
            )
        elif model.store is not None and method.needs.teacher != "none":
            reasons += _store_gaps(title, model.store.plan, recipe, method.needs.views, data)
    if reasons:
        raise PairingError("\n".join(reasons))


def flash_gaps(recipe: Recipe, runtime: Runtime) -> list[str]:
    """Models whose attention has no kernel for the device or the number format."""
    reasons = []
    models: dict[str, ModelConfig | TeacherConfig] = {"student": recipe.student, **teacher_configs(recipe)}
    for title, config in models.items():
        if config.attention is None or not config.attention.startswith("flash"):
            continue
        if runtime.device.type == "cpu":
            reasons.append(
                f"{title}: {config.attention} needs a GPU (train.device is cpu); take attention=sdpa"
            )
        elif runtime.precision == "fp32" and config.dtype == "float32":
            reasons.append(
                f"{title}: {config.attention} computes in half precision alone; set train.precision=bf16, or take "
                "attention=sdpa"
            )
    return reasons


def setting_of(recipe: Recipe, data: Data, runtime: Runtime) -> Setting:
    """What data, task and launch give beside the teachers."""
    sources = {"train"} | ({"validation"} if data.validation is not None else set())
    most = recipe.data.distinct_views or _MOST_VIEWS
    return Setting(
        task=recipe.task,
        fields=frozenset(data.info.fields),
        loaders=frozenset(sources),
        views=min(most, _MOST_VIEWS) if recipe.data.views else 1,
        sharding=runtime.sharding,
    )


def views_drawn(recipe: Recipe, count: int, rows: int) -> int:
    """How many views of each of ``rows`` rows a run draws in all, where a step shows ``count`` of them."""
    steps_per_epoch = max(1, rows // recipe.train.batch_size)
    epochs = recipe.train.epochs or -(-(recipe.train.steps or 1) // steps_per_epoch)
    return Views.of(recipe.data, recipe.train.seed).needed(epochs, count)


def _store_gaps(title: str, plan: Plan, recipe: Recipe, count: int, data: Data) -> list[str]:
    """Why a store does not hold what a run will ask it for."""
    start = f"the store of teacher `{title}` was made for"
    tokens = tokens_part(data, recipe.data)
    if plan.data.tokens is not None and tokens is not None and plan.data.tokens != tokens:
        theirs, ours = plan.data.tokens.model_dump(), tokens.model_dump()
        field = next(name for name in ours if theirs[name] != ours[name])
        return [
            f"{start} rows of other tokens (data.{_TOKEN_FIELDS[field]}): {str(theirs[field])[:12]}; this run has "
            f"{str(ours[field])[:12]}; take the recipe's `data` with which it was made, or make one anew"
        ]
    if plan.data.fingerprint != data.train.fingerprint:
        return [
            f"{start} other rows (data): {plan.data.rows} of {plan.data.path}, fingerprint "
            f"{plan.data.fingerprint[:12]}; this run has {len(data.train)} of {recipe.data.path}, fingerprint "
            f"{data.train.fingerprint[:12]}; take the recipe's `data` with which it was made, or make one anew"
        ]
    changes = tuple(view.model_dump(mode="json") for view in recipe.data.views)
    if plan.views.changes != changes:
        return [
            f"{start} other views (data.views): {_named(plan.views.changes)}; this run draws {_named(changes)}; "
            "take the same, or make one anew"
        ]
    reasons = []
    seed = Views.of(recipe.data, recipe.train.seed).seed
    if changes and plan.views.seed != seed:
        reasons.append(
            f"{start} the view seed {plan.views.seed}; this run draws by {seed}; set data.view_seed={plan.views.seed}"
        )
    drawn = views_drawn(recipe, count, len(data.train))
    if drawn > plan.views.number:
        reasons.append(
            f"{start} {plan.views.number} views of a row; this run draws {drawn}; set "
            f"data.distinct_views={plan.views.number}, or make one with more"
        )
    return reasons


_TOKEN_FIELDS = {
    "tokenizer": "tokenizer",
    "max_length": "max_length",
    "packing": "packing",
    "fingerprint": "path",
}


def tokens_part(data: Data, config: DataConfig) -> TokensPart | None:
    """How the rows' text became tokens; none where they are no packed text."""
    packing = getattr(data.train, "packing_fingerprint", None)
    if packing is None or data.info.tokenizer is None:
        return None
    return TokensPart(
        tokenizer=data.info.tokenizer.fingerprint,
        max_length=config.max_length,
        packing=config.packing,
        fingerprint=packing,
    )


def _named(changes: tuple[dict[str, Any], ...]) -> str:
    return ", ".join(str(ViewConfig.model_validate(change)) for change in changes) or "none"


def _validates_on_test(recipe: Recipe, data: Data) -> bool:
    if data.validation is None:
        return False
    same = data.test is not None and data.test.fingerprint == data.validation.fingerprint
    return same or recipe.data.validation == "test"


def check_evaluation(recipe: Recipe, task: Task, data: Data) -> None:
    """Names in ``evaluation`` and ``train.early_stop``, and whether there are prompts for its samples.

    Raises:
        ValueError: metrics that the task does not have, a column that the rows do not carry, or samples without text.
    """
    early, options = recipe.train.early_stop, recipe.evaluation
    held_out = data.validation if data.test is None else data.test
    if options.samples and not (isinstance(held_out, TokenSource) and recipe.task == "language-model"):
        raise ValueError(
            f"evaluation.samples is {options.samples}: prompts come from held-out text of a language model, and this "
            f"run has {'none' if held_out is None else f'the task {recipe.task}'}; set data.validation or data.test, "
            "or leave it out"
        )
    wanted = {"evaluation.best": options.best, "train.early_stop.metric": early and early.metric}
    wanted |= {f"evaluation.metrics.{i}": name for i, name in enumerate(options.metrics)}
    unknown = [
        f"{field} is {name!r}" for field, name in wanted.items() if name and name not in task.known_metrics
    ]
    if unknown:
        raise ValueError(
            f"{'; '.join(unknown)}; on this data {task.name} has {', '.join(task.known_metrics)}"
        )
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
