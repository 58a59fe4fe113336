"""Sequence-level distillation: the teacher writes a text for each prompt, and the student learns those texts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from pydantic import Field

from tutelage.data.tokens import TokenSource
from tutelage.engine.generation import Generation, Prompt, check_prompts
from tutelage.engine.loop import Trainer
from tutelage.engine.method import Paper
from tutelage.engine.needs import Needs, PairingError
from tutelage.engine.types import Table
from tutelage.procedures.generate import prompts_of, write_texts, written_documents
from tutelage.procedures.procedure import Artifacts, Procedure
from tutelage.procedures.run import Run
from tutelage.procedures.text_data import write_text_data
from tutelage.recipe.config import MethodConfig
from tutelage.recipe.generation import GenerationConfig
from tutelage.teachers.local import LocalTeacher

_SHOWN = 8
"""Texts in the report."""
_DATA = "datasets/generated"


class SeqKDConfig(MethodConfig):
    """Options of seqkd; five beams are the paper's."""

    prompt_tokens: int = Field(
        8,
        ge=1,
        le=2**20,
        description="Raw text: first tokens of each document in a row that the teacher goes on from.",
    )
    generation: GenerationConfig = Field(
        GenerationConfig(beams=5), description="How the teacher writes: one text for each prompt."
    )


class SeqKD(Procedure):
    """Plain training on the teacher's text, which is written once."""

    Config = SeqKDConfig
    paper = Paper(
        title="Sequence-Level Knowledge Distillation",
        venue="EMNLP",
        year=2016,
        arxiv="1606.07947",
        claim="The text of a student of the teacher's text has a lower perplexity under the teacher than that of a "
        "student of the data.",
        card="llm_baselines",
        family="white-box LLM",
    )
    needs = Needs(logits=(), live=True, text=True, sharding="ddp", tasks=("language-model",))
    config: SeqKDConfig

    def check(self, run: Run) -> None:
        check_prompts(self._teacher(run).held, self._prompts(run), self.config.generation.max_new_tokens)

    def run(self, run: Run) -> Artifacts:
        """Let the teacher write, train the student, measure both. See `Procedure.run`."""
        teacher, prompts = self._teacher(run), self._prompts(run)
        answers = write_texts(run, "teacher", teacher, prompts, self.config.generation)
        kept = self._keep(run, prompts, answers)
        source = self._source(run, prompts, answers)
        trainer = self._train(run, source)
        student = trainer.finished()
        data = {"test": run.data.test, "validation": run.data.validation}
        theirs = {part: run.evaluate(teacher, rows) for part, rows in data.items()}
        ours = {part: run.evaluate(student, rows, teacher=teacher) for part, rows in data.items()}
        return Artifacts(
            student=student,
            metrics=ours["test"],
            tables=trainer.tables() | {"the teacher's text": self._shown(run, prompts, answers)},
            figures={
                "validation": ours["validation"],
                "teachers": {next(iter(run.teachers)): theirs},
                "train_seconds": run.trained_seconds,
                "texts": len(answers),
                "written_tokens": sum(len(answer.tokens) for answer in answers),
                "ended_share": sum(answer.ended for answer in answers) / len(answers),
                "student_rows": len(source),
            },
            datasets=kept,
        )

    def _teacher(self, run: Run) -> LocalTeacher:
        if len(run.teachers) != 1:
            raise PairingError(f"seqkd learns the text of one teacher; this recipe has {len(run.teachers)}")
        teacher = next(iter(run.teachers.values()))
        if not isinstance(teacher, LocalTeacher):
            raise PairingError("seqkd's teacher writes text, so it must be a model in this process")
        return teacher

    def _prompts(self, run: Run) -> list[Prompt]:
        if run.data.stream is not None or not isinstance(run.data.train, TokenSource):
            raise PairingError(
                "seqkd has its prompts from training rows of text that are all at hand; leave data.stream out"
            )
        found = prompts_of(run.data.train, self.config.prompt_tokens)
        if not found:
            raise ValueError(
                "no document of a training row gives a prompt: raw text needs two tokens, chats and completions "
                "something before what is learnt; give such documents"
            )
        return found

    def _source(self, run: Run, prompts: Sequence[Prompt], answers: Sequence[Generation]) -> TokenSource:
        """Prompts and answers as documents, packed as the recipe says. Of raw text all counts, as in any text; else
        what the teacher wrote."""
        train, config = run.data.train, run.recipe.data
        assert isinstance(train, TokenSource)
        assert run.data.info.tokenizer is not None
        documents = written_documents(prompts, answers)
        return TokenSource(
            documents if train.documents.counted is not None else replace(documents, counted=None),
            run.data.info.tokenizer,
            max_length=config.max_length,
            packing=config.packing,
        )

    def _train(self, run: Run, source: TokenSource) -> Trainer:
        return run.train(
            "student",
            run.new_student(run.data.info.outputs),
            run.method("none"),
            source,
            config={"batch_size": min(run.recipe.train.batch_size, len(source))},
            validation=run.validation(),
        )

    def _keep(self, run: Run, prompts: Sequence[Prompt], answers: Sequence[Generation]) -> dict[str, str]:
        """Leave the texts as a data set in the run's folder."""
        if run.folder is None:
            return {}
        columns = self._columns(run, prompts, answers)
        folder = run.folder / _DATA
        run.runtime.on_main(lambda: write_text_data(folder, dict.fromkeys(columns, str), [columns]))
        return {"generated": _DATA}

    def _columns(
        self, run: Run, prompts: Sequence[Prompt], answers: Sequence[Generation]
    ) -> dict[str, list[str]]:
        """Prompts, completions and both together, without the tokens that a tokeniser puts around a text."""
        tokenizer = run.data.info.tokenizer
        assert tokenizer is not None
        begin = tokenizer.fast.bos_token_id
        before = [prompt.tokens[prompt.tokens[0] == begin :] for prompt in prompts]
        after = [answer.tokens[: len(answer.tokens) - answer.ended] for answer in answers]
        pairs = list(zip(before, after, strict=True))
        return {
            "prompt": [tokenizer.decode(given) for given, _ in pairs],
            "completion": [tokenizer.decode(written) for _, written in pairs],
            "text": [tokenizer.decode([*given, *written]) for given, written in pairs],
        }

    def _shown(self, run: Run, prompts: Sequence[Prompt], answers: Sequence[Generation]) -> Table:
        """The first texts."""
        columns = self._columns(run, prompts[:_SHOWN], answers[:_SHOWN])
        rows: list[list[Any]] = [
            [*texts, len(answer.tokens), answer.ended]
            for *texts, answer in zip(columns["prompt"], columns["completion"], answers[:_SHOWN], strict=True)
        ]
        return Table(["prompt", "what the teacher wrote", "tokens", "ended"], rows)
