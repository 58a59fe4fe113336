"""MiniPLM: text that a teacher finds much easier than a small model does; online KD beside it (arXiv 2410.17215)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Integer, Shaped
from torch import Tensor

from tutelage.functional.checks import check_same_shape, check_share
from tutelage.functional.fused import fused_linear_token_nll
from tutelage.functional.tokens import check_same_vocabulary, counted_pair, token_nll

__all__ = [
    "LanguageModelBatch",
    "VanillaKDLoss",
    "difference_sampling",
    "difference_score",
    "fused_linear_instance_nll",
    "language_model_batch",
    "miniplm_vanilla_kd_loss",
    "per_instance_nll",
]


class LanguageModelBatch(NamedTuple):
    """Token sequences as one batch, all ``[batch, length]``: inputs and targets, which inputs are tokens (0 or 1), and
    which positions count."""

    inputs: Integer[Tensor, "batch length"]
    attention_mask: Integer[Tensor, "batch length"]
    target: Integer[Tensor, "batch length"]
    mask: Bool[Tensor, "batch length"]


class VanillaKDLoss(NamedTuple):
    """The weighted total; the student's label loss, its cross-entropy with the teacher (``kd_per_sample [batch]``, by
    row), the teacher's entropy and the teacher's own label loss, detached."""

    loss: Float[Tensor, ""]
    lm_loss: Float[Tensor, ""]
    kd_loss: Float[Tensor, ""]
    kd_entropy: Float[Tensor, ""]
    teacher_loss: Float[Tensor, ""]
    kd_per_sample: Float[Tensor, " batch"]


def per_instance_nll(
    logits: Float[Tensor, "batch length vocabulary"],
    target: Integer[Tensor, "batch length"],
    mask: Shaped[Tensor, "batch length"],
) -> Float[Tensor, " batch"]:
    """Mean next-token loss of each sequence, ``-Σ m log P(target) / Σ m``.

    Args:
        logits: ``[batch, length, vocabulary]``, row i already predicts target i.
        target: ``[batch, length]``; -100 does not count.
        mask: ``[batch, length]``, not zero where a token counts; the target elsewhere is of no account.

    Returns:
        ``[batch]`` in nats a token, at least float32.

    Raises:
        ValueError: shapes do not agree, or a sequence without a token that counts.
        IndexError: a target that counts lies outside the vocabulary.

    Source: Gu et al., "MiniPLM: Knowledge Distillation for Pre-Training Language Models" (arXiv 2410.17215), and its
    code.
    """
    counts = _counted_of_every_row(target, mask)
    return _row_means(token_nll(logits, target, counts), counts)


def fused_linear_instance_nll(
    hidden: Float[Tensor, "batch length width"],
    weight: Float[Tensor, "vocabulary width"],
    target: Integer[Tensor, "batch length"],
    mask: Shaped[Tensor, "batch length"],
    *,
    chunk_size: int | None = None,
) -> Float[Tensor, " batch"]:
    """`per_instance_nll` from hidden states and head, ``logits = hidden @ weight.T``: for scores, without a gradient,
    and the logits of all tokens are never held at once.

    Args:
        hidden: ``[batch, length, width]``, row i already predicts target i.
        weight: ``[vocabulary, width]``.
        target, mask: as in `per_instance_nll`.
        chunk_size: tokens whose logits are made at once; None: by bytes.

    Returns:
        ``[batch]`` in nats a token, detached, at least float32.

    Raises:
        ValueError, IndexError: as in `per_instance_nll`.
    """
    counts = _counted_of_every_row(target, mask)
    nll = fused_linear_token_nll(hidden, weight, target, mask=counts, chunk_size=chunk_size)
    return _row_means(nll, counts)


def difference_score(
    teacher_nll: Float[Tensor, " n"], reference_nll: Float[Tensor, " n"]
) -> Float[Tensor, " n"]:
    """``reference - teacher``: large where the teacher knows what a small model does not.

    Args:
        teacher_nll, reference_nll: ``[n]``, `per_instance_nll` of the same sequences by the same tokenizer.

    Returns:
        ``[n]``, at least float32 where the scores are.

    Raises:
        ValueError: not one score a sequence, or a score that is not finite.

    Source: Gu et al., "MiniPLM: Knowledge Distillation for Pre-Training Language Models" (arXiv 2410.17215).
    """
    check_same_shape(teacher_nll=teacher_nll, reference_nll=reference_nll)
    _check_scores("teacher_nll", teacher_nll)
    _check_scores("reference_nll", reference_nll)
    return reference_nll - teacher_nll


def difference_sampling(score: Float[Tensor, " n"], ratio: float | int = 0.5) -> Integer[Tensor, " kept"]:
    """Positions of the ``int(ratio · n)`` largest scores, in the order of the corpus; of equal ones the first.

    The cut depends on the whole corpus: parts of it, cut each for itself, are another choice.

    Args:
        score: ``[n]``, of `difference_score`.
        ratio: the share that is kept, in (0, 1].

    Returns:
        ``[kept]`` int64, ascending.

    Raises:
        ValueError: a score that is not finite, a ratio outside (0, 1], or one that keeps nothing.

    Source: Gu et al., "MiniPLM: Knowledge Distillation for Pre-Training Language Models" (arXiv 2410.17215), and its
    code.
    """
    if not 0 < ratio <= 1:
        raise ValueError(f"ratio must lie in (0, 1]; got {ratio}")
    _check_scores("score", score)
    kept = int(ratio * len(score))
    if kept == 0:
        raise ValueError(f"a ratio of {ratio} keeps none of {len(score)} sequences; raise it or give more")
    return score.argsort(descending=True, stable=True)[:kept].sort().values


def language_model_batch(
    tokens: Sequence[Sequence[int]] | Integer[Tensor, "batch tokens"], *, max_length: int, pad_id: int
) -> LanguageModelBatch:
    """Token sequences as inputs and shifted targets, cut to ``max_length`` and padded on the right to it.

    A position counts where its **input** is a token other than ``pad_id``: what follows an end-of-text token that is
    also the padding is not held against the model. Targets under the mask are ``pad_id``, a valid id.

    Args:
        tokens: sequences of ids, of any length; a negative id ends its sequence. One of fewer than two tokens has
            nothing that counts.
        max_length: at least 1.
        pad_id: at least 0.

    Raises:
        ValueError: an option is out of range.

    Source: Gu et al., "MiniPLM: Knowledge Distillation for Pre-Training Language Models" (arXiv 2410.17215), its code.
    """
    if max_length < 1 or pad_id < 0:
        raise ValueError(f"max_length must be at least 1 and pad_id at least 0; got {max_length}, {pad_id}")
    rows = [_sequence(row) for row in (tokens.tolist() if isinstance(tokens, Tensor) else tokens)]
    inputs = torch.full((len(rows), max_length), pad_id)
    target, real = inputs.clone(), torch.zeros_like(inputs)
    for row, sequence in enumerate(rows):
        length = max(min(len(sequence) - 1, max_length), 0)
        inputs[row, :length] = torch.tensor(sequence[:length], dtype=torch.long)
        target[row, :length] = torch.tensor(sequence[1 : length + 1], dtype=torch.long)
        real[row, :length] = 1
    return LanguageModelBatch(inputs, real, target, (real == 1) & (inputs != pad_id))


def miniplm_vanilla_kd_loss(
    student_logits: Float[Tensor, "batch length vocabulary"],
    teacher_logits: Float[Tensor, "batch length vocabulary"],
    target: Integer[Tensor, "batch length"],
    mask: Shaped[Tensor, "batch length"],
    *,
    kd_ratio: float | int = 0.5,
) -> VanillaKDLoss:
    """``(1 - kd_ratio) lm + kd_ratio kd``, the label loss and the cross-entropy ``-Σ p log q`` with the teacher: a mean
    over each **sequence**'s tokens first, then over sequences.

    Args:
        student_logits: ``[batch, length, vocabulary]``, row i already predicts target i.
        teacher_logits: ``[batch, length, vocabulary]``; detached.
        target: ``[batch, length]``; -100 does not count.
        mask: ``[batch, length]``, not zero where a token counts; the target elsewhere is of no account.
        kd_ratio: share of the teacher's part, in [0, 1].

    Returns:
        A `VanillaKDLoss` in nats, at least float32. A sequence without a token that counts is left out of the mean
        (its ``kd_per_sample`` is 0); where none has one, all is 0 with a zero gradient.

    Raises:
        ValueError: shapes or vocabularies do not agree, or kd_ratio lies outside [0, 1].
        IndexError: a target that counts lies outside the vocabulary.

    Source: the baseline in the code of arXiv 2410.17215.
    """
    check_share("kd_ratio", kd_ratio)
    check_same_vocabulary(student_logits, teacher_logits)
    check_same_shape(target=target, mask=mask)
    counts = (mask != 0) & (target != -100)
    label = token_nll(student_logits, target, counts)
    pair = counted_pair(student_logits, teacher_logits)
    soft = pair.forward_kl(subtract_entropy=False)
    entropy = pair._replace(student=pair.teacher).forward_kl(subtract_entropy=False)
    teacher = token_nll(teacher_logits.detach(), target, counts)
    sequences = counts.any(1).sum().clamp(min=1)
    by_row = [_row_means(values, counts) for values in (label, soft, entropy, teacher)]
    lm, kd, kd_entropy, teacher_loss = (values.sum() / sequences for values in by_row)
    return VanillaKDLoss(
        (1 - kd_ratio) * lm + kd_ratio * kd, lm, kd, kd_entropy, teacher_loss, by_row[1].detach()
    )


def _counted_of_every_row(target: Tensor, mask: Tensor) -> Tensor:
    """Which tokens count; a sequence without one would have no score."""
    check_same_shape(target=target, mask=mask)
    counts = (mask != 0) & (target != -100)
    empty = (~counts.any(1)).nonzero().flatten().tolist()
    if empty:
        raise ValueError(f"sequence {empty[0]} of the batch has no token that counts, and so no score")
    return counts


def _row_means(
    values: Float[Tensor, "batch length"], counts: Bool[Tensor, "batch length"]
) -> Float[Tensor, " batch"]:
    return torch.where(counts, values, 0.0).sum(1) / counts.sum(1).clamp(min=1)


def _check_scores(name: str, scores: Tensor) -> None:
    if scores.dim() != 1:
        raise ValueError(f"{name} must hold one score a sequence; got shape {list(scores.shape)}")
    bad = (~scores.isfinite()).nonzero().flatten().tolist()
    if bad:
        raise ValueError(
            f"{name} of sequence {bad[0]} is {float(scores[bad[0]])}; score it anew or leave it out"
        )


def _sequence(tokens: Sequence[int]) -> list[int]:
    end = next((position for position, token in enumerate(tokens) if token < 0), len(tokens))
    return list(tokens[:end])
