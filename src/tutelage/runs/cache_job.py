"""What there is to store: a teacher, the rows that it is asked about, and the plan that follows from a recipe."""

from __future__ import annotations

import time
from importlib.metadata import version

import torch
from torch import Tensor

from tutelage.data import Data
from tutelage.data.source import row_ids, tensor_digest
from tutelage.engine.evaluate import evaluate
from tutelage.engine.loading import Source
from tutelage.engine.method import Method
from tutelage.engine.needs import PairingError, check_pairing
from tutelage.engine.types import Outputs
from tutelage.engine.views import Views
from tutelage.models import profile_model
from tutelage.recipe.schema import Recipe
from tutelage.runs.assemble import Assembly, assemble
from tutelage.runs.checks import setting_of, tokens_part, views_drawn
from tutelage.teachers.local import LocalTeacher
from tutelage.teachers.manifest import CODE, DataPart, FormPart, Plan, SplitMetrics, TeacherPart, ViewsPart
from tutelage.teachers.measuring import OF_PROBABILITIES, ErrorMeter
from tutelage.teachers.store import layout_of, offers_of, spec_part

_SHARD_BYTES, _SHARD_ROWS = 2**27, 16_384
_TRIAL_BATCHES = 4
_TRIAL_SECONDS = 2.0


