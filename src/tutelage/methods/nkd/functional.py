"""The losses of NKD and USKD (arXiv 2303.13005)."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Integer
from torch import Tensor

from tutelage.functional.checks import check_positive, check_same_shape, check_share, check_target
from tutelage.functional.divergences import log_softmax_without, softmax_without, tempered
from tutelage.functional.reductions import masked_mean, upcast

__all__ = [
    "NKDTerms",
    "USKDTerms",
    "nkd_loss",
    "nkd_terms",
    "uskd_linear_loss",
    "uskd_loss",
    "uskd_soft_target",
    "zipf_labels",
]

RankForm = Literal["code", "paper"]

_SCORE_EPS = 1e-6


class NKDTerms(NamedTuple):
    """The two parts of NKD, scalars without gamma and temperature²."""

    target: Float[Tensor, ""]
    nontarget: Float[Tensor, ""]


class USKDTerms(NamedTuple):
    """USKD: the weighted total, and its three parts without their weights."""

    total: Float[Tensor, ""]
    target: Float[Tensor, ""]
    nontarget: Float[Tensor, ""]
    weak: Float[Tensor, ""]


def nkd_terms(
    student_logits: Float[Tensor, "batch classes"],
    teacher_logits: Float[Tensor, "batch classes"],
    target: Integer[Tensor, " batch"] | Float[Tensor, "batch classes"],
    temperature: float | int = 1.0,
) -> NKDTerms:
    """The teacher's cross-entropy, split at the target class ``t``, the other classes renormalised to sum to one.

    - ``target = -mean(T_t log S_t)``, at temperature 1 whatever ``temperature`` is;
    - ``nontarget = -mean(Σ_{i≠t} T^_i log S^_i)``, softmaxes over the other classes of ``logits / temperature``.

    Both are cross-entropies: the least value of ``nontarget`` is the entropy of ``T^``, not 0. With two classes it is 0
    with a zero gradient, and it never moves the target's logit.

    Args:
        student_logits: ``[batch, classes]``.
        teacher_logits: ``[batch, classes]``; detached.
        target: class ids ``[batch]``, or distributions ``[batch, classes]`` whose largest entry is the target class.
        temperature: of the non-target part; above 0.

    Returns:
        Scalars in nats, means over rows, at least float32; an empty batch gives 0 with a zero gradient.

    Raises:
        ValueError: shapes do not agree, fewer than two classes, or a temperature not above 0.
        IndexError: a class id is out of range.

    Source: arXiv 2303.13005, equations of NKD; the authors' code for soft labels.
    """
    check_positive("temperature", temperature)
    check_same_shape(student_logits=student_logits, teacher_logits=teacher_logits)
    check_target(target, student_logits)
    if student_logits.shape[1] < 2:
        raise ValueError(f"nkd needs at least 2 classes; got {student_logits.shape[1]}")
    teacher_logits = teacher_logits.detach()
    ids = (target.argmax(1) if target.dim() == 2 else target.long())[:, None]
    log_student = upcast(student_logits).log_softmax(-1).gather(1, ids)
    teacher = upcast(teacher_logits).softmax(-1).gather(1, ids)
    log_others = log_softmax_without(tempered(student_logits, temperature), ids)
    others = softmax_without(tempered(teacher_logits, temperature), ids)
    return NKDTerms(-masked_mean(teacher * log_student), -masked_mean((others * log_others).sum(-1)))


def nkd_loss(
    student_logits: Float[Tensor, "batch classes"],
    teacher_logits: Float[Tensor, "batch classes"],
    target: Integer[Tensor, " batch"] | Float[Tensor, "batch classes"],
    gamma: float | int = 1.5,
    temperature: float | int = 1.0,
) -> Float[Tensor, ""]:
    """``target + gamma · temperature² · nontarget`` of `nkd_terms`; a training loop adds its label loss.

    Args:
        student_logits: ``[batch, classes]``.
        teacher_logits: ``[batch, classes]``; detached.
        target: class ids ``[batch]``, or distributions ``[batch, classes]``.
        gamma: weight of the non-target part.
        temperature: of the non-target part; above 0.

    Returns:
        A scalar in nats, mean over rows, at least float32.

    Raises:
        ValueError, IndexError: as `nkd_terms`.

    Source: arXiv 2303.13005.
    """
    terms = nkd_terms(student_logits, teacher_logits, target, temperature)
    return terms.target + gamma * temperature**2 * terms.nontarget


def uskd_loss(
    student_logits: Float[Tensor, "batch classes"],
    weak_logits: Float[Tensor, "batch classes"],
    target: Integer[Tensor, " batch"] | Float[Tensor, "batch classes"],
    alpha: float | int = 1.0,
    beta: float | int = 0.1,
    mu: float | int = 0.005,
    smoothing: float | int = 0.1,
    rank_form: RankForm = "code",
) -> USKDTerms:
    """Self-distillation without a teacher: ``alpha · target + beta · nontarget + mu · weak``.

    - ``target``: cross-entropy with the soft target label of `uskd_soft_target`;
    - ``nontarget``: cross-entropy with `zipf_labels` over the classes that carry no label, both sides renormalised;
      the rank of a class comes from the weak head's probability and the student's own log-probability;
    - ``weak``: smoothed cross-entropy of the weak head. It alone gives ``weak_logits`` a gradient.

    A soft target counts with its two largest entries. The target label's batch mean is that of this process.

    Args:
        student_logits: ``[batch, classes]``.
        weak_logits: ``[batch, classes]``, from an intermediate feature.
        target: class ids ``[batch]``, or distributions ``[batch, classes]``.
        alpha, beta, mu: weights of the three parts.
        smoothing: of the weak head's label, in [0, 1].
        rank_form: ``code``: the student's log-probabilities in the rank score, as the authors' code has it;
            ``paper``: its probabilities.

    Returns:
        Scalars in nats, means over rows, at least float32; an empty batch gives 0 with a zero gradient.

    Raises:
        ValueError: shapes do not agree, too few classes (2 for ids, 3 for soft targets), or a bad smoothing or rank
            form.
        IndexError: a class id is out of range.

    Source: arXiv 2303.13005, equations of USKD; the authors' code for the rank score.
    """
    check_share("smoothing", smoothing)
    check_same_shape(student_logits=student_logits, weak_logits=weak_logits)
    check_target(target, student_logits)
    if rank_form not in ("code", "paper"):
        raise ValueError(f"rank_form must be 'code' or 'paper'; got {rank_form!r}")
    student_logits = upcast(student_logits)
    log_student = student_logits.log_softmax(-1)
    log_weak = upcast(weak_logits).log_softmax(-1)
    soft, ids = _soft_target(log_student.detach(), target)
    zipf = zipf_labels(_rank_scores(log_student.detach(), log_weak.detach(), ids, rank_form), ids)
    target_term = -masked_mean((soft * log_student.gather(1, ids)).sum(-1))
    nontarget = -masked_mean((zipf * log_softmax_without(student_logits, ids)).sum(-1))
    weak = _smoothed_cross_entropy(log_weak, target, smoothing)
    total = alpha * target_term + beta * nontarget + mu * weak
    return USKDTerms(total, target_term, nontarget, weak)


def uskd_linear_loss(
    student_logits: Float[Tensor, "batch classes"],
    weak_features: Float[Tensor, "batch features"],
    weak_weight: Float[Tensor, "classes features"],
    weak_bias: Float[Tensor, " classes"],
    target: Integer[Tensor, " batch"] | Float[Tensor, "batch classes"],
    **options: Any,
) -> USKDTerms:
    """`uskd_loss` with ``weak_logits = weak_features @ weak_weight.T + weak_bias``, for loops without a module.

    Args:
        student_logits: ``[batch, classes]``.
        weak_features: ``[batch, features]``, pooled; gradients reach them.
        weak_weight, weak_bias: the weak head, ``[classes, features]`` and ``[classes]``.
        target: class ids ``[batch]``, or distributions ``[batch, classes]``.
        options: alpha, beta, mu, smoothing, rank_form of `uskd_loss`.

    Raises:
        ValueError, IndexError: as `uskd_loss`.
    """
    with torch.autocast(weak_features.device.type, enabled=False):
        weak_logits = F.linear(upcast(weak_features), upcast(weak_weight), upcast(weak_bias))
    return uskd_loss(student_logits, weak_logits, target, **options)


def uskd_soft_target(
    student_logits: Float[Tensor, "batch classes"],
    target: Integer[Tensor, " batch"] | Float[Tensor, "batch classes"],
) -> tuple[Float[Tensor, "batch labels"], Integer[Tensor, "batch labels"]]:
    """The student's own soft label of the target classes, ``p = V + (q² - mean over the batch of q²)``.

    ``q`` is the student's probability of the label class and ``V`` the label's value; p is 0 where V is. It is not
    clamped: it may pass 1, or fall below 0 for small V. In a batch of one p = V.

    Args:
        student_logits: ``[batch, classes]``; detached.
        target: class ids ``[batch]`` (one label a row, V = 1), or distributions ``[batch, classes]`` (the two largest
            entries; among equal ones the lower class first).

    Returns:
        ``p`` and the label classes' ids, both ``[batch, labels]``, detached.

    Raises:
        ValueError, IndexError: as `uskd_loss`.

    Source: arXiv 2303.13005, soft label of the target class.
    """
    check_target(target, student_logits)
    return _soft_target(upcast(student_logits.detach()).log_softmax(-1), target)


def zipf_labels(
    scores: Float[Tensor, "batch classes"], exclude: Integer[Tensor, "batch labels"]
) -> Float[Tensor, "batch classes"]:
    """Zipf's law over the rank of the scores: ``1 / rank``, 0 at the excluded classes, rows renormalised to one.

    The rank (1 for the highest score; among equal ones the lower class first) counts all classes, the excluded ones
    too, as in the authors' code.

    Args:
        scores: ``[batch, classes]``; detached.
        exclude: class ids ``[batch, labels]``, distinct within a row.

    Returns:
        ``[batch, classes]``, detached, at least float32.

    Raises:
        ValueError: no class is left.

    Source: arXiv 2303.13005, soft labels of the non-target classes.
    """
    classes, labels = scores.shape[1], exclude.shape[1]
    if classes <= labels:
        raise ValueError(
            f"zipf labels need more than {labels} classes, since {labels} are excluded; got {classes}"
        )
    scores = upcast(scores.detach())
    order = scores.argsort(dim=1, descending=True, stable=True)
    zipf = torch.arange(1, classes + 1, dtype=scores.dtype, device=scores.device).reciprocal()
    share = torch.empty_like(scores).scatter_(1, order, zipf.expand_as(scores)).scatter_(1, exclude, 0.0)
    return share / share.sum(1, keepdim=True)


def _soft_target(
    log_student: Float[Tensor, "batch classes"],
    target: Integer[Tensor, " batch"] | Float[Tensor, "batch classes"],
) -> tuple[Float[Tensor, "batch labels"], Integer[Tensor, "batch labels"]]:
    if target.dim() == 2:
        # A stable sort, not topk: which of several equal entries comes second must not depend on the device.
        ordered, order = target.detach().sort(dim=1, descending=True, stable=True)
        value, ids = upcast(ordered[:, :2]), order[:, :2]
    else:
        ids = target.long()[:, None]
        value = torch.ones_like(ids, dtype=log_student.dtype)
    squared = log_student.gather(1, ids).exp().square()
    return torch.where(value == 0, 0.0, value + (squared - squared.mean(0))), ids


def _rank_scores(
    log_student: Float[Tensor, "batch classes"],
    log_weak: Float[Tensor, "batch classes"],
    ids: Integer[Tensor, "batch labels"],
    form: RankForm,
) -> Float[Tensor, "batch classes"]:
    def relative(values: Tensor) -> Tensor:
        return values / (1 - values.gather(1, ids).sum(1, keepdim=True) + _SCORE_EPS)

    return relative(log_weak.exp()) + relative(log_student if form == "code" else log_student.exp())


def _smoothed_cross_entropy(
    log_probs: Float[Tensor, "batch classes"],
    target: Integer[Tensor, " batch"] | Float[Tensor, "batch classes"],
    smoothing: float | int,
) -> Float[Tensor, ""]:
    if target.dim() == 2:
        hit = (target.detach() * log_probs).sum(1)
    else:
        hit = log_probs.gather(1, target.long()[:, None])[:, 0]
    return -masked_mean((1 - smoothing) * hit + smoothing * log_probs.mean(1))
