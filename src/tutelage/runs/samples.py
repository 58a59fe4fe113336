"""What a language model's student and teacher write after held-out prompts, and what is measured by it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from tutelage.data.tokenizer import Tokenizer
from tutelage.data.tokens import TokenSource
from tutelage.engine.evaluate import evaluate
from tutelage.engine.generation import Generation, GenerationError, Prompt, generate
from tutelage.engine.taps import Tapped
from tutelage.procedures.generate import prompts_of, written_documents
from tutelage.recipe.generation import GenerationConfig
from tutelage.runs.assemble import Assembly
from tutelage.runs.drafting import NoDraftsError, measure_drafting
from tutelage.runs.measured import held_student
from tutelage.teachers.local import LocalTeacher

_SEED = 0
"""The same for every run, so that students are compared by the same draws."""
_MOST_NEW, _MOST_GIVEN = 128, 32
"""Tokens that are written, and that are given of raw text."""
_SHOWN, _DRAFTED = 16, 4
"""Prompts in the report's table, and those whose text is timed."""
_BATCH = 64


def add_samples(result: dict[str, Any], assembly: Assembly, student: nn.Module) -> None:
    """Text after ``evaluation.samples`` held-out prompts, drawn at temperature 1 from a seed that is the same for all
    runs: a table with both models' texts, and metrics of the held-out split:

    - ``sample_perplexity``: the exponential of the teacher's mean negative log-likelihood, in nats, of a token that the
      student wrote; the prompt is given and not counted.
    - ``draft_speedup``: see `measure_drafting`; timed where a report is written.

    Where one of them cannot be had the table ``not measured`` says why. Rank 0 alone calls it.
    """
    if not assembly.recipe.evaluation.samples:
        return
    split = "validation" if assembly.data.test is None else "test"
    held = held_student(assembly, student)
    with assembly.runtime.autocast():
        found = _Samples(assembly, split, held)
        found.write()
    result[split] = (result[split] or {}) | found.metrics
    result["tables"] |= found.tables
    if found.missing:
        rows = [[what, why] for what, why in found.missing.items()]
        result["tables"]["not measured"] = _table(["what", "why"], rows)


class _Samples:
    """Metrics, tables and reasons for what is not there, of one run."""

    def __init__(self, assembly: Assembly, split: str, student: Tapped) -> None:
        self.assembly, self.student = assembly, student
        source, tokenizer = getattr(assembly.data, split), assembly.data.info.tokenizer
        assert isinstance(source, TokenSource)
        assert tokenizer is not None
        self.source: TokenSource = source
        self.tokenizer: Tokenizer = tokenizer
        self.teacher = next(iter(assembly.whole_teachers.values()), None)
        self.metrics: dict[str, float] = {}
        self.tables: dict[str, Any] = {}
        self.missing: dict[str, str] = {}

    def write(self) -> None:
        prompts = held_out_prompts(self.source, self.assembly.recipe.evaluation.samples)
        if not prompts:
            self.missing["samples"] = "no held-out row leaves room to go on from what is given"
            return
        room = self.source.layout.max_length - max(len(prompt.tokens) for prompt in prompts)
        options = GenerationConfig(
            max_new_tokens=min(_MOST_NEW, room), do_sample=True, batch_size=min(_BATCH, len(prompts))
        )
        try:
            ours = generate(self.student, prompts, options, _SEED)
        except GenerationError as error:
            self.missing["samples"] = str(error)
            return
        shown = prompts[:_SHOWN]
        theirs = self._teachers_texts(shown, options)
        self.tables["samples"] = self._side_by_side(shown, ours, theirs)
        if self.teacher is None:
            shared = self.assembly.live_teachers
            reason = "processes share the teacher" if shared else "there is no teacher that is a model"
            self.missing["sample_perplexity, draft_speedup"] = reason
            return
        self.metrics["sample_perplexity"] = self._perplexity(self.teacher, prompts, ours)
        if self.assembly.recipe.output.report:
            self._time_drafts(self.teacher, prompts[:_DRAFTED], options.max_new_tokens)

    def _teachers_texts(self, prompts: Sequence[Prompt], options: GenerationConfig) -> list[Generation]:
        """None where it writes nothing."""
        if self.teacher is None:
            return []
        try:
            return self.teacher.generate(prompts, options, _SEED)
        except GenerationError as error:
            self.missing["the teacher's text"] = str(error)
            return []

    def _side_by_side(
        self, prompts: Sequence[Prompt], ours: Sequence[Generation], theirs: Sequence[Generation]
    ) -> dict[str, Any]:
        columns = [
            [self.tokenizer.decode(prompt.tokens) for prompt in prompts],
            [self.tokenizer.decode(_rest(self.source, prompt)) for prompt in prompts],
            [self.tokenizer.decode(answer.tokens) for answer in ours[: len(prompts)]],
        ]
        columns += [[self.tokenizer.decode(answer.tokens) for answer in theirs]] if theirs else []
        names = ["prompt", "the data goes on", "the student writes", "the teacher writes"]
        return _table(names[: len(columns)], [list(row) for row in zip(*columns, strict=True)])

    def _perplexity(
        self, teacher: LocalTeacher, prompts: Sequence[Prompt], answers: Sequence[Generation]
    ) -> float:
        documents = written_documents(prompts, answers)
        longest = int(documents.lengths.max())
        rows = TokenSource(documents, self.tokenizer, max_length=longest, packing="none")
        found = evaluate(
            teacher.outputs,
            rows,
            self.assembly.task,
            names=("perplexity",),
            batch_size=self.assembly.recipe.evaluation.batch_size,
            device=self.assembly.runtime.device,
        )
        return found["perplexity"]

    def _time_drafts(self, teacher: LocalTeacher, prompts: Sequence[Prompt], max_new_tokens: int) -> None:
        try:
            found = measure_drafting(teacher.held, self.student, prompts, max_new_tokens)
        except (NoDraftsError, GenerationError) as error:
            self.missing["draft_speedup"] = str(error)
            return
        self.metrics["draft_speedup"] = found.speedup
        columns = ["tokens a second alone", "tokens a second with drafts", "speed-up", "share of drafts kept"]
        self.tables["the student as a draft model"] = _table(
            columns, [[found.alone, found.drafted, found.speedup, found.accepted]]
        )


def held_out_prompts(source: TokenSource, count: int) -> list[Prompt]:
    """At most ``count`` prompts, spread evenly over the rows: of raw text a quarter of a row, of other rows what stands
    before what is learnt, where that leaves a quarter of the row free."""
    length = source.layout.max_length
    given = prompts_of(source, min(max(length // 4, 1), _MOST_GIVEN))
    fitting = [prompt for prompt in given if len(prompt.tokens) <= length - max(length // 4, 1)]
    places = torch.linspace(0, len(fitting) - 1, min(count, len(fitting))).round().long().tolist()
    return [fitting[place] for place in places]


def _rest(source: TokenSource, prompt: Prompt) -> list[int]:
    """What follows a prompt in its row."""
    layout = source.layout
    start = source.documents.offsets[layout.document[prompt.id]] + layout.start[prompt.id]
    end = start + min(int(layout.length[prompt.id]), len(prompt.tokens) + _MOST_NEW)
    rest: list[int] = source.documents.tokens[start + len(prompt.tokens) : end].tolist()
    return rest


def _table(columns: list[str], rows: list[list[Any]]) -> dict[str, Any]:
    return {"columns": columns, "rows": rows, "plots": []}