class CacheJob:
    """A teacher, the rows that it is asked about, and the plan that follows."""

    def __init__(self, assembly: Assembly, name: str, ids: Tensor, positions: Tensor) -> None:
        self.assembly, self.name = assembly, name
        self.ids, self.positions = ids, positions
        teacher = assembly.teachers[name]
        assert isinstance(teacher, LocalTeacher)
        self.teacher = teacher
        recipe, self.source = assembly.recipe, assembly.data.train
        self.views = Views.of(recipe.data, recipe.train.seed)
        self.keep_logits = recipe.cache.form != "none"
        self.taps = _taps(assembly, name)
        _check_taps(assembly, self.taps)
        if not self.taps and not self.keep_logits:
            raise ValueError(
                "cache.form is none and no taps are kept: there is nothing to store; set cache.taps"
            )
        self.plan = self._plan()

    @classmethod
    def of(
        cls,
        recipe: Recipe,
        teacher: str | None,
        data: Data | None = None,
        *,
        dry: bool,
        show_progress: bool | None = False,
    ) -> CacheJob:
        """The job of a recipe. ``dry``: a teacher that would be trained first has random weights.

        Raises:
            PairingError, ValueError: it has none.
        """
        # Each process asks its own rows of a whole teacher: a sharded one would wait for the others' rows.
        plain = recipe.train.model_copy(update={"compile": False, "sharding": "ddp", "shard_teacher": None})
        assembly = assemble(
            recipe.model_copy(update={"train": plain}), data=data, dry=dry, show_progress=show_progress
        )
        name = _choose(assembly, teacher)
        _check_rows(assembly)
        ids, positions = row_ids(assembly.data.train).sort(stable=True)
        if bool((ids[1:] == ids[:-1]).any()):
            twice = int(ids[1:][ids[1:] == ids[:-1]][0])
            raise ValueError(f"the training rows have the id {twice} twice; a store tells rows by their ids")
        job = cls(assembly, name, ids, positions)
        _check_method(assembly, name, job.plan)
        return job

    @property
    def trained_first(self) -> bool:
        """Whether the teacher would be trained before it is asked."""
        return self.assembly.teacher_models[self.name].untrained

    @property
    def held_out(self) -> dict[str, Source]:
        data = self.assembly.data
        splits = {"validation": data.validation, "test": data.test}
        return {name: source for name, source in splits.items() if source is not None}

    def answer(self, rank: Tensor, view: Tensor) -> tuple[Tensor, Outputs]:
        """Ids of rows, and the teacher's outputs for their views."""
        batch = self.source.fetch(self.positions[rank].tolist())
        assert batch.index is not None
        index, draws = batch.index, self.views.draw(batch, view)
        batch = self.views(batch.to(self.assembly.runtime.device), view, draws)
        with torch.no_grad(), self.assembly.runtime.autocast():
            return index, self.teacher.outputs(batch, self.taps, logits=self.keep_logits)

    def metrics(self) -> dict[str, SplitMetrics]:
        """The teacher's own on held-out rows: a run with the store has no model to measure."""
        options, found = self.assembly.recipe.evaluation, {}
        for split, source in self.held_out.items():
            values = evaluate(
                self.teacher.outputs,
                source,
                self.assembly.task,
                group_by=options.group_by,
                batch_size=options.batch_size,
                device=self.assembly.runtime.device,
            )
            found[split] = SplitMetrics(fingerprint=source.fingerprint, values=values)
        return found

    def metrics_unmeasured(self) -> dict[str, SplitMetrics]:
        """As `metrics`, with numbers that stand for those to come."""
        values = dict.fromkeys(self.assembly.task.default_metrics, 1 / 3)
        return {
            split: SplitMetrics(fingerprint=source.fingerprint, values=values)
            for split, source in self.held_out.items()
        }

    def trial(self) -> tuple[float, dict[str, float]]:
        """Rows a second of one process, its first batch left out (encoding is counted, the disk is not), and what the
        form loses on these rows."""
        layout, size = layout_of(self.plan), self.plan.batch_size
        meter = ErrorMeter(layout, self.plan.task)
        rows, seconds = 0, 0.0
        for number in range(1 + _TRIAL_BATCHES):
            places = torch.arange(number * size, (number + 1) * size) % self.plan.total
            rank, view = places % self.plan.data.rows, places // self.plan.data.rows
            started = time.perf_counter()
            index, outputs = self.answer(rank, view)
            columns = layout.encode(outputs, index, view)
            kept = {name: column.cpu() for name, column in columns.items()}
            taken = time.perf_counter() - started
            assert kept.keys() == layout.columns.keys()
            meter.update(outputs, columns)
            if number:
                rows, seconds = rows + size, seconds + taken
            if seconds > _TRIAL_SECONDS:
                break
        return rows / seconds, meter.result()

    def _plan(self) -> Plan:
        assembly, recipe = self.assembly, self.assembly.recipe
        cache = recipe.cache
        _, outputs = self.answer(torch.zeros(1, dtype=torch.int64), torch.zeros(1, dtype=torch.int64))
        shape = _logit_shape(outputs) if self.keep_logits else None
        _check_form(recipe, shape)
        plan = Plan(
            code=CODE,
            task=recipe.task,
            teacher=self._teacher_part(),
            spec=spec_part(self.teacher.spec, shape),
            data=DataPart(
                path=recipe.data.path,
                fingerprint=self.source.fingerprint,
                rows=len(self.ids),
                ids=tensor_digest(self.ids),
                tokens=tokens_part(assembly.data, recipe.data),
            ),
            views=ViewsPart(
                changes=tuple(view.model_dump(mode="json") for view in recipe.data.views),
                seed=self.views.seed if recipe.data.views else 0,
                number=views_drawn(recipe, assembly.method.needs.views, len(self.ids)),
            ),
            taps=self.taps,
            cache=FormPart(**cache.model_dump(include=set(FormPart.model_fields))),
            precision=recipe.train.precision,
            batch_size=cache.batch_size,
            shard_rows=cache.shard_rows or 1,
            made_by={
                "tutelage": version("tutelage"),
                "torch": torch.__version__,
                "device": assembly.runtime.device.type,
            },
        )
        rows = cache.shard_rows or max(1, min(_SHARD_ROWS, _SHARD_BYTES // layout_of(plan).row_bytes))
        return plan.model_copy(update={"shard_rows": rows})

    def _teacher_part(self) -> TeacherPart:
        model = self.assembly.teacher_models[self.name]
        weights = self.teacher.spec.fingerprint()
        assert weights is not None
        row = self.source.fetch([0]).to(self.assembly.runtime.device)
        view = self.views(row, torch.zeros(1, dtype=torch.int64))
        profile = profile_model(self.teacher.held.model, self.teacher.held.normalise(view.inputs))
        return TeacherPart(
            model=model.name,
            weights=weights,
            mean=model.live.mean,
            std=model.live.std,
            parameters=profile.parameters,
            flops=profile.flops,
            description=model.live.description,
        )


def _logit_shape(outputs: Outputs) -> tuple[int, ...]:
    """Of a row's logits, which need not be made for it."""
    if outputs.hidden is None or outputs.head is None:
        return tuple(outputs.logits.shape[1:])
    return (*outputs.hidden.shape[1:-1], len(outputs.head.weight))


def _check_rows(assembly: Assembly) -> None:
    """Rows that a store could not hold, or never all of."""
    if assembly.data.stream is not None:
        raise ValueError(
            "a stream has no last row, so its answers cannot all be stored; set data.stream=false"
        )
    if assembly.recipe.task == "token-classification":
        raise ValueError(
            "token-classification has an answer a token and rows of unequal lengths, and those of a store are alike; "
            "run the teacher beside the student"
        )
    if assembly.recipe.task == "language-model" and assembly.recipe.data.packing == "none":
        raise ValueError(
            "data.packing is none: its rows have unequal lengths, and those of a store are alike; set it to best_fit"
        )


def _choose(assembly: Assembly, teacher: str | None) -> str:
    """The name of the teacher whose outputs are stored."""
    known = ", ".join(assembly.teachers)
    if not assembly.teachers:
        raise ValueError("the recipe has no teacher whose outputs could be stored; give `teacher:`")
    if teacher is None and len(assembly.teachers) > 1:
        raise ValueError(f"the recipe has several teachers ({known}); choose one by --teacher")
    name = teacher or next(iter(assembly.teachers))
    if name not in assembly.teachers:
        raise ValueError(f"the recipe has no teacher {name!r}; there are {known}")
    if assembly.teacher_models[name].store is not None:
        raise ValueError(f"teacher {name!r} is a store already; give the model that it was made of")
    return name


def _taps(assembly: Assembly, name: str) -> tuple[str, ...]:
    """What the recipe's methods read of the teacher, and ``cache.taps``."""
    wanted: tuple[str, ...] = ()
    if isinstance(assembly.method, Method) and assembly.method.needs.teacher != "none":
        wanted = assembly.trainer(None).setup.taps.teachers.get(name, ())
    return assembly.teachers[name].spec.resolve((*wanted, *assembly.recipe.cache.taps))


def _check_taps(assembly: Assembly, taps: tuple[str, ...]) -> None:
    if taps and assembly.data.info.tokenizer is not None and not assembly.data.info.input_shape:
        raise ValueError(
            f"cache.taps (or the method) asks for {taps[0]}: features of texts of unequal lengths, and a store's rows "
            "are alike; keep logits alone, or run the teacher beside the student"
        )


def _check_form(recipe: Recipe, logits: tuple[int, ...] | None) -> None:
    cache = recipe.cache
    probabilities = cache.form in ("topk", "sampled") or cache.scale == "log_probs"
    if probabilities and recipe.task not in OF_PROBABILITIES:
        raise ValueError(
            f"cache.form {cache.form} (scale {cache.scale}) keeps probabilities over classes, which {recipe.task} does "
            "not have; use form dense with scale raw"
        )
    if cache.form == "topk" and logits is not None and cache.k is not None and cache.k > logits[-1]:
        raise ValueError(f"cache.k is {cache.k}, but the teacher has {logits[-1]} classes")


def _check_method(assembly: Assembly, name: str, plan: Plan) -> None:
    """A store that the recipe's own method could not learn from would be made in vain.

    Raises:
        PairingError: with every reason.
    """
    title = assembly.name
    setting = setting_of(assembly.recipe, assembly.data, assembly.runtime)
    reasons = check_pairing(title, assembly.method.needs, {name: offers_of(plan)}, setting)
    if reasons:
        reasons.append("so this store would not serve the recipe; with method=none it is made for other uses")
        raise PairingError("\n".join(reasons))
