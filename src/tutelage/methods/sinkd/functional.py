"""SinKD: transport between the student's and the teacher's outputs of a batch (arXiv 2402.17110)."""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from tutelage.functional.checks import check_positive, check_same_shape
from tutelage.functional.divergences import tempered
from tutelage.functional.reductions import without_autocast
from tutelage.functional.token_divergences import forward_kl_loss
from tutelage.functional.transport import sinkhorn_plan

__all__ = ["annealed_temperature", "sinkd_cost", "sinkd_loss", "soft_cross_entropy_loss"]


def sinkd_loss(
    student_logits: Float[Tensor, "batch classes"],
    teacher_logits: Float[Tensor, "batch classes"],
    *,
    temperature: float | int = 2.0,
    epsilon: float | int = 0.1,
    n_iters: int = 20,
    p: float | int = 1.0,
    scale: float | int = 0.001,
    reduction: Literal["sum", "mean"] = "sum",
) -> Float[Tensor, ""]:
    """``scale · Σ_ij P_ij D_ij``: what it costs to move the student's outputs of a batch onto the teacher's, each
    sample of mass 1, with ``D`` of `sinkd_cost` and ``P`` its `sinkhorn_plan`.

    The gradient flows through both. Any order of the teacher's rows gives the same loss, so that it binds no sample to
    its own teacher output: use it beside cross-entropy or KD. It is above 0 at equality too, for the plan is blurred.
    One class alone gives 0: use a squared error for regression.

    Args:
        student_logits: ``[batch, classes]``; of token tasks the tokens that count, ``[tokens, vocabulary]``. Memory
            grows with the square of the rows.
        teacher_logits: ``[batch, classes]``; detached.
        temperature: softens both sides; above 0. Its square is no factor here.
        epsilon, n_iters: of `sinkhorn_plan`.
        p: of the distance between two outputs, at least 1.
        scale: factor of the loss.
        reduction: ``sum`` over the batch, which grows with it; ``mean`` divides by the batch's size.

    Returns:
        A scalar, at least float32; an empty batch gives 0 with a zero gradient.

    Raises:
        ValueError: shapes do not agree, an option is out of range, or a logit is NaN (looked for on the CPU alone).

    Source: Cui et al., "Sinkhorn Distance Minimization for Knowledge Distillation" (arXiv 2402.17110), and its code.
    """
    if reduction not in ("sum", "mean"):
        raise ValueError(f"reduction must be 'sum' or 'mean'; got {reduction!r}")
    cost = sinkd_cost(student_logits, teacher_logits, temperature=temperature, p=p)
    plan = sinkhorn_plan(cost, epsilon=epsilon, n_iters=n_iters)
    loss = scale * (plan * cost).sum()
    return loss if reduction == "sum" else loss / max(len(cost), 1)


def sinkd_cost(
    student_logits: Float[Tensor, "batch classes"],
    teacher_logits: Float[Tensor, "batch classes"],
    *,
    temperature: float | int = 2.0,
    p: float | int = 1.0,
) -> Float[Tensor, "batch batch"]:
    """``D_ij = ||softmax(student_i / T) - softmax(teacher_j / T)||_p`` of all pairs of a batch.

    Args:
        student_logits: ``[batch, classes]``.
        teacher_logits: ``[batch, classes]``; detached.
        temperature: T, above 0.
        p: of the norm, at least 1; with 1 the cost lies in [0, 2].

    Returns:
        ``[batch, batch]``, rows the student's, at least float32. Where two outputs agree, the gradient is 0.

    Raises:
        ValueError: as `sinkd_loss`.

    Source: Cui et al., "Sinkhorn Distance Minimization for Knowledge Distillation" (arXiv 2402.17110).
    """
    check_positive("temperature", temperature)
    if not p >= 1:
        raise ValueError(f"p must be at least 1; got {p}")
    check_same_shape(student_logits=student_logits, teacher_logits=teacher_logits)
    if student_logits.dim() != 2:
        raise ValueError(
            f"logits must be [batch, classes]; got {list(student_logits.shape)}; flatten the tokens that count"
        )
    for name, logits in (("student_logits", student_logits), ("teacher_logits", teacher_logits)):
        if logits.device.type == "cpu" and bool(logits.isnan().any()):
            raise ValueError(f"{name} hold NaN; the step that made them has failed")
    with without_autocast(student_logits):
        student = tempered(student_logits, temperature).softmax(-1)
        teacher = tempered(teacher_logits.detach(), temperature).softmax(-1)
        return torch.cdist(student, teacher, p=p, compute_mode="donot_use_mm_for_euclid_dist")


def soft_cross_entropy_loss(
    student_logits: Float[Tensor, "batch classes"],
    teacher_logits: Float[Tensor, "batch classes"],
    *,
    temperature: float | int = 1.0,
) -> Float[Tensor, ""]:
    """Cross-entropy with the teacher's softened output, ``-mean Σ p log q``; without a factor temperature².

    Args:
        student_logits: ``[batch, classes]``.
        teacher_logits: ``[batch, classes]``; detached.
        temperature: softens both sides; above 0.

    Returns:
        A scalar in nats, mean over rows, at least float32; an empty batch gives 0 with a zero gradient.

    Raises:
        ValueError: shapes do not agree, or the temperature is not above 0.

    Source: Cui et al., "Sinkhorn Distance Minimization for Knowledge Distillation" (arXiv 2402.17110), the KD term of
    its runs.
    """
    return forward_kl_loss(student_logits, teacher_logits, temperature=temperature, subtract_entropy=False)


def annealed_temperature(epoch: int, epochs: int, temperature: float | int) -> float:
    """The temperature of an epoch, on a line from ``temperature`` in the first to 1 in the last.

    Args:
        epoch: from 0 to epochs - 1.
        epochs: how many there are; a single one keeps the temperature.
        temperature: above 0.

    Raises:
        ValueError: no such epoch, or the temperature is not above 0.

    Source: the code of arXiv 2402.17110, its annealed KD term.
    """
    check_positive("temperature", temperature)
    if not 0 <= epoch < epochs:
        raise ValueError(f"epoch must be one of 0 … {epochs - 1}; got {epoch}")
    return float(temperature + (1 - temperature) * epoch / max(epochs - 1, 1))
