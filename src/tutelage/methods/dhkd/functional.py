"""Binary divergences from a teacher's logits, one gradient kept from opposing another, and how far classes collapse."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float, Integer
from torch import Tensor
from torch.nn import functional as F

from tutelage.functional.checks import check_class_ids, check_positive, check_same_shape
from tutelage.functional.classes import class_sums
from tutelage.functional.reductions import upcast

__all__ = [
    "NeuralCollapse",
    "align_gradients",
    "binary_kl_loss",
    "binary_kl_norm_loss",
    "gradient_dot",
    "neural_collapse",
]

Gradients = Sequence[Tensor | None]


def binary_kl_loss(
    student_logits: Float[Tensor, "*rows classes"],
    teacher_logits: Float[Tensor, "*rows classes"],
    temperature: float | int = 2.0,
    eps: float = 1e-8,
) -> Float[Tensor, ""]:
    """KL divergence of independent probabilities, ``temperature² · mean over rows Σ_c KL(r_c || q_c)``.

    ``q = sigmoid(student_logits / temperature)``, ``r`` likewise of the teacher, both kept within ``[eps, 1 - eps]``:
    beyond, the student has no gradient. Unlike a softmax it sees a shift that all classes share.

    Args:
        student_logits: ``[..., classes]``.
        teacher_logits: ``[..., classes]``, raw: neither probabilities nor log-probabilities; detached.
        temperature: softens both sides; above 0.
        eps: how near probabilities come to 0 and 1; in (0, 0.5).

    Returns:
        A scalar in nats, at least float32; a sum over classes, so it grows with their number. Without rows 0 with a
        zero gradient.

    Raises:
        ValueError: shapes do not agree, or an option is out of range.

    Source: Yang et al., "Dual-Head Knowledge Distillation: Enhancing Logits Utilization with an Auxiliary Head"
    (arXiv 2411.08937), BinaryKL.
    """
    limit = _limit(student_logits, teacher_logits, temperature, eps)
    student = (upcast(student_logits) / temperature).clamp(-limit, limit)
    teacher = (upcast(teacher_logits.detach()) / temperature).clamp(-limit, limit)
    # log q - log(1 - q) is the logit itself. sigmoid and log are several times faster than softplus on a CPU.
    divergence = teacher.sigmoid() * (teacher - student) + (_log_other(teacher) - _log_other(student))
    return divergence.sum() * (temperature**2 / _rows(student_logits))


def binary_kl_norm_loss(
    student_logits: Float[Tensor, "*rows classes"],
    teacher_logits: Float[Tensor, "*rows classes"],
    temperature: float | int = 2.0,
    eps: float = 1e-8,
) -> Float[Tensor, ""]:
    """How far the differences of two models' logits are from 0, ``temperature² · mean over rows Σ_c KL(½ || q_c)``.

    ``q = sigmoid((student_logits - teacher_logits) / temperature)``, kept within ``[eps, 1 - eps]``. Like
    ``difference² / 8`` near 0, like ``temperature · |difference| / 2`` further out, and without a gradient beyond.

    Args:
        student_logits: ``[..., classes]``.
        teacher_logits: ``[..., classes]``, raw: neither probabilities nor log-probabilities; detached.
        temperature: where the square turns into a line; above 0.
        eps: how near ``q`` comes to 0 and 1; in (0, 0.5).

    Returns:
        A scalar in nats, at least float32; a sum over classes, so it grows with their number. Without rows 0 with a
        zero gradient.

    Raises:
        ValueError: shapes do not agree, or an option is out of range.

    Source: Yang et al., "Dual-Head Knowledge Distillation: Enhancing Logits Utilization with an Auxiliary Head"
    (arXiv 2411.08937), BinaryKL-Norm, as the authors' code trains with it.
    """
    limit = _limit(student_logits, teacher_logits, temperature, eps)
    difference = upcast(student_logits) - upcast(teacher_logits.detach())
    logit = (difference / temperature).clamp(-limit, limit)
    divergence = -_log_other(logit) - logit / 2 - math.log(2)
    return divergence.sum() * (temperature**2 / _rows(student_logits))


def gradient_dot(primary: Gradients, secondary: Gradients) -> Float[Tensor, ""]:
    """Dot product of two gradients, each a list over the same parameters; None entries are zeros.

    Gradients of sharded parameters (DTensor) count whole: every rank of their mesh must call.

    Returns:
        A scalar, at least float32; 0 where no parameter has both.

    Raises:
        ValueError: the lists or the shapes in them differ.

    Source: Yang et al., "Dual-Head Knowledge Distillation: Enhancing Logits Utilization with an Auxiliary Head"
    (arXiv 2411.08937), gradient alignment.
    """
    return _dot(_pairs(primary, secondary), [g for g in (*primary, *secondary) if g is not None])


def align_gradients(primary: Gradients, secondary: Gradients) -> list[Tensor | None]:
    """``primary + secondary``, the second without its part against the first.

    Where ``d = <secondary, primary>`` over all parameters together is below 0, ``secondary - d / ‖primary‖² · primary``
    takes its place; primary is never changed, and one of zeros changes nothing.

    Args:
        primary: the gradient that is kept, one entry a parameter; None entries are zeros.
        secondary: the gradient that gives way, over the same parameters.

    Returns:
        The merged gradient in the same order and shapes; None where both have none.

    Raises:
        ValueError: the lists or the shapes in them differ.

    Source: Yang et al., "Dual-Head Knowledge Distillation: Enhancing Logits Utilization with an Auxiliary Head"
    (arXiv 2411.08937), gradient alignment.
    """
    own = [gradient for gradient in primary if gradient is not None]
    dot, length = gradient_dot(primary, secondary), _dot([(g, g) for g in own], own)
    kept = 1 - torch.where(length > 0, dot.clamp(max=0) / torch.where(length > 0, length, 1.0), 0.0)
    merged: list[Tensor | None] = []
    for first, second in zip(primary, secondary, strict=True):
        grown = None if first is None else first * kept.to(first.dtype)
        merged.append(second if grown is None else grown if second is None else grown + second)
    return merged


class NeuralCollapse(NamedTuple):
    """How far features and classifier are from a simplex: 0 at a full collapse, which training on labels tends to.

    Attributes:
        within: NC1, ``trace(Σ_within · pinv(Σ_between)) / classes``.
        mean_norms, mean_angles: NC2 of the centred class means: standard deviation of their lengths over the mean
            length; mean over pairs of ``|cos + 1 / (classes - 1)|``.
        weight_norms, weight_angles: NC2 of the classifier's rows, likewise; none without a classifier.
        duality: NC3, squared distance of the classifier's rows from the centred means, each scaled to length 1 as a
            whole: from 0 to 4; none without a classifier.
    """

    within: Tensor
    mean_norms: Tensor
    mean_angles: Tensor
    weight_norms: Tensor | None = None
    weight_angles: Tensor | None = None
    duality: Tensor | None = None


def neural_collapse(
    features: Float[Tensor, "rows features"],
    target: Integer[Tensor, " rows"],
    num_classes: int,
    classifier: Float[Tensor, "classes features"] | None = None,
) -> NeuralCollapse:
    """Measures of neural collapse of a classifier's inputs, and of its weights; computed in float64.

    Args:
        features: ``[rows, features]``, the classifier's inputs; detached.
        target: class ids ``[rows]``; every class needs a row.
        num_classes: how many there are, at least 2.
        classifier: the classifier's weight ``[classes, features]``; detached.

    Raises:
        ValueError: fewer than two classes, a class without rows, or shapes or ids that do not fit.

    Source: Papyan, Han, Donoho, "Prevalence of Neural Collapse during the terminal phase of deep learning training"
    (arXiv 2008.08186), NC1 to NC3.
    """
    if num_classes < 2:
        raise ValueError(
            f"neural collapse compares classes: num_classes must be at least 2; got {num_classes}"
        )
    check_class_ids(target, len(features), num_classes)
    if classifier is not None and classifier.shape != (num_classes, features.shape[1]):
        raise ValueError(
            f"the classifier must be {[num_classes, features.shape[1]]} for features {list(features.shape)}; got "
            f"shape {list(classifier.shape)}"
        )
    rows = features.detach().double()
    found = class_sums(rows, target, num_classes)
    if bool((found.counts == 0).any()):
        empty = torch.nonzero(found.counts == 0).flatten().tolist()
        raise ValueError(f"neural collapse needs rows of every class; there are none of {empty}")
    centred = found.means - found.means.mean(0)
    apart = rows - found.means[target]
    between, within = centred.T @ centred / num_classes, apart.T @ apart / len(rows)
    measures = NeuralCollapse(
        torch.trace(torch.linalg.pinv(between, hermitian=True) @ within) / num_classes, *_simplex(centred)
    )
    if classifier is None:
        return measures
    weight = classifier.detach().double()
    norms, angles = _simplex(weight)
    duality = (_unit(weight) - _unit(centred)).square().sum()
    return measures._replace(weight_norms=norms, weight_angles=angles, duality=duality)


def _simplex(rows: Float[Tensor, "classes features"]) -> tuple[Tensor, Tensor]:
    """How unequal lengths are, and how far the cosines are from those of a simplex."""
    lengths = torch.linalg.vector_norm(rows, dim=1)
    cosines = F.normalize(rows, dim=1) @ F.normalize(rows, dim=1).T
    count = len(rows)
    others = ~torch.eye(count, dtype=torch.bool, device=rows.device)
    spread = lengths.std(correction=0) / lengths.mean().clamp_min(torch.finfo(rows.dtype).tiny)
    return spread, (cosines[others] + 1 / (count - 1)).abs().mean()


def _unit(rows: Float[Tensor, "classes features"]) -> Float[Tensor, "classes features"]:
    unit: Tensor = rows / torch.linalg.matrix_norm(rows).clamp_min(torch.finfo(rows.dtype).tiny)
    return unit


def _limit(student: Tensor, teacher: Tensor, temperature: float | int, eps: float) -> float:
    """The logit of ``1 - eps``, after the checks that both losses share."""
    check_positive("temperature", temperature)
    if not 0 < eps < 0.5:
        raise ValueError(f"eps must lie in (0, 0.5); got {eps}")
    check_same_shape(student_logits=student, teacher_logits=teacher)
    return math.log1p(-eps) - math.log(eps)


def _log_other(logit: Tensor) -> Tensor:
    """``log(1 - sigmoid(logit))``; never log 0, since the logit is bounded."""
    return (-logit).sigmoid().log()


def _rows(logits: Tensor) -> int:
    return max(logits.shape[:-1].numel(), 1)


def _pairs(primary: Gradients, secondary: Gradients) -> list[tuple[Tensor, Tensor]]:
    if len(primary) != len(secondary):
        raise ValueError(
            f"both gradients must be over the same parameters; got {len(primary)} and {len(secondary)} entries"
        )
    pairs = [
        (one, two) for one, two in zip(primary, secondary, strict=True) if one is not None and two is not None
    ]
    for one, two in pairs:
        check_same_shape(primary=one, secondary=two)
    return pairs


def _dot(pairs: Sequence[tuple[Tensor, Tensor]], like: Sequence[Tensor]) -> Tensor:
    """Sum of all products. Those of DTensors are left partial until the end: one exchange for all of them."""
    if not pairs:
        return torch.zeros((), device=like[0].device if like else None)
    total: Tensor = functools.reduce(torch.add, [(upcast(one) * upcast(two)).sum() for one, two in pairs])
    gather: Callable[[], Tensor] | None = getattr(total, "full_tensor", None)
    return total if gather is None else gather()
