"""What flows through a step: `Batch` in, `Outputs` of a model, `Terms` out. Plain dataclasses of tensors."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from tutelage.engine.transfer import send
from tutelage.functional.heads import Head as Head
from tutelage.functional.heads import Sampled as Sampled
from tutelage.functional.heads import TopK as TopK

Inputs = Tensor | dict[str, Tensor]


@dataclass
class Batch:
    """Rows on their way through a step. The first axis of every tensor is the row.

    Attributes:
        inputs: a tensor ``[rows, ...]`` (images: float in [0, 1], not yet normalised), or a model's keyword tensors.
        target: class ids ``[rows]``, distributions ``[rows, classes]`` or values; ids of tokens ``[rows, tokens]``, of
            a language model those that come next, -100 where none counts; none where rows have no label.
        index: stable id of each row in its source, ``[rows]`` int64.
        view: number of the view drawn for each row, ``[rows]`` int64; with ``index`` it keys a store.
        views: further views of the same rows, where a method asks for several.
        mask: which rows count ``[rows]``, or which tokens ``[rows, tokens]``.
        teacher_inputs: what the teacher sees, where that is not ``inputs``.
        columns: any other field of the data, by name (domain, snr, sensitive, labelled …).
    """

    inputs: Inputs
    target: Tensor | None = None
    index: Tensor | None = None
    view: Tensor | None = None
    mask: Tensor | None = None
    teacher_inputs: Inputs | None = None
    views: list[Batch] = field(default_factory=list)
    columns: dict[str, Tensor] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(first_tensor(self.inputs))

    @property
    def device(self) -> torch.device:
        return first_tensor(self.inputs).device

    def replace(self, **changes: Any) -> Batch:
        """A copy with some fields changed; the batch itself stays as it is."""
        return dataclasses.replace(self, **changes)

    def map(self, function: Callable[[Tensor], Tensor]) -> Batch:
        """A copy in which ``function`` was applied to every tensor, those of ``views`` included."""

        def apply(value: Any) -> Any:
            return value.map(function) if isinstance(value, Batch) else function(value)

        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return Batch(
            **{name: pytree.tree_map_only((Tensor, Batch), apply, value) for name, value in values.items()}
        )

    def to(self, device: torch.device | str) -> Batch:
        """The batch on a device; itself where all of it lies there already. On the CPU all of a batch lies together."""
        if self.device == torch.device(device) == torch.device("cpu"):
            return self
        return self.map(lambda tensor: send(tensor, device))

    def pin_memory(self) -> Batch:
        """The batch in memory from which an accelerator copies by itself; torch's loader asks for it."""
        return self.map(lambda tensor: tensor.pin_memory())

    def select(self, rows: Tensor | slice) -> Batch:
        """The given rows (positions, a boolean mask or a slice), every field cut alike."""
        return self.map(lambda tensor: tensor[rows])


def first_tensor(inputs: Inputs) -> Tensor:
    return inputs if isinstance(inputs, Tensor) else next(iter(inputs.values()))


class Outputs:
    """What a model gave for a batch. ``logits`` is made from ``hidden`` and ``head`` only when it is read, so that a
    fused loss that reads those two never builds it."""

    def __init__(
        self,
        logits: Tensor | TopK | Sampled | None = None,
        *,
        hidden: Tensor | None = None,
        head: Head | None = None,
        features: Mapping[str, Any] | None = None,
        attentions: Mapping[str, Tensor] | None = None,
        extra: Mapping[str, Tensor] | None = None,
    ) -> None:
        self._logits = logits
        self.hidden = hidden
        self.head = head
        self.features: Mapping[str, Any] = dict(features or {})
        self.attentions: Mapping[str, Tensor] = dict(attentions or {})
        self.extra: Mapping[str, Tensor] = dict(extra or {})

    @property
    def stored_logits(self) -> Tensor | TopK | Sampled | None:
        """Logits as they came: dense, top-k, sampled or none."""
        if self._logits is None and self.hidden is not None and self.head is not None:
            self._logits = self.head(self.hidden)
        return self._logits

    @property
    def logits(self) -> Tensor:
        """Dense logits ``[rows, ..., classes]``.

        Raises:
            ValueError: there are none (the forward stopped at a tap, or the store keeps a sparse form).
        """
        logits = self.stored_logits
        if isinstance(logits, Tensor):
            return logits
        form = "none" if logits is None else type(logits).__name__
        raise ValueError(
            f"dense logits were asked for, but this model's outputs hold {form}; "
            "declare Needs(logits='dense') so that the pairing is checked before training"
        )

    @property
    def width(self) -> int | None:
        """Classes or tokens of its dense logits, which are not made for it; none where there are none."""
        if self._logits is None and self.hidden is not None and self.head is not None:
            return self.head.vocabulary
        return self._logits.shape[-1] if isinstance(self._logits, Tensor) else None

    @property
    def rows(self) -> int | None:
        """Of its logits, or of the hidden states that stand for them; none where there are none."""
        found = self._logits if self.hidden is None else self.hidden
        return len(found) if isinstance(found, Tensor) else None

    def feature(self) -> Any:
        """The one tapped feature, where exactly one was asked for."""
        if len(self.features) != 1:
            raise ValueError(f"expected one tapped feature, got {sorted(self.features)}")
        return next(iter(self.features.values()))


@dataclass
class Term:
    """One named part of a loss: the mean over its items (``"rows"``, ``"tokens"`` …) of this micro-batch, at least in
    float32. The trainer weighs it by its share of the step's items."""

    mean: Tensor
    items: str = "rows"

    def __post_init__(self) -> None:
        if self.mean.dim() != 0:
            raise ValueError(f"a Term holds a scalar mean; got shape {tuple(self.mean.shape)}")
        if self.mean.dtype not in (torch.float32, torch.float64):
            self.mean = self.mean.float()


Terms = dict[str, Term]


@dataclass(frozen=True)
class Taps:
    """Inner tensors a method wants, by module path of each model (patterns as `tutelage.engine.taps` reads them).

    ``teacher_logits=False`` lets a teacher stop at its deepest tap. ``teachers`` names taps of further teachers.
    """

    student: tuple[str, ...] = ()
    teacher: tuple[str, ...] = ()
    student_logits: bool = True
    teacher_logits: bool = True
    teachers: Mapping[str, tuple[str, ...]] = field(default_factory=dict)


@dataclass(frozen=True)
class Plot:
    """A figure of a table: columns ``y`` over the column ``x``, as lines through the rows in their order."""

    x: str
    y: tuple[str, ...]


@dataclass
class Table:
    """Rows for the report, with the names of their columns. A cell that is a PNG's data URI is shown as a picture."""

    columns: list[str]
    rows: list[list[Any]]
    plots: tuple[Plot, ...] = ()
