"""`Teacher`: where a teacher's knowledge comes from, as the trainer sees it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal, Protocol, runtime_checkable

from torch import nn

from tutelage.engine.generation import Generation, Prompt
from tutelage.engine.needs import Offers
from tutelage.engine.types import Batch, Outputs
from tutelage.recipe.generation import GenerationConfig

if TYPE_CHECKING:
    from tutelage.engine.spec import ModelSpec

Grad = Literal["none", "inputs", "all"]


@runtime_checkable
class Teacher(Protocol):
    """Gives outputs for a batch, and texts for prompts where ``offers.text`` says so.

    ``grad``: ``none`` (no graph), ``inputs`` (parameters constant, gradient to what goes in), ``all`` (a trained
    teacher). ``logits=False`` lets the forward stop at the deepest tap.
    """

    offers: Offers
    spec: ModelSpec

    @property
    def module(self) -> nn.Module | None:
        """The module whose parameters a trained teacher brings; none for a store or an endpoint."""

    def outputs(
        self, batch: Batch, taps: tuple[str, ...] = (), grad: Grad = "none", *, logits: bool = True
    ) -> Outputs: ...

    def generate(
        self, prompts: Sequence[Prompt], options: GenerationConfig, seed: int
    ) -> list[Generation]: ...
