"""Decoupled distillation: how likely the target class is, apart from how the other classes share the rest."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Integer
from torch import Tensor

from tutelage.functional.checks import check_positive, check_same_shape, check_target
from tutelage.functional.divergences import tempered

__all__ = ["DKDTerms", "dkd_loss", "dkd_terms"]


class DKDTerms(NamedTuple):
    """DKD's weighted total, and its two parts without alpha and beta; all include temperature²."""

    total: Float[Tensor, ""]
    target: Float[Tensor, ""]
    nontarget: Float[Tensor, ""]


def dkd_terms(
    student_logits: Float[Tensor, "batch classes"],
    teacher_logits: Float[Tensor, "batch classes"],
    target: Integer[Tensor, " batch"],
    alpha: float | int = 1.0,
    beta: float | int = 8.0,
    temperature: float | int = 4.0,
) -> DKDTerms:
    """The divergence of `kd_loss`, split at the target class ``y`` and weighed anew: ``alpha·target + beta·nontarget``.

    - ``target = T² · mean KL([p_t(y), 1-p_t(y)] || [p_s(y), 1-p_s(y)])``, with ``p = softmax(logits / T)``;
    - ``nontarget = T² · mean KL(q_t || q_s)``, with ``q`` the softmax over all classes but ``y``; with two classes 0.

    The target class is left out of ``q`` exactly, however large its logit, and ``1 - p`` is formed in log space.

    Args:
        student_logits: ``[batch, classes]``.
        teacher_logits: ``[batch, classes]``; detached.
        target: class ids ``[batch]``; a distribution over classes has no target class and is refused.
        alpha, beta: weights of the two parts.
        temperature: ``T``, softens both sides; above 0.

    Returns:
        Scalars in nats, means over rows, at least float32; 0 where the logits agree up to a constant a row. An empty
        batch gives 0 with a zero gradient.

    Raises:
        ValueError: shapes do not agree, fewer than two classes, targets that are no ids, or a temperature not above 0.
        IndexError: a class id is out of range.

    Source: Zhao et al., "Decoupled Knowledge Distillation" (arXiv 2203.08679), equations 5 to 7.
    """
    check_positive("temperature", temperature)
    check_same_shape(student_logits=student_logits, teacher_logits=teacher_logits)
    if target.dim() == 2:
        raise ValueError(
            f"dkd takes class ids [{len(student_logits)}], no distributions {list(target.shape)}"
        )
    check_target(target, student_logits)
    if student_logits.shape[1] < 2:
        raise ValueError(f"dkd needs at least 2 classes; got {student_logits.shape[1]}")
    ids = target.long()[:, None]
    student = _split(tempered(student_logits, temperature), ids)
    with torch.no_grad():
        teacher = _split(tempered(teacher_logits, temperature), ids)
    scale = temperature**2 / max(len(student_logits), 1)
    target_term, nontarget = (
        F.kl_div(ours, theirs, reduction="sum", log_target=True) * scale
        for ours, theirs in zip(student, teacher, strict=True)
    )
    return DKDTerms(alpha * target_term + beta * nontarget, target_term, nontarget)


def dkd_loss(
    student_logits: Float[Tensor, "batch classes"],
    teacher_logits: Float[Tensor, "batch classes"],
    target: Integer[Tensor, " batch"],
    alpha: float | int = 1.0,
    beta: float | int = 8.0,
    temperature: float | int = 4.0,
) -> Float[Tensor, ""]:
    """``alpha · target + beta · nontarget`` of `dkd_terms`; a training loop adds its label loss.

    Args:
        student_logits: ``[batch, classes]``.
        teacher_logits: ``[batch, classes]``; detached.
        target: class ids ``[batch]``.
        alpha, beta: weights of the two parts.
        temperature: softens both sides; above 0.

    Returns:
        A scalar in nats, mean over rows, at least float32.

    Raises:
        ValueError, IndexError: as `dkd_terms`.

    Source: arXiv 2203.08679, equation 7.
    """
    return dkd_terms(student_logits, teacher_logits, target, alpha, beta, temperature).total


def _split(
    logits: Float[Tensor, "batch classes"], ids: Integer[Tensor, "batch 1"]
) -> tuple[Float[Tensor, "batch 2"], Float[Tensor, "batch classes"]]:
    """Log-probabilities of the target and of all others together; those among the others, 0 at the target."""
    # Measured from the target's logit, so that a large common part of a row costs no digits. The shift itself is a
    # constant: what the others are among themselves must not see the target's logit, not even by rounding.
    own = logits.gather(1, ids)
    others = (logits - own.detach()).scatter_(1, ids, -math.inf)
    whole = others.logsumexp(1)
    odds = whole - (own - own.detach()).squeeze(1)
    among = (others - whole[:, None]).scatter_(1, ids, 0.0)
    return F.logsigmoid(torch.stack([-odds, odds], 1)), among
