"""Losses between correlations of class probabilities."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from tutelage.functional.checks import check_positive, check_same_shape
from tutelage.functional.divergences import tempered

__all__ = ["dist_loss"]


def dist_loss(
    student_logits: Float[Tensor, "batch classes"],
    teacher_logits: Float[Tensor, "batch classes"],
    beta: float | int = 1.0,
    gamma: float | int = 1.0,
    temperature: float | int = 1.0,
    eps: float = 1e-8,
) -> Float[Tensor, ""]:
    """One minus Pearson's correlation of the probabilities, by rows (weight beta) and by columns (weight gamma).

    ``temperature² · (beta · (1 - mean over rows r(p_s[i,:], p_t[i,:])) + gamma · (1 - mean over classes
    r(p_s[:,j], p_t[:,j])))``, with ``p = softmax(logits / temperature)`` and
    ``r(a, b) = <a - mean a, b - mean b> / (|a - mean a| |b - mean b| + eps)``. What does not vary has correlation 0:
    in a batch of one the second part is gamma, without a gradient.

    Args:
        student_logits: ``[batch, classes]``.
        teacher_logits: ``[batch, classes]``; detached.
        beta: weight of the relation between classes within a row.
        gamma: weight of the relation between rows within a class.
        temperature: softens both sides; above 0. The paper has 1; the factor temperature² is that of later users.
        eps: of the correlation; above 0. It leaves about eps over the product of norms where both sides agree.

    Returns:
        A scalar, at least float32; an empty batch gives 0 with a zero gradient.

    Raises:
        ValueError: shapes do not agree, fewer than two classes, or temperature or eps not above 0.

    Source: Huang et al., "Knowledge Distillation from A Stronger Teacher" (arXiv 2205.10536), equations 5 to 10.
    """
    check_positive("temperature", temperature)
    check_positive("eps", eps)
    check_same_shape(student_logits=student_logits, teacher_logits=teacher_logits)
    rows, classes = student_logits.shape
    if classes < 2:
        raise ValueError(f"dist needs at least 2 classes; got {classes}")
    student = tempered(student_logits, temperature).softmax(1)
    if not rows:
        return student.sum()
    teacher = tempered(teacher_logits.detach(), temperature).softmax(1)
    # The mean of a row of probabilities is known.
    inter = 1 - _correlation(student - 1 / classes, teacher - 1 / classes, 1, eps).mean()
    intra = 1 - _correlation(student - student.mean(0), teacher - teacher.mean(0), 0, eps).mean()
    return (beta * inter + gamma * intra) * temperature**2


def _correlation(
    student: Float[Tensor, "batch classes"], teacher: Float[Tensor, "batch classes"], dim: int, eps: float
) -> Float[Tensor, " other"]:
    """Pearson's correlation along ``dim`` of what has mean 0 along it."""
    norms: Tensor = torch.linalg.vector_norm(student, dim=dim) * torch.linalg.vector_norm(teacher, dim=dim)
    return (student * teacher).sum(dim) / (norms + eps)
