"""Losses of language models from hidden states and heads: the logits of all tokens are never held at once.

Chunk by chunk of tokens the logits are made, the losses, and at once the gradients of hidden states and head, so that
backward only scales them. What does not count costs nothing.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Integer, Shaped
from torch import Tensor
from torch.distributed import ProcessGroup

from tutelage.functional.analytic import Divergence, OfLogits, make_divergence
from tutelage.functional.checks import check_positive
from tutelage.functional.fused_products import Given, Gradients
from tutelage.functional.fused_rows import Rows
from tutelage.functional.fused_statistics import token_statistics
from tutelage.functional.fused_taught import Teacher, taught_rows
from tutelage.functional.fused_tokens import Tokens
from tutelage.functional.heads import Head
from tutelage.functional.tokens import counted_tokens

__all__ = [
    "fused_linear_cross_entropy",
    "fused_linear_divergence",
    "fused_linear_loss",
    "fused_linear_token_nll",
]


class FusedLoss(NamedTuple):
    """Scalars, float32 or wider.

    Attributes:
        loss: ``label_weight · label + loss_weight · divergence``; it alone carries the gradient.
        label: the label loss; None without a target.
        divergence: None without a teacher, or where its weight is 0 and it was not computed.
    """

    loss: Tensor
    label: Tensor | None
    divergence: Tensor | None


def fused_linear_loss(
    student_hidden: Float[Tensor, "*rows width"],
    student_head: Head,
    teacher: Teacher | None = None,
    *,
    divergence: str | Divergence | OfLogits = "forward_kl",
    target: Integer[Tensor, "*rows"] | None = None,
    ignore_index: int = -100,
    mask: Shaped[Tensor, "*rows"] | None = None,
    label_weight: float | int = 0.0,
    loss_weight: float | int = 1.0,
    temperature: float | int = 1.0,
    token_weight: Shaped[Tensor, "*rows"] | None = None,
    chunk_size: int | None = None,
    group: ProcessGroup | None = None,
) -> FusedLoss:
    """Label loss and divergence of tokens in one pass over hidden states and heads, mean over the tokens that count.

    Args:
        student_hidden: ``[..., width]``; row i predicts target i. bfloat16 and float16 are computed as such in the
            products, and in float32 everywhere else. Under autocast products have its type.
        student_head: its weight may be a slice of a padded one, or tied; ``[vocabulary, width]``.
        teacher: ``(hidden, Head)`` of any width; logits ``[..., vocabulary]``; `TopK`: the k entries and the mass of
            all others are compared, exactly, by any divergence but taid; `Sampled`: forward_kl alone, its unbiased
            cross-entropy ``Σ -weight · log q``; or none. It gets no gradient.
        divergence: a name, an object of `analytic`, or a function of student and teacher logits
            ``[rows, vocabulary]``, already divided by the temperature, to ``[rows]``.
        target: ``[...]``, ids of the next tokens. A token with ``ignore_index`` does not count, in either part.
        mask: ``[...]``, not zero where a token counts.
        label_weight, loss_weight: of the label loss (at temperature 1), and of the divergence. At 0 a divergence is not
            computed.
        temperature: of the divergence, above 0; no factor temperature² is put in.
        token_weight: ``[...]``, constant, in place of 1 / tokens that count.
        chunk_size: tokens whose logits are made at once; None: by bytes.
        group: processes over which both heads' rows are spread, in order of rank; hidden states and targets are the
            same on all. The gradient of the hidden states is summed over them.

    Returns:
        A `FusedLoss`. Where nothing counts, zeros with a gradient of zeros. Backward can be run twice with
        ``retain_graph``, and not differentiated again.

    Raises:
        ValueError: shapes, types or vocabularies do not agree, a number is out of its range, there is neither teacher
            nor target, or this divergence cannot be had from this teacher.
        TargetError: a target that counts is no id of the vocabulary (looked at on the CPU alone).
    """
    made = make_divergence(divergence)
    if loss_weight == 0:
        teacher = None
    if teacher is None and target is None:
        raise ValueError(
            "there is nothing to learn: give a target, or a teacher with loss_weight other than 0"
        )
    check_positive("temperature", temperature)
    tokens = Tokens(student_hidden, student_head, target, ignore_index, mask, group)
    row_weight, scale = tokens.weights(token_weight)
    base = label_weight if teacher is None else loss_weight / temperature
    share = label_weight / base if base else 0.0
    leaves = (student_hidden.flatten(0, -2), student_head.weight, student_head.bias)
    wanted = [leaf is not None and leaf.requires_grad and torch.is_grad_enabled() for leaf in leaves]
    gradients = Gradients.of(tokens.side, wanted)
    work = Rows(tokens.vocabulary, tokens.target, share)
    if teacher is not None:
        work = taught_rows(tokens, teacher, made, temperature=temperature, label_share=share)
    values = tokens.run(work, chunk_size, gradients, row_weight)
    label, found = (_total(part, row_weight, scale) for part in (values.label, values.divergence))
    loss = scale.new_zeros(())
    for value, factor in ((label, label_weight), (found, loss_weight)):
        loss = loss if value is None or not factor else loss + factor * value  # 0 times infinity is NaN
    if any(wanted):
        loss = Given.apply(loss, gradients, scale * (base * student_head.scale), *leaves)
    return FusedLoss(loss, label, found)


def fused_linear_divergence(
    student_hidden: Float[Tensor, "*rows width"],
    student_weight: Float[Tensor, "vocabulary width"],
    teacher_hidden: Float[Tensor, "*rows teacher_width"],
    teacher_weight: Float[Tensor, "vocabulary teacher_width"],
    mask: Shaped[Tensor, "*rows"] | None = None,
    *,
    divergence: str | Divergence | OfLogits = "forward_kl",
    target: Integer[Tensor, "*rows"] | None = None,
    ignore_index: int = -100,
    temperature: float | int = 1.0,
    token_weight: Shaped[Tensor, "*rows"] | None = None,
    chunk_size: int | None = None,
    student_bias: Float[Tensor, " vocabulary"] | None = None,
    teacher_bias: Float[Tensor, " vocabulary"] | None = None,
    student_softcap: float | int | None = None,
    teacher_softcap: float | int | None = None,
    student_scale: float | int = 1.0,
    teacher_scale: float | int = 1.0,
    **options: Any,
) -> Float[Tensor, ""]:
    """Divergence of next-token distributions from hidden states and heads, ``logits = hidden @ weight.T + bias``, mean
    over the tokens that count; equal to the function of logits of the same name.

    Args:
        student_hidden, student_weight: ``[..., width]`` and ``[vocabulary, width]``.
        teacher_hidden, teacher_weight: of any width; they get no gradient.
        mask: ``[...]``, not zero where a token counts.
        divergence: ``forward_kl``, ``reverse_kl``, ``symmetric_kl``, ``skewed_forward_kl``, ``skewed_reverse_kl``,
            ``generalized_jsd``, ``adaptive_kl``, ``total_variation``, ``taid``; or a function of student and teacher
            logits ``[rows, vocabulary]`` to ``[rows]``.
        target: ``[...]``; a token whose target is ``ignore_index`` does not count. There is no label loss.
        token_weight: ``[...]``, in place of 1 / tokens that count.
        chunk_size: tokens whose logits are made at once; None: by bytes.
        student_softcap, teacher_softcap: ``cap · tanh(logits / cap)``, before the scale.
        student_scale, teacher_scale: of the logits.
        options: of the divergence: ``subtract_entropy``, ``weight``, ``skew``, ``beta``, ``mu``, ``t``.

    Returns:
        A scalar in nats, at least float32.

    Raises:
        ValueError: as in `fused_linear_loss`.
    """
    return fused_linear_loss(
        student_hidden,
        Head(student_weight, student_bias, student_softcap, student_scale),
        (teacher_hidden, Head(teacher_weight, teacher_bias, teacher_softcap, teacher_scale)),
        divergence=make_divergence(divergence, **options),
        mask=counted_tokens(student_hidden.shape[:-1], mask, target, ignore_index),
        temperature=temperature,
        token_weight=token_weight,
        chunk_size=chunk_size,
    ).loss


def fused_linear_cross_entropy(
    hidden: Float[Tensor, "*rows width"],
    weight: Float[Tensor, "vocabulary width"],
    target: Integer[Tensor, "*rows"],
    mask: Shaped[Tensor, "*rows"] | None = None,
    *,
    bias: Float[Tensor, " vocabulary"] | None = None,
    token_weight: Shaped[Tensor, "*rows"] | None = None,
    ignore_index: int = -100,
    chunk_size: int | None = None,
) -> Float[Tensor, ""]:
    """Cross-entropy of the next token from hidden states and head, mean over the tokens that count.

    Arguments, result and errors as in `fused_linear_loss`.
    """
    return fused_linear_loss(
        hidden,
        Head(weight, bias),
        target=target,
        ignore_index=ignore_index,
        mask=mask,
        label_weight=1.0,
        token_weight=token_weight,
        chunk_size=chunk_size,
    ).loss


def fused_linear_token_nll(
    hidden: Float[Tensor, "*rows width"],
    weight: Float[Tensor, "vocabulary width"],
    target: Integer[Tensor, "*rows"],
    mask: Shaped[Tensor, "*rows"] | None = None,
    *,
    bias: Float[Tensor, " vocabulary"] | None = None,
    softcap: float | int | None = None,
    scale: float | int = 1.0,
    ignore_index: int = -100,
    chunk_size: int | None = None,
) -> Float[Tensor, "*rows"]:
    """``-log q(target)`` of each token from hidden states and head, ``[...]``, float32 or wider; 0 where a token does
    not count. Without a gradient.

    Arguments and errors as in `fused_linear_loss`.
    """
    return token_statistics(
        hidden,
        Head(weight, bias, softcap, scale),
        target,
        mask=mask,
        ignore_index=ignore_index,
        chunk_size=chunk_size,
    ).nll


def _total(part: Tensor | None, row_weight: Tensor | None, scale: Tensor) -> Tensor | None:
    if part is None:
        return None
    return (part if row_weight is None else part * row_weight).sum() * scale
