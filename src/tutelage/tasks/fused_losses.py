"""Fused losses of a batch: from this rank's tokens, or from those of all ranks where heads are spread over them."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from tutelage.engine.spread import Exchange, SpreadHead, mean_gradient
from tutelage.engine.types import Batch, Outputs, Sampled, TopK
from tutelage.functional.fused import FusedLoss, fused_linear_loss
from tutelage.functional.heads import Head
from tutelage.functional.tokens import counted_tokens


def fused_loss(
    student: Outputs,
    teacher: Outputs | None,
    batch: Batch,
    *,
    token_weight: Tensor | None = None,
    **options: Any,
) -> FusedLoss:
    """`fused_linear_loss` of a batch; its losses are means over the tokens that count.

    Where the heads' rows are spread over ranks (``train.shard_head``), means are over the tokens of all ranks, and the
    same on each: hidden states are exchanged in place of heads. What the trainer makes of them is the same.

    Args:
        teacher: hidden states with a head, or stored logits; none: the label loss alone.
        token_weight: of this rank's tokens, in place of 1 / how many of them count.
        options: of `fused_linear_loss`.

    Raises:
        ValueError: the student gives no hidden states; a stored teacher has dense logits, and heads are spread.
    """
    if student.hidden is None or student.head is None:
        raise ValueError(
            "a fused loss needs the student's hidden states and its head; this model gives logits"
        )
    knowledge = None if teacher is None else knowledge_of(teacher)
    if isinstance(student.head, SpreadHead):
        return _over_ranks(student.hidden, student.head, knowledge, batch, token_weight, options)
    return fused_linear_loss(
        student.hidden,
        student.head,
        knowledge,
        target=batch.target,
        mask=batch.mask,
        token_weight=token_weight,
        **options,
    )


def knowledge_of(teacher: Outputs) -> Any:
    """Hidden states with their head, or logits as they came."""
    if teacher.hidden is not None and teacher.head is not None:
        return teacher.hidden, teacher.head
    return teacher.stored_logits


def _over_ranks(
    hidden: Tensor,
    head: SpreadHead,
    knowledge: Any,
    batch: Batch,
    token_weight: Tensor | None,
    options: dict[str, Any],
) -> FusedLoss:
    counted = counted_tokens(hidden.shape[:-1], batch.mask, batch.target, -100)
    counts = hidden.new_ones(hidden.shape[:-1], dtype=bool) if counted is None else counted  # type: ignore[call-overload]
    every = Exchange(counts)
    found = fused_linear_loss(
        every(hidden),
        head.rows,
        _exchanged(knowledge, every),
        target=None if batch.target is None else every(batch.target),
        mask=every.mask,
        token_weight=None if token_weight is None else every(token_weight * every.share),
        group=head.group,
        **options,
    )
    return found._replace(loss=mean_gradient(found.loss))


def _exchanged(knowledge: Any, every: Exchange) -> Any:
    if knowledge is None:
        return None
    if isinstance(knowledge, TopK | Sampled):
        return every.sparse(knowledge)
    if isinstance(knowledge, tuple) and isinstance(knowledge[1], SpreadHead):
        hidden, head = knowledge
        rows: Head = head.rows
        return every(hidden.detach()), rows
    raise ValueError(
        "train.shard_head needs a teacher whose head is spread too, or a store of its largest or sampled logits; these "
        "are dense: set it to false"
    )
