"""Rows, heads and references of the tests of fused losses: the same losses from logits, in float64, by autograd."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tutelage import functional
from tutelage.functional.analytic import make_divergence
from tutelage.functional.heads import Head

DIVERGENCES: dict[str, dict[str, Any]] = {
    "forward_kl": {},
    "forward_kl, cross-entropy": {"subtract_entropy": False},
    "reverse_kl": {},
    "symmetric_kl": {"weight": 0.7},
    "skewed_forward_kl": {"skew": 0.2},
    "skewed_forward_kl, 0": {"skew": 0.0},
    "skewed_forward_kl, 1": {"skew": 1.0},
    "skewed_reverse_kl": {"skew": 0.2},
    "skewed_reverse_kl, 0": {"skew": 0.0},
    "generalized_jsd": {"beta": 0.3},
    "generalized_jsd, 0": {"beta": 0.0},
    "generalized_jsd, 1": {"beta": 1.0},
    "adaptive_kl": {},
    "total_variation": {},
    "taid": {"t": 0.4},
}
ODD = (3, 47, 31, 19, 123)
"""Rows, tokens a row, width of the student, of the teacher, vocabulary."""


def named(key: str) -> str:
    return key.partition(",")[0]


def analytic(key: str) -> Any:
    return make_divergence(named(key), **DIVERGENCES[key])


def plain(key: str, student: Tensor, teacher: Tensor, **options: Any) -> Tensor:
    """The public loss of logits."""
    loss: Tensor = getattr(functional, f"{named(key)}_loss")(student, teacher, **DIVERGENCES[key], **options)
    return loss


@dataclass
class Case:
    """Hidden states and heads of both models, and what goes with them."""

    hidden: Tensor
    head: Head
    teacher_hidden: Tensor
    teacher_head: Head
    target: Tensor
    mask: Tensor

    @property
    def teacher(self) -> tuple[Tensor, Head]:
        return self.teacher_hidden, self.teacher_head

    def leaves(self) -> list[Tensor]:
        return [self.hidden, self.head.weight, *([] if self.head.bias is None else [self.head.bias])]

    def to(self, dtype: torch.dtype) -> Case:
        """A copy with leaves of its own."""

        def cast(head: Head, leaf: bool) -> Head:
            weight = head.weight.detach().to(dtype).requires_grad_(leaf)
            bias = None if head.bias is None else head.bias.detach().to(dtype).requires_grad_(leaf)
            return Head(weight, bias, head.softcap, head.scale)

        hidden = self.hidden.detach().to(dtype).requires_grad_()
        teacher_head = cast(self.teacher_head, False)
        return Case(
            hidden, cast(self.head, True), self.teacher_hidden.to(dtype), teacher_head, self.target, self.mask
        )

    def logits(self) -> tuple[Tensor, Tensor]:
        return self.head(self.hidden), self.teacher_head(self.teacher_hidden)


def case(
    sizes: tuple[int, int, int, int, int] = ODD,
    *,
    valid: float = 0.7,
    bias: bool = False,
    softcap: float | None = None,
    scale: float = 1.0,
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
) -> Case:
    rows, tokens, width, teacher_width, vocabulary = sizes
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int, spread: float = 1.0) -> Tensor:
        return spread * torch.randn(shape, generator=generator, dtype=torch.float64)

    def head(width: int) -> Head:
        weight = normal(vocabulary, width, spread=2 / width**0.5)
        return Head(weight, normal(vocabulary) if bias else None, softcap, scale)

    target = torch.randint(vocabulary, (rows, tokens), generator=generator)
    mask = torch.rand(rows, tokens, generator=generator) < valid
    made = Case(
        normal(rows, tokens, width),
        head(width),
        normal(rows, tokens, teacher_width),
        head(teacher_width),
        target,
        mask,
    )
    # The values are those of the narrow type, so that a reference in float64 differs by the arithmetic alone.
    return made.to(dtype)


def reference(key: str, of: Case, *, label_weight: float = 0.0, temperature: float = 1.0) -> Tensor:
    """The loss from whole logits."""
    student, teacher = of.logits()
    if temperature != 1 and named(key) == "taid":
        student, teacher = student / temperature, teacher / temperature
    softened = {} if named(key) == "taid" else {"temperature": temperature}
    loss = plain(key, student, teacher, mask=of.mask, **softened)
    if not label_weight:
        return loss
    target = of.target.masked_fill(~of.mask, -100)
    count = of.mask.sum().clamp(min=1)
    label = F.cross_entropy(of.head(of.hidden).flatten(0, 1), target.flatten(), reduction="sum") / count
    return loss + label_weight * label


def gradients(loss: Tensor, of: Case) -> list[Tensor]:
    return list(torch.autograd.grad(loss, of.leaves()))
