"""DDK as a method: the loss of plain distillation, and a mixture of domains that follows the student's gaps."""

from __future__ import annotations

import dataclasses
import warnings
from typing import TYPE_CHECKING, Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from tutelage.engine.method import Method, Paper
from tutelage.engine.needs import Needs
from tutelage.engine.rng import derive_seed
from tutelage.engine.step import frozen_outputs
from tutelage.engine.types import Batch, Outputs, Plot, Table, Terms
from tutelage.methods.ddk.functional import ddk_initial_factor, ddk_update_factor
from tutelage.methods.ddk.held_out import held_out_rows, perplexities
from tutelage.methods.ddk.mixture import Mixture, rows_by_domain
from tutelage.recipe.config import MethodConfig, Range
from tutelage.tasks.token_losses import divergence_terms
from tutelage.teachers.store import StoredTeacher

if TYPE_CHECKING:
    from tutelage.engine.passes import TrainingRows
    from tutelage.engine.step import Step
    from tutelage.recipe.schema import TrainConfig


class DDKConfig(MethodConfig):
    """Options of ddk; defaults are the paper's, ``gamma`` and ``ratio_clip`` ours."""

    domain: str = Field(
        "domain", min_length=1, description="Column that names each row's domain; data.columns names it too."
    )
    interval: int = Field(
        1000, ge=1, description="Steps between changes of the mixture; an epoch of the run."
    )
    alpha: float = Field(
        0.5, ge=0, le=1, description="Share of the mixture that follows the gaps; the rest is spread evenly."
    )
    history: bool = Field(
        True, description="Multiply by the share before; false: the present gaps alone decide."
    )
    gamma: float = Field(1.0, ge=0, description="Weight of the divergence; the label loss has weight 1.")
    temperature: float = Field(1.0, gt=0, le=1000, description="Softens both sides; its square is no factor.")
    first_interval: Literal["random", "factor"] = Field(
        "random", description="The first mixture: by the domains' sizes, or by the untrained student's gaps."
    )
    valid_samples: int = Field(500, ge=1, description="Most validation rows of a domain that are looked at.")
    max_intervals: int | None = Field(
        None, ge=1, description="End after so many; left out: with the recipe's steps."
    )
    stop_gap: float | None = Field(
        None, ge=0, le=1, description="End where the largest and smallest share differ by no more."
    )
    ratio_clip: float = Field(
        20.0,
        ge=1,
        le=500,
        description="Largest ratio of perplexities, so that no exploded domain takes all rows.",
    )
    fused: bool = Field(
        True, description="From hidden states and heads, chunk by chunk; false: from logits, made whole."
    )

    @classmethod
    def search(cls) -> dict[str, Range]:
        return super().search() | {"gamma": Range.around(1.0)}


