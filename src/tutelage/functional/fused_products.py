"""The four products of a fused loss: logits of both models, and the gradients of hidden states and head."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from tutelage.functional.heads import Head

__all__: list[str] = []


class Side:
    """Hidden states and head of one model, in the type in which its products are made.

    Args:
        hidden: ``[N, width]``.
        head: ``[V, width]`` with what belongs to it.
    """

    def __init__(self, hidden: Tensor, head: Head) -> None:
        device = hidden.device.type
        low = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
        cast = low is not None and hidden.dtype != torch.float64
        weight = head.weight.detach()
        self.hidden = hidden.detach().to(low) if cast else hidden.detach()
        self.weight = weight.to(low) if cast else weight
        self.head = head
        self.bias = None if head.bias is None else head.bias.detach()

    @property
    def wide(self) -> torch.dtype:
        """The type of softmax, sums and gradients."""
        return torch.float64 if self.hidden.dtype == torch.float64 else torch.float32

    def logits(self, rows: Tensor | slice, out: Tensor) -> Tensor:
        """The head's product, with bias, without softcap and scale; written to the front of ``out``."""
        hidden = self.hidden[rows]
        out = out[: len(hidden)]
        if hidden.dtype == out.dtype:
            torch.mm(hidden, self.weight.t(), out=out)
        elif hidden.is_cuda and hidden.dtype.itemsize == 2 and out.dtype == torch.float32:
            out.copy_(torch.mm(hidden, self.weight.t(), out_dtype=torch.float32))
        else:
            out.copy_(torch.mm(hidden, self.weight.t()))
        return out if self.bias is None else out.add_(self.bias)

    def bend_(self, logits: Tensor) -> Tensor | None:
        """Softcap and scale in place; returns the softcap's derivative, where there is one."""
        if self.head.softcap is None:
            if self.head.scale != 1:
                logits.mul_(self.head.scale)
            return None
        logits.div_(self.head.softcap).tanh_()
        slope = torch.square(logits).neg_().add_(1)
        logits.mul_(self.head.softcap * self.head.scale)
        return slope


@dataclass
class Gradients:
    """Of hidden ``[N, width]``, weight and bias, in float32 or wider, each where it is asked for; still to be
    multiplied by the pass's scale."""

    hidden: Tensor | None = None
    weight: Tensor | None = None
    bias: Tensor | None = None

    @classmethod
    def of(cls, side: Side, wanted: Sequence[bool]) -> Gradients:
        """Zeros of what is wanted."""
        made = (side.hidden.shape, side.weight.shape, side.weight.shape[:1])
        return cls(
            *(
                torch.zeros(shape, dtype=side.wide, device=side.hidden.device) if asked else None
                for shape, asked in zip(made, wanted, strict=True)
            )
        )

    def __bool__(self) -> bool:
        return any(gradient is not None for gradient in (self.hidden, self.weight, self.bias))

    def add(self, side: Side, rows: Tensor | slice, logits: Tensor, weight: Tensor | None) -> None:
        """Hand a chunk's gradient by the logits on. Its rows are weighed here, where they are short."""
        if self.hidden is not None:
            made = torch.mm(logits.to(side.weight.dtype), side.weight).to(self.hidden.dtype)
            self.hidden[rows] = made if weight is None else made.mul_(weight[:, None])
        if self.weight is not None:
            hidden = side.hidden[rows]
            if hidden.is_cuda and hidden.dtype != logits.dtype:
                hidden = hidden if weight is None else hidden * weight[:, None].to(hidden.dtype)
                made = torch.mm(logits.to(hidden.dtype).t(), hidden, out_dtype=torch.float32)
                self.weight.add_(made)
            else:
                hidden = hidden.to(logits.dtype)
                self.weight.addmm_(logits.t(), hidden if weight is None else hidden * weight[:, None])
        if self.bias is not None:
            self.bias += logits.sum(0) if weight is None else weight @ logits


class Given(torch.autograd.Function):
    """Hands on a loss whose gradients were made with it."""

    @staticmethod
    def forward(
        ctx: Any, loss: Tensor, gradients: Gradients, scale: Tensor, *leaves: Tensor | None
    ) -> Tensor:
        ctx.gradients, ctx.scale = gradients, scale
        return loss.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, outer: Tensor) -> tuple[Tensor | None, ...]:
        made: Gradients | None = ctx.gradients
        if made is None:
            raise RuntimeError("this loss's gradients were handed out; keep the graph with retain_graph=True")
        factor = outer * ctx.scale
        # Without a second backward to come nobody else needs them: no copy of the head's.
        kept = torch._C._autograd._get_current_graph_task_keep_graph()
        if not kept:
            ctx.gradients = None
        by_leaf = (
            g if g is None else (g * factor if kept else g.mul_(factor))
            for g in (made.hidden, made.weight, made.bias)
        )
        return None, None, None, *by_leaf
