"""`Method`: one published way to distil, as the trainer sees it. A method's folder holds a subclass and its Config."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from torch import Tensor, nn

from tutelage.engine.needs import Needs
from tutelage.engine.types import Batch, Outputs, Table, Taps, Terms
from tutelage.recipe.config import MethodConfig
from tutelage.recipe.schema import OptimizerConfig, ScheduleConfig, TrainConfig

if TYPE_CHECKING:
    from tutelage.engine.loading import Sampler
    from tutelage.engine.spec import ModelSpec
    from tutelage.engine.step import Step

Kind = Literal["Method", "Procedure"]


@dataclass(frozen=True)
class Paper:
    """Where a method comes from. Catalogue, docs, citation and report are made from it."""

    title: str
    venue: str | None
    """None, and no year, where there is no paper."""
    year: int | None
    arxiv: str | None
    claim: str
    """The published claim in one sentence."""
    card: str
    """File name of the method's card, without its ending."""
    family: str


@dataclass(frozen=True)
class OptimSpec:
    """One optimiser: the parameters whose names match a pattern, and options (none: the recipe's own).

    Names are those of the trained whole: ``student.<path>``, ``method.<path>``, ``teachers.<name>.<path>``; patterns
    are ``fnmatch``'s. The first spec that matches a parameter owns it.
    """

    patterns: tuple[str, ...]
    optimizer: OptimizerConfig | None = None
    schedule: ScheduleConfig | None = None


class Method(nn.Module):
    """Base of every method that is one training loop.

    What it trains or must keep (projectors, heads, prototypes, memory banks, counters) are its parameters and buffers:
    so they are optimised, checkpointed and sharded with the student, and never ship with it. Further state that is no
    tensor goes through ``get_extra_state``/``set_extra_state`` (plain JSON values).
    """

    Config: ClassVar[type[MethodConfig]]
    paper: ClassVar[Paper]
    needs: ClassVar[Needs] = Needs()
    kind: ClassVar[Kind] = "Method"
    missing: ClassVar[tuple[str, ...]] = ()
    """Parts of the card that are not built; shown in the status table."""
    alone = True
    """Whether no other method shares its steps: only then may a term hold the gradient of the label loss too."""

    def __init__(self, config: MethodConfig) -> None:
        super().__init__()
        self.config: Any = config

    def forward(self, ctx: Step) -> Terms:
        return self.step(ctx)

    def taps(self, teacher: ModelSpec | None, student: ModelSpec) -> Taps:
        """Which inner tensors are wanted. Default: none, logits only."""
        return Taps()

    def build(self, teacher: ModelSpec | None, student: ModelSpec, example: Batch) -> None:
        """Make what the method trains, from the shapes that the specs give. ``example`` is two real rows."""

    def prepare(self, data: Any, student: nn.Module, teacher: Any) -> None:
        """Passes over the data before step 0 (class means, scores). What it finds must be state: it runs once.

        ``data`` is the run's `tutelage.engine.passes.TrainingRows`, ``student`` its `Tapped`; ``teacher`` the first
        `Teacher`.
        """

    def sampler(self, source: Any, train: TrainConfig) -> Sampler | None:
        """Which rows, how often. None: every row once an epoch, shuffled.

        ``train`` is the recipe's: an epoch has as many steps as the sampler's rows fill (``train.batch_size``).
        """
        return None

    @property
    def ended(self) -> bool:
        """Whether training ends with the step just done, before the recipe's steps are used up; every rank must say
        the same."""
        return False

    def count(self, batch: Batch) -> dict[str, int | Tensor]:
        """How many items of each kind a micro-batch has. A term's mean is weighed by its kind's share of the step."""
        if batch.mask is None:
            return {"rows": len(batch)}
        if batch.mask.dim() == 1:
            return {"rows": batch.mask.sum()}
        return {"rows": len(batch), "tokens": batch.mask.sum()}

    def transform(self, batch: Batch, ctx: Step) -> Batch:
        """Change a batch before any forward, without gradients; may change what ``count`` finds."""
        return batch

    def objective(self, student: Outputs, teacher: Outputs | None, batch: Batch, ctx: Step) -> Terms:
        """The loss, as named terms, from one forward of each model."""
        raise TypeError(f"{type(self).__name__} defines neither objective nor step")

    def step(self, ctx: Step) -> Terms:
        """One micro-batch. Override where a step is more than one forward of each model; end with `terms` then."""
        teacher = ctx.teacher() if self.needs.teacher != "none" else None
        return self.terms(ctx.student(), teacher, ctx)

    @property
    def sees_all_ranks(self) -> bool:
        """Whether ``objective`` gets the rows of all ranks: where its loss couples rows."""
        return self.needs.couples_rows == "loss"

    def terms(self, student: Outputs, teacher: Outputs | None, ctx: Step) -> Terms:
        """What ``objective`` says of this rank's rows, or of all ranks' (`Step.everyone`) where its loss couples them:
        it then needs no exchange of its own, and its draws are the same on all ranks."""
        if not self.sees_all_ranks:
            return self.objective(student, teacher, ctx.batch, ctx)
        ctx = ctx.everyone
        knowledge = None if teacher is None else ctx.of_everyone(teacher)
        return self.objective(ctx.of_everyone(student), knowledge, ctx.batch, ctx)

    def optimizers(self) -> dict[str, OptimSpec]:
        """Optimisers by name. Default: one, of the student and of the method's own parameters."""
        return {"main": OptimSpec(("student.*", "method.*"))}

    def active(self, ctx: Step) -> set[str]:
        """Names of the optimisers that step now. Default: all."""
        return set(self.optimizers())

    combine_gradients: ClassVar[Any] = None
    """Optional method ``(grads: dict[term, list[Tensor | None]]) -> list[Tensor | None]``: one backward a term, each
    already averaged over ranks and weighed, in the order of the trained parameters; entries may be DTensors."""

    def after_step(self, ctx: Step) -> None:
        """After the optimisers moved: moving averages, prototypes, memory banks, clipped weights."""

    def after_evaluation(self, metrics: dict[str, float], ctx: Step) -> None:
        """After an evaluation on validation data."""

    def finish(self, student: nn.Module) -> nn.Module:
        """What ships. Default: the student as it is; whatever the method trained stays behind."""
        return student

    def tables(self) -> dict[str, Table]:
        """Rows for the report, by name, asked for once the student is trained. Default: none."""
        return {}

    def measure(self, ctx: Step) -> dict[str, Table]:
        """Further tables, which take passes over the training rows (``ctx.data``) with the trained models.

        Asked for after `tables`, without gradients and with the method in eval mode;
        ``ctx.student(batch, taps, frozen=True)`` runs the student so.
        """
        return {}