class DDK(Method):
    """Labels and the forward KL from the teacher, on rows whose domains are drawn by how much higher the student's
    perplexity is than the teacher's. Domains are measured anew on validation rows at every interval's end; all ranks
    draw by the same shares."""

    Config = DDKConfig
    paper = Paper(
        title="DDK: Distilling Domain Knowledge for Efficient Large Language Models",
        venue="NeurIPS",
        year=2024,
        arxiv="2407.16154",
        claim="Drawing more of the domains in which the student is furthest from the teacher makes it better there, "
        "and no worse on average than a fixed mixture.",
        card="ddk",
        family="white-box LLM",
    )
    needs = Needs(
        logits=("dense", "topk", "sampled"),
        scale="log_probs",
        fields=("target",),
        loaders=("validation",),
        tasks=("language-model",),
    )
    config: DDKConfig

    def __init__(self, config: DDKConfig) -> None:
        super().__init__(config)
        self.needs = dataclasses.replace(self.needs, fields=("target", config.domain))  # type: ignore[misc]
        self.names: list[str] = []
        self.parts: dict[str, TrainingRows] = {}
        self.teacher_perplexity: Tensor | None = None
        self.history: list[dict[str, Any]] = []
        """The mixture of each interval: from which step on, shares, ratios that led to them, which were clipped."""

    def sampler(self, source: Any, train: TrainConfig) -> Mixture:
        config = self.config
        domains = rows_by_domain(source, config.domain)
        self.names, self.parts = list(domains), {}
        if config.alpha == 1 and config.history:
            warnings.warn(
                "ddk: method.alpha is 1, so a domain whose share has come to 0 stays without rows for ever; lower it",
                stacklevel=2,
            )
        if train.steps is not None and train.steps <= config.interval:
            warnings.warn(
                f"ddk: train.steps is {train.steps} and method.interval {config.interval}, so the mixture never "
                "changes",
                stacklevel=2,
            )
        self.mixture = Mixture(domains, config.interval * train.batch_size, derive_seed(train.seed, "ddk"))
        return self.mixture

    def prepare(self, data: TrainingRows, student: nn.Module, teacher: Any) -> None:
        """Measure both models on every domain; what the teacher gives is kept.

        Raises:
            ValueError: a domain without validation rows, a perplexity that is not finite, or a store that lacks them.
        """
        held_out = data.rows("validation")
        parts = self._parts(held_out)
        self.teacher_perplexity = (
            self._stored(teacher, held_out)
            if isinstance(teacher, StoredTeacher)
            else perplexities("teacher", teacher.outputs, parts)
        )

        def predict(batch: Batch) -> Outputs:
            return frozen_outputs(student, batch.inputs)  # type: ignore[arg-type]

        measured, clipped = self._clipped(perplexities("student", predict, parts))
        if self.config.first_interval == "factor":
            self.mixture.factor = _agreed(
                ddk_initial_factor(measured, self.teacher_perplexity), held_out.runtime
            )
        self._note(0, measured / self.teacher_perplexity, clipped)

    def objective(self, student: Outputs, teacher: Outputs | None, batch: Batch, ctx: Step) -> Terms:
        assert teacher is not None
        self._parts(ctx.rows("validation"))  # so that a dry step refuses domains that cannot be measured
        config = self.config
        return divergence_terms(
            "forward_kl",
            student,
            teacher,
            batch,
            ctx,
            label_weight=1.0,
            loss_weight=config.gamma,
            temperature=config.temperature,
            fused=config.fused,
            alone=self.alone,
        )

    def after_step(self, ctx: Step) -> None:
        """At an interval's end: measure the student, and draw the next interval by the gaps."""
        if (ctx.step + 1) % ctx.steps_per_epoch:
            return
        assert self.teacher_perplexity is not None
        measured, clipped = self._clipped(self._of_student(ctx))
        before = self.mixture.factor
        factor = ddk_update_factor(
            before if self.config.history else torch.full_like(before, 1 / len(before)),
            measured,
            self.teacher_perplexity,
            alpha=self.config.alpha,
        )
        self.mixture.advance(_agreed(factor, ctx.data.runtime))
        self._note(ctx.step + 1, measured / self.teacher_perplexity, clipped)

    @property
    def ended(self) -> bool:
        """After ``max_intervals``, or once the shares hardly differ."""
        done, config = self.mixture.interval, self.config
        if config.max_intervals is not None and done >= config.max_intervals:
            return True
        if not done or config.stop_gap is None:
            return False
        return float(self.mixture.factor.max() - self.mixture.factor.min()) <= config.stop_gap

    def tables(self) -> dict[str, Table]:
        """The mixture and the ratios that led to it, interval by interval."""
        names = tuple(self.names)
        plots = (Plot("interval", names),)
        shares = [[i, row["step"], *row["shares"]] for i, row in enumerate(self.history)]
        ratios = [
            [i, row["step"], *row["ratios"], ", ".join(row["clipped"])] for i, row in enumerate(self.history)
        ]
        return {
            "domain mixture": Table(["interval", "step", *names], shares, plots),
            "domain gaps": Table(["interval", "step", *names, "clipped"], ratios, plots),
        }

    def measure(self, ctx: Step) -> dict[str, Table]:
        """How often each domain was read, and how far the trained student is from the teacher there."""
        assert self.teacher_perplexity is not None
        student = self._of_student(ctx)
        steps = ctx.step - self.mixture.interval * ctx.steps_per_epoch
        read = self.mixture.read_after(steps * self.mixture.length // ctx.steps_per_epoch)
        columns = (self.mixture.sizes, read, read / self.mixture.sizes, self.teacher_perplexity, student)
        rows = [
            [name, *values]
            for name, *values in zip(
                self.names,
                *(part.tolist() for part in (*columns, student / self.teacher_perplexity)),
                strict=True,
            )
        ]
        titles = ["domain", "rows", "read", "epochs", "teacher perplexity", "student perplexity", "ratio"]
        return {"domains": Table(titles, rows)}

    def get_extra_state(self) -> dict[str, Any]:
        teacher = None if self.teacher_perplexity is None else self.teacher_perplexity.tolist()
        return {"teacher_perplexity": teacher, "history": self.history}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        teacher = state["teacher_perplexity"]
        self.teacher_perplexity = None if teacher is None else torch.tensor(teacher, dtype=torch.float64)
        self.history = list(state["history"])

    def _parts(self, rows: TrainingRows) -> dict[str, TrainingRows]:
        if not self.parts:
            self.parts = held_out_rows(rows, self.config.domain, self.names, self.config.valid_samples)
        return self.parts

    def _of_student(self, ctx: Step) -> Tensor:
        def predict(batch: Batch) -> Outputs:
            return ctx.student(batch, (), frozen=True)

        return perplexities("student", predict, self._parts(ctx.rows("validation")))

    def _stored(self, teacher: StoredTeacher, rows: TrainingRows) -> Tensor:
        """What was measured when the store was made, on all validation rows."""
        domain = self.config.domain
        known = teacher.store.metrics("validation", rows.fingerprint)
        found = [known.get(f"perplexity[{domain}={name}]") for name in self.names]
        if None in found:
            missing = self.names[found.index(None)]
            raise ValueError(
                f"ddk needs the teacher's perplexity on the validation rows of domain {missing!r}, and the store has "
                f"none; make it anew with evaluation.group_by: {domain} and these validation rows, or give a live "
                "teacher"
            )
        return torch.tensor(found, dtype=torch.float64)

    def _clipped(self, student: Tensor) -> tuple[Tensor, list[str]]:
        """The student's perplexities, at most ``ratio_clip`` times the teacher's, and the domains that were cut."""
        assert self.teacher_perplexity is not None
        most = self.config.ratio_clip * self.teacher_perplexity
        return student.minimum(most), [
            name for name, over in zip(self.names, (student > most).tolist(), strict=True) if over
        ]

    def _note(self, step: int, ratios: Tensor, clipped: list[str]) -> None:
        shares = self.mixture.factor.tolist()
        self.history.append({"step": step, "shares": shares, "ratios": ratios.tolist(), "clipped": clipped})
        if clipped and not any(row["clipped"] for row in self.history[:-1]):
            warnings.warn(
                f"ddk: at step {step} the student's perplexity on {', '.join(clipped)} is more than "
                f"{self.config.ratio_clip:g} times the teacher's (method.ratio_clip), and counts as so much",
                stacklevel=2,
            )


def _agreed(factor: Tensor, runtime: Any) -> Tensor:
    """The shares as rank 0 has them, to the last bit: all ranks must draw the same rows."""
    return torch.tensor(runtime.broadcast_object(factor.tolist()), dtype=torch.float64)
