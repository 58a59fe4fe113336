"""`Procedure`: a method that is more than one training loop; `Artifacts`: what one leaves."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from torch import nn

from tutelage.engine.method import Kind, Paper
from tutelage.engine.needs import Needs
from tutelage.engine.types import Table
from tutelage.recipe.config import MethodConfig

if TYPE_CHECKING:
    from tutelage.procedures.run import Run


@dataclass
class Artifacts:
    """What a procedure leaves: the student (none, where what it makes is no model), by name those of the recipe's
    teachers that it trained, metrics on test data, tables for the report, and further folders of data."""

    student: nn.Module | None
    metrics: dict[str, float] = field(default_factory=dict)
    models: dict[str, nn.Module] = field(default_factory=dict)
    tables: dict[str, Table] = field(default_factory=dict)
    figures: dict[str, Any] = field(default_factory=dict)
    datasets: dict[str, str] = field(default_factory=dict)


class Procedure:
    """Base of every method that composes Trainers. It never writes a training loop of its own.

    ``run`` must be a function of its recipe alone: everything random comes from ``run.generator``, everything dear goes
    through ``run.once`` and ``run.train``, which are skipped where they are done. Then a killed run goes on exactly.
    """

    Config: ClassVar[type[MethodConfig]]
    paper: ClassVar[Paper]
    needs: ClassVar[Needs] = Needs()
    kind: ClassVar[Kind] = "Procedure"
    missing: ClassVar[tuple[str, ...]] = ()

    def __init__(self, config: MethodConfig) -> None:
        self.config: Any = config

    def check(self, run: Run) -> None:
        """Raise what `run` would refuse, before anything is trained or written. ``run`` has no folder, and a teacher
        that would be trained first has random weights. Default: nothing."""

    def run(self, run: Run) -> Artifacts:
        """The whole procedure."""
        raise TypeError(f"{type(self).__name__} defines no run")
