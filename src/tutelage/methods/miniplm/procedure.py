"""MiniPLM as a procedure: reference model, scores of both models, refined corpus, plain training on it."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from tutelage.data import TokenSource, load_tokenizer, subset, vocabulary_difference
from tutelage.engine.loading import Source
from tutelage.engine.loop import Trainer
from tutelage.engine.method import Paper
from tutelage.engine.needs import Needs, PairingError
from tutelage.engine.types import Table
from tutelage.methods.miniplm.functional import difference_sampling, difference_score
from tutelage.methods.miniplm.refined import SHARES, kept_by_column, quantiles, write_corpus
from tutelage.models import load_model
from tutelage.models.language_head import check_packing, language_head
from tutelage.procedures.procedure import Artifacts, Procedure
from tutelage.procedures.run import Run
from tutelage.procedures.scoring import Scores, check_scores, counted_rows, score_rows
from tutelage.recipe.config import MethodConfig
from tutelage.recipe.schema import ModelConfig
from tutelage.teachers.local import LocalTeacher

_DATA = "datasets/refined"


class MiniPLMConfig(MethodConfig):
    """Options of miniplm; defaults are the paper's and its code's."""

    ratio: float = Field(0.5, gt=0, le=1, description="Share of the corpus' rows that is kept.")
    normalise: bool = Field(
        True,
        description="Scores are means over a row's tokens; false: their sums, by which long rows rank higher.",
    )
    score: Literal["difference", "reference", "teacher"] = Field(
        "difference",
        description="What is kept: rows that the teacher finds easier than the reference does; or, for comparison, "
        "those that are hardest for the reference, or easiest for the teacher.",
    )
    reference: ModelConfig | str | None = Field(
        None,
        description="The small model that the teacher is held against: to be trained, as `student` is written; or the "
        "folder of a finished run. Left out: one like the student.",
    )
    reference_share: float = Field(
        0.05, gt=0, le=1, description="Share of the corpus' rows that the reference is trained on."
    )
    reference_steps: int | None = Field(
        None, ge=1, description="Steps of the reference's training; left out: as many as the student's."
    )
    score_batch_size: int = Field(32, ge=1, le=2**16, description="Rows that are scored at once.")
    scores: str | None = Field(
        None,
        min_length=1,
        description="Folder of both models' scores, for several runs: what is there is not scored again. It needs "
        "`reference: FOLDER`, since a reference that is trained anew has other scores. Left out: the run's own.",
    )


class MiniPLM(Procedure):
    """The teacher reads the corpus once and no more: rows that it finds much easier than a small reference does are
    kept, and the student trains on these by labels alone."""

    Config = MiniPLMConfig
    paper = Paper(
        title="MiniPLM: Knowledge Distillation for Pre-Training Language Models",
        venue="ICLR",
        year=2025,
        arxiv="2410.17215",
        claim="A student of the difference-sampled half of a corpus reaches a lower held-out loss than one of a random "
        "half, with a teacher that costs nothing while it trains.",
        card="miniplm",
        family="pre-training LLM",
    )
    needs = Needs(scale="log_probs", live=True, fields=("target", "index"), tasks=("language-model",))
    missing = (
        "vanilla KD under a name of its own: `fkl` with both weights 0.5 is its loss, a mean over tokens",
    )
    config: MiniPLMConfig

    def check(self, run: Run) -> None:
        _teacher(run)
        source = _corpus(run)
        if int(self.config.ratio * len(source)) == 0:
            raise ValueError(
                f"method.ratio is {self.config.ratio}, which keeps none of {len(source)} rows; raise it"
            )
        if self.config.scores is not None and not isinstance(self.config.reference, str):
            raise ValueError(
                f"method.scores is {self.config.scores!r}, which runs share, but every run would train a reference of "
                "its own; set method.reference to the folder of a finished run, or leave method.scores out"
            )
        # The teacher's scores are looked at in `run`: here its weights may be random.
        self._check_scores(run, self._new_reference(run), source)

    def run(self, run: Run) -> Artifacts:
        """See `Procedure.run`."""
        source, teacher = _corpus(run), _teacher(run)
        reference = self._reference(run, source)
        for model in (teacher, reference):
            self._check_scores(run, model, source)
        scores = {model.spec.name: self._scores(run, model, source) for model in (teacher, reference)}
        theirs = {
            part: run.evaluate(teacher, rows)
            for part, rows in {"test": run.data.test, "validation": run.data.validation}.items()
        }
        # What trains next needs no teacher: its place on the device is free.
        teacher.held.cpu()
        nll = {name: found.per_row(normalise=self.config.normalise) for name, found in scores.items()}
        score = self._score(nll[teacher.spec.name], nll[reference.spec.name])
        kept = difference_sampling(score, self.config.ratio)
        columns = {"score": score} | {f"{name}_nll": values for name, values in nll.items()}
        datasets = self._refined(run, source, kept, columns)
        trained = self._student(run, subset(source, kept))
        student = trained.finished()
        spent = trained.step * trained.loader.batch_size
        return Artifacts(
            student=student,
            metrics=run.evaluate(student, run.data.test),
            tables=trained.tables()
            | _score_tables(source, kept, columns)
            | {"teacher cost": _cost(scores, spent)},
            figures={
                "validation": run.evaluate(student, run.data.validation),
                "teachers": {teacher.spec.name: theirs},
                "train_seconds": run.trained_seconds,
                "steps": trained.step,
                "epochs": trained.step / trained.loader.steps_per_epoch,
                "rows_kept": len(kept),
                "rows_without_score": len(run.data.train) - len(source),
            },
            datasets=datasets,
        )

    def _new_reference(self, run: Run) -> LocalTeacher:
        """The reference model, with random weights or those of its folder."""
        given = self.config.reference
        if isinstance(given, str):
            return _held(run, _loaded(run, Path(given).expanduser()))
        return _held(run, run.new_model(given or run.recipe.student, "reference"))

    def _reference(self, run: Run, source: TokenSource) -> LocalTeacher:
        """It, trained on a random share of the corpus where it is new."""
        reference = self._new_reference(run)
        if isinstance(self.config.reference, str):
            return reference
        order = torch.randperm(len(source), generator=run.generator("reference rows"))
        rows = subset(source, order[: max(1, int(self.config.reference_share * len(source)))].sort().values)
        changes: dict[str, Any] = {"batch_size": _batch_size(run, rows)}
        if self.config.reference_steps is not None:
            changes |= {"steps": self.config.reference_steps, "epochs": None}
        trained = run.train(
            "reference",
            reference.held.model,
            run.method("none"),
            rows,
            config=changes | {"ema": None, "early_stop": None},
            normalised_as=reference.held,
        )
        return _held(run, trained.finished())

    def _scores(self, run: Run, model: LocalTeacher, source: TokenSource) -> Scores:
        place = None if run.folder is None else self._shared(model) or run.folder / "scores" / _role(model)
        return score_rows(run, model.freeze(), source, place, batch_size=self.config.score_batch_size)

    def _check_scores(self, run: Run, model: LocalTeacher, source: TokenSource) -> None:
        """Refuse a shared folder that holds scores of something else."""
        place = self._shared(model)
        if place is not None:
            check_scores(run, model, source, place, batch_size=self.config.score_batch_size)

    def _shared(self, model: LocalTeacher) -> Path | None:
        """Where the scores of a model lie that several runs share."""
        if self.config.scores is None:
            return None
        return Path(self.config.scores).expanduser() / _role(model)

    def _score(self, teacher: Tensor, reference: Tensor) -> Tensor:
        if self.config.score == "difference":
            return difference_score(teacher, reference)
        return reference if self.config.score == "reference" else -teacher

    def _refined(
        self, run: Run, source: TokenSource, kept: Tensor, columns: dict[str, Tensor]
    ) -> dict[str, str]:
        """The refined corpus, written once."""
        if run.folder is None:
            return {}
        folder, tokenizer = run.folder / _DATA, run.data.info.tokenizer
        assert tokenizer is not None
        about = {
            "ratio": self.config.ratio,
            "score": self.config.score,
            "corpus": source.fingerprint,
            "tokenizer": tokenizer.fingerprint,
        }
        run.runtime.on_main(lambda: write_corpus(folder, source, tokenizer, kept, columns, about))
        return {"refined": _DATA}

    def _student(self, run: Run, rows: Source) -> Trainer:
        return run.train(
            "student",
            run.new_student(run.data.info.outputs),
            run.method("none"),
            rows,
            config={"batch_size": _batch_size(run, rows)},
            validation=run.validation(),
        )


def _role(model: LocalTeacher) -> str:
    return "reference" if model.spec.name == "reference" else "teacher"


def _teacher(run: Run) -> LocalTeacher:
    if len(run.teachers) != 1:
        raise PairingError(f"miniplm scores by one teacher; this recipe has {len(run.teachers)}")
    teacher = next(iter(run.teachers.values()))
    if not isinstance(teacher, LocalTeacher):
        raise PairingError(
            "miniplm scores the corpus by its teacher, so it needs a live model, not stored answers"
        )
    if teacher.spec.name == "reference":
        raise PairingError("the teacher is named `reference`, as the small model is; give it another name")
    return teacher


def _corpus(run: Run) -> TokenSource:
    """The training rows that can have a score.

    Raises:
        PairingError: they are a stream, chats, or no packed text.
        ValueError: none can have one.
    """
    data, config = run.data, run.recipe.data
    if data.stream is not None:
        raise PairingError(
            "miniplm ranks all rows of a corpus, which a stream never has at once; set data.stream=false"
        )
    if config.messages is not None or config.prompt is not None:
        raise PairingError(
            "miniplm refines raw text, and its refined corpus would not say which tokens of a chat are learnt; give "
            "data.text"
        )
    if not isinstance(data.train, TokenSource):
        raise PairingError(
            f"miniplm refines packed text; the training rows are a {type(data.train).__name__}"
        )
    return counted_rows(data.train)


def _loaded(run: Run, folder: Path) -> nn.Module:
    """The model of a finished run.

    Raises:
        ValueError: there is none, or it has another vocabulary.
    """
    place = folder / "student" if (folder / "student").is_dir() else folder
    if not place.is_dir():
        raise ValueError(f"method.reference: there is no folder {str(folder)!r}; give that of a finished run")
    tokenizer = run.data.info.tokenizer
    assert tokenizer is not None
    differs = vocabulary_difference(tokenizer, load_tokenizer(str(place)))
    if differs is not None:
        raise PairingError(
            f"method.reference {str(folder)!r} has another vocabulary than the rows' tokeniser: {differs}. Its scores "
            "cannot be held against the teacher's; give a model of this tokeniser"
        )
    return load_model(place).module


def _held(run: Run, module: nn.Module) -> LocalTeacher:
    """A model as what is scored by."""
    module.to(run.runtime.device)
    example = run.data.train.fetch([0, 0]).to(run.runtime.device)
    head = language_head("the reference", module, run.data.info.outputs, example.inputs)
    if run.recipe.data.packing != "none":
        check_packing("the reference", module, example.inputs)
    return LocalTeacher("reference", module, example.inputs, head=head)


def _batch_size(run: Run, rows: Source) -> int:
    return min(run.recipe.train.batch_size, len(rows))


def _score_tables(source: TokenSource, kept: Tensor, columns: dict[str, Tensor]) -> dict[str, Table]:
    score = columns["score"]
    dropped = torch.ones(len(score), dtype=torch.bool)
    dropped[kept] = False
    compared = columns | {"score of kept rows": score[kept], "score of dropped rows": score[dropped]}
    titles = ["value", "rows", *(f"{share:.0%}" for share in SHARES)]
    tables = {"scores": Table(titles, quantiles(compared))}
    by_column = kept_by_column(source, kept, score)
    if by_column:
        titles = ["column", "value", "rows", "kept", "share kept", "mean score"]
        tables["kept by column"] = Table(titles, by_column)
    return tables


def _cost(scores: dict[str, Scores], spent: int) -> Table:
    """What was run of each model beside the student's own training, in which there is no teacher."""
    rows = [
        [f"scoring by {name}", len(found.ids), int(found.tokens.sum()), found.seconds]
        for name, found in scores.items()
    ]
    return Table(
        ["stage", "rows", "tokens by a teacher or reference", "seconds"],
        [*rows, ["training of the student", spent, 0, 0.0]],
    )
