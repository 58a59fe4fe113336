"""A divergence from the teacher beside the label loss, of tokens or of rows: what many methods are made of."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tutelage.engine.types import Batch, Outputs, Sampled, Term, Terms, TopK
from tutelage.functional.analytic import Divergence, OfLogits, make_divergence
from tutelage.functional.fused import FusedLoss, fused_linear_token_nll
from tutelage.functional.reductions import masked_mean
from tutelage.functional.tokens import counted_tokens, token_nll
from tutelage.tasks.fused_losses import fused_loss
from tutelage.tasks.task import wide

if TYPE_CHECKING:
    from tutelage.engine.step import Step


def divergence_terms(
    name: str,
    student: Outputs,
    teacher: Outputs,
    batch: Batch,
    ctx: Step,
    *,
    options: Mapping[str, Any] | None = None,
    label_weight: float = 0.0,
    loss_weight: float = 1.0,
    temperature: float = 1.0,
    fused: bool = True,
    alone: bool = True,
) -> Terms:
    """The terms ``label`` (where it has a weight) and ``name``, each times its weight, means over what counts.

    Where the student gives hidden states and its head, logits of all tokens are never made: both losses and their
    gradients come of one pass, and the term of the divergence carries the gradient of both.

    Args:
        name: of the divergence: ``forward_kl``, ``reverse_kl`` … (`tutelage.functional.analytic.make_divergence`).
        options: of the divergence.
        fused: False: from logits, by autograd.
        alone: whether no other method adds a label loss; else that is a term with a gradient of its own.
    """
    if not (fused and student.hidden is not None and student.head is not None):
        terms = {"label": _weighed(label_weight, ctx.label_loss(student, batch))} if label_weight else {}
        loss = plain_divergence(name, student.logits, _sparse_or_dense(teacher), batch, temperature, options)
        return terms | {name: Term(loss_weight * loss, ctx.items)}
    together = alone and label_weight > 0
    found = fused_divergence(
        make_divergence(name, **(options or {})),
        student,
        teacher,
        batch,
        label_weight=label_weight if together else 0.0,
        loss_weight=loss_weight,
        temperature=temperature,
    )
    if together:
        assert found.label is not None
        label = label_weight * found.label
        return {"label": Term(label, ctx.items), name: Term(found.loss - label, ctx.items)}
    terms = {"label": _weighed(label_weight, ctx.label_loss(student, batch))} if label_weight else {}
    return terms | {name: Term(found.loss, ctx.items)}


def fused_divergence(
    divergence: Divergence | OfLogits,
    student: Outputs,
    teacher: Outputs,
    batch: Batch,
    *,
    label_weight: float = 0.0,
    loss_weight: float = 1.0,
    temperature: float = 1.0,
    token_weight: Tensor | None = None,
) -> FusedLoss:
    """Divergence and label loss in one pass from hidden states and heads; see `fused_loss`.

    Raises:
        ValueError: the student's logits are no output of a linear head.
    """
    return fused_loss(
        student,
        teacher,
        batch,
        divergence=divergence,
        label_weight=label_weight,
        loss_weight=loss_weight,
        temperature=temperature,
        token_weight=token_weight,
    )


def plain_divergence(
    name: str,
    logits: Tensor,
    teacher: Tensor | TopK | Sampled,
    batch: Batch,
    temperature: float,
    options: Mapping[str, Any] | None = None,
) -> Tensor:
    """The same from logits ``[..., classes]``, by autograd. A teacher's largest k are compared as k + 1 outcomes, the
    last of which is all the rest. Means over what counts: where the mask is not zero, and of ids of tokens the target
    not -100.

    Raises:
        ValueError: draws of the teacher serve the forward KL alone, stored answers a temperature of 1 alone.
    """
    if not isinstance(teacher, Tensor) and temperature != 1:
        raise ValueError(
            f"temperature is {temperature}, but stored answers of the likeliest or drawn classes are known at 1 alone; "
            "set it to 1, store dense logits, or give a live teacher"
        )
    if isinstance(teacher, Sampled):
        if name != "forward_kl":
            raise ValueError(
                f"{name} needs probabilities of the teacher; a store of draws serves forward_kl alone"
            )
        return _cross_entropy_of_draws(logits, teacher, _counted(logits, batch))
    if isinstance(teacher, TopK):
        logits, teacher = _outcomes(logits, teacher)
    counted = _counted(logits, batch)
    module = "adaptive_kl" if name == "adaptive_kl" else "token_divergences"
    loss = getattr(importlib.import_module(f"tutelage.functional.{module}"), f"{name}_loss")
    found: Tensor = loss(logits, teacher, counted, temperature=temperature, **(options or {}))
    return found


@torch.no_grad()
def label_nll(outputs: Outputs, batch: Batch) -> Tensor:
    """``-log q(target)`` of each token ``[rows, tokens]`` in nats, float32 or wider; 0 where a token does not count.
    From hidden states and head, where the model gives those: logits of all tokens are never made.

    Raises:
        ValueError: the batch has no target.
    """
    if batch.target is None:
        raise ValueError("the likelihood of next tokens needs them as target; these rows have none")
    if outputs.hidden is None or outputs.head is None:
        counts = counted_tokens(batch.target.shape, batch.mask, batch.target)
        return token_nll(outputs.logits, batch.target, counts)
    head = outputs.head
    return fused_linear_token_nll(
        outputs.hidden,
        head.weight,
        batch.target,
        batch.mask,
        bias=head.bias,
        softcap=head.softcap,
        scale=head.scale,
    )


def _sparse_or_dense(teacher: Outputs) -> Tensor | TopK | Sampled:
    found = teacher.stored_logits
    return teacher.logits if found is None else found


def _weighed(weight: float, term: Term) -> Term:
    return Term(weight * term.mean, term.items)


def _counted(logits: Tensor, batch: Batch) -> Tensor | None:
    """Which rows of logits count, as fused losses have it. Of targets only ids of tokens say so: not those of rows,
    all of which count, nor distributions and values."""
    target, leading = batch.target, logits.shape[:-1]
    if target is not None and (target.dim() < 2 or target.shape != leading or target.is_floating_point()):
        target = None
    return counted_tokens(leading, batch.mask, target)


def _outcomes(logits: Tensor, teacher: TopK) -> tuple[Tensor, Tensor]:
    """Log-probabilities ``[..., k + 1]`` of both sides: of the teacher's k entries, and of all the rest."""
    log_probs = wide(logits).log_softmax(-1)
    kept = log_probs.gather(-1, teacher.ids)
    rest = log_probs.scatter(-1, teacher.ids, -torch.inf).logsumexp(-1, keepdim=True)
    return torch.cat([kept, rest], -1), teacher.outcomes(kept.dtype)


def _cross_entropy_of_draws(logits: Tensor, teacher: Sampled, counted: Tensor | None) -> Tensor:
    ids, weights = teacher.ids, teacher.weights
    if counted is not None:
        logits, ids, weights = logits[counted], ids[counted], weights[counted]
    log_probs = wide(logits).log_softmax(-1)
    return masked_mean(-(weights * log_probs.gather(-1, ids)).sum(-1))
