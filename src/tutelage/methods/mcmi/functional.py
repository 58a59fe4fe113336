"""Conditional mutual information of a classifier's answers, as pure functions of tensors."""

from __future__ import annotations

from typing import NamedTuple

import torch.nn.functional as F
from jaxtyping import Float, Integer
from torch import Tensor

from tutelage.functional.checks import check_class_ids, check_positive, check_share
from tutelage.functional.classes import class_sums
from tutelage.functional.reductions import upcast

__all__ = [
    "MCMILoss",
    "class_centroids",
    "conditional_mutual_information",
    "mcmi_loss",
    "update_class_centroids",
]

_TOLERANCE = 1e-4
"""How far a centroid's sum may be from 1."""


class MCMILoss(NamedTuple):
    """The loss, and its two parts unweighted, in nats."""

    loss: Tensor
    cross_entropy: Tensor
    cmi: Tensor


def mcmi_loss(
    logits: Float[Tensor, "batch classes"],
    target: Integer[Tensor, " batch"],
    centroids: Float[Tensor, "classes classes"],
    *,
    cmi_weight: float | int = 0.15,
    eps: float = 1e-12,
) -> MCMILoss:
    """``CE - cmi_weight · CMI``: likely labels, and answers that differ within a class. It can be below 0.

    Args:
        logits: ``[batch, classes]`` of the teacher that is tuned.
        target: class ids ``[batch]``.
        centroids: row ``y`` is the mean answer to rows of class ``y``; detached.
        cmi_weight: 0 and above.
        eps: centroids are raised to it before the logarithm.

    Returns:
        Scalars, means over rows, at least float32; without rows 0 with a zero gradient.

    Raises:
        ValueError: shapes do not fit, a label names no class, the weight is below 0, or (on the CPU) a centroid has a
            negative entry or does not sum to 1.

    Source: Ye et al., "Bayes Conditional Distribution Estimation for Knowledge Distillation Based on Conditional Mutual
    Information" (arXiv 2401.08732).
    """
    if not cmi_weight >= 0:
        raise ValueError(f"cmi_weight must be 0 or above; got {cmi_weight}")
    log_probs = _log_probabilities(logits, target)
    cross_entropy = F.nll_loss(log_probs, target.long(), reduction="sum") / max(len(target), 1)
    cmi = _distance(log_probs, target, _checked(centroids, logits), eps)
    return MCMILoss(cross_entropy - cmi_weight * cmi, cross_entropy, cmi)


def conditional_mutual_information(
    logits: Float[Tensor, "batch classes"],
    target: Integer[Tensor, " batch"],
    centroids: Float[Tensor, "classes classes"] | None = None,
    *,
    eps: float = 1e-12,
) -> Float[Tensor, ""]:
    """``mean KL(p_x || q_y)`` in nats: how much an answer still says of the row once its class is known.

    With the class means of these very rows it is the empirical ``I(X; Y' | Y)``, between 0 (one answer a class) and the
    lower of ``log classes`` and ``H(Y' | Y)``; any other centroids give more.

    Args:
        logits: ``[batch, classes]``.
        target: class ids ``[batch]``.
        centroids: as in `mcmi_loss`; None: the class means of these logits. No gradient reaches them.
        eps: as in `mcmi_loss`.

    Returns:
        A scalar, at least float32; without rows 0 with a zero gradient.

    Raises:
        ValueError: as `mcmi_loss`.
    """
    log_probs = _log_probabilities(logits, target)
    known = class_centroids(logits, target) if centroids is None else _checked(centroids, logits)
    return _distance(log_probs, target, known, eps)


def class_centroids(
    logits: Float[Tensor, "batch classes"],
    target: Integer[Tensor, " batch"],
    *,
    num_classes: int | None = None,
) -> Float[Tensor, "classes classes"]:
    """Mean answer to the rows of each class.

    Args:
        logits: ``[batch, classes]``.
        target: class ids ``[batch]``.
        num_classes: what ``logits`` must have; None: as many as they have.

    Returns:
        ``[classes, classes]``, at least float32, detached; every row sums to 1. A class without rows gets the uniform
        distribution, which no row of these ever reads.

    Raises:
        ValueError: shapes do not fit, or a label names no class.
    """
    if num_classes is not None and num_classes != logits.shape[1]:
        raise ValueError(f"num_classes is {num_classes}, but the logits have {logits.shape[1]} classes")
    probabilities = _log_probabilities(logits.detach(), target).exp()
    return normalised(class_sums(probabilities, target.long(), logits.shape[1]).sums)


def update_class_centroids(
    centroids: Float[Tensor, "classes classes"],
    logits: Float[Tensor, "classes samples classes"],
    *,
    decay: float | int = 0.9999,
) -> Float[Tensor, "classes classes"]:
    """One step of a moving average towards the mean answer to a few rows of every class; rows are normalised again.

    Args:
        centroids: ``[classes, classes]``.
        logits: ``[classes, samples, classes]``, at least one sample a class.
        decay: of what was there, in [0, 1].

    Returns:
        New centroids, detached.

    Raises:
        ValueError: shapes do not fit, there are no samples, the decay lies outside [0, 1], or centroids as in
            `mcmi_loss`.
    """
    check_share("decay", decay)
    known = _checked(centroids, logits[:, 0] if logits.shape[1] else logits.flatten(0, 1))
    if logits.dim() != 3 or len(logits) != len(known) or not logits.shape[1]:
        raise ValueError(
            f"logits must be [{len(known)}, samples, {len(known)}] with a sample or more; got {list(logits.shape)}"
        )
    fresh = upcast(logits.detach()).softmax(2).mean(1)
    return normalised(decay * known.to(fresh.dtype) + (1 - decay) * fresh)


def normalised(sums: Float[Tensor, "classes classes"]) -> Float[Tensor, "classes classes"]:
    """Rows divided by their sums; uniform where a row is all zeros."""
    totals = sums.sum(1, keepdim=True)
    return (sums / totals).masked_fill(totals == 0, 1 / max(sums.shape[1], 1))


def _log_probabilities(
    logits: Float[Tensor, "batch classes"], target: Integer[Tensor, " batch"]
) -> Float[Tensor, "batch classes"]:
    check_class_ids(target, *logits.shape)
    return upcast(logits).log_softmax(1)


def _distance(
    log_probs: Float[Tensor, "batch classes"],
    target: Integer[Tensor, " batch"],
    centroids: Float[Tensor, "classes classes"],
    eps: float,
) -> Float[Tensor, ""]:
    check_positive("eps", eps)
    log_centroids = centroids.to(log_probs.dtype)[target.long()].clamp_(min=eps).log_()
    return (log_probs.exp() * (log_probs - log_centroids)).sum() / max(len(target), 1)


def _checked(centroids: Tensor, logits: Float[Tensor, "batch classes"]) -> Float[Tensor, "classes classes"]:
    classes = logits.shape[-1]
    if centroids.shape != (classes, classes):
        raise ValueError(
            f"centroids must be [{classes}, {classes}], a row a class; got {list(centroids.shape)}"
        )
    centroids = centroids.detach()
    if centroids.device.type == "cpu" and classes:
        low, off = float(centroids.min()), float((centroids.sum(1) - 1).abs().max())
        if not (low >= 0 and off <= _TOLERANCE):
            raise ValueError(
                f"every centroid is a distribution; the smallest entry is {low:g}, and the sums are up to {off:g} "
                "away from 1"
            )
    return centroids
