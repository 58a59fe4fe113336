"""The tensor math of class-incremental learning with weight aligning (WA, arXiv 1911.07053)."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Integer, Shaped
from torch import Tensor

from tutelage.functional.checks import check_positive, check_same_shape, check_share, check_target
from tutelage.functional.divergences import tempered
from tutelage.functional.reductions import masked_mean, upcast

__all__ = [
    "IncrementalAccuracy",
    "WALoss",
    "WeightAlignment",
    "herding_selection",
    "incremental_accuracy",
    "old_to_new_rate",
    "wa_align_logits",
    "wa_distillation_loss",
    "wa_loss",
    "weight_align",
    "weight_align_gamma",
]


class WALoss(NamedTuple):
    """The weighted loss and its two parts without their weights, scalars."""

    loss: Float[Tensor, ""]
    classification: Float[Tensor, ""]
    distillation: Float[Tensor, ""]


class WeightAlignment(NamedTuple):
    """The aligned weight ``[classes, features]`` and the factor on its newest rows."""

    weight: Float[Tensor, "classes features"]
    gamma: Float[Tensor, ""]


class IncrementalAccuracy(NamedTuple):
    """Accuracy on all seen classes after each step ``[steps]``, its average, the last one, and forgetting; shares."""

    by_step: Float[Tensor, " steps"]
    average: Float[Tensor, ""]
    last: Float[Tensor, ""]
    forgetting: Float[Tensor, ""]


def wa_loss(
    student_logits: Float[Tensor, "batch classes"],
    target: Integer[Tensor, " batch"],
    teacher_logits: Float[Tensor, "batch old"] | None = None,
    *,
    weight: float | int | None = None,
    temperature: float | int = 2.0,
    teacher_gamma: float | int | Float[Tensor, ""] | Float[Tensor, "*one"] = 1.0,
    teacher_newest_start: int = 0,
) -> WALoss:
    """``weight · distillation + (1 - weight) · classification`` of one batch of new and remembered samples.

    Classification is the cross-entropy over all classes, distillation is `wa_distillation_loss` on the old ones.
    Without a teacher (the first step) the loss is the classification alone, whatever the weight.

    Args:
        student_logits: ``[batch, classes]``, classes in task order: the old ones first.
        target: class ids ``[batch]``.
        teacher_logits: ``[batch, old]`` of the last step's aligned model; detached.
        weight: of distillation, in [0, 1]; left out: the old classes' share of all, ``old / classes``.
        temperature: of distillation; above 0.
        teacher_gamma: factor on ``teacher_logits[:, teacher_newest_start:]``, for a teacher whose own alignment is not
            folded into its weights.
        teacher_newest_start: the first of those columns.

    Returns:
        Scalars in nats, means over rows, at least float32; an empty batch gives 0 with a zero gradient.

    Raises:
        ValueError: a label is out of range, shapes, weight or temperature do not fit, or a logit is NaN (looked for on
            the CPU only, since elsewhere it would wait for the device).

    Source: arXiv 1911.07053, section on knowledge distillation; the authors' code for the reduction.
    """
    check_target(target, student_logits)
    if target.dim() != 1:
        raise ValueError(f"target must be class ids [batch]; got shape {list(target.shape)}")
    if weight is not None:
        check_share("weight", weight)
    log_student = upcast(student_logits).log_softmax(-1)
    classification = -masked_mean(log_student.gather(1, target.long()[:, None]))
    if teacher_logits is None:
        result = WALoss(classification, classification, torch.zeros_like(classification))
    else:
        teacher_logits = wa_align_logits(upcast(teacher_logits.detach()), teacher_newest_start, teacher_gamma)
        distillation = wa_distillation_loss(student_logits, teacher_logits, temperature=temperature)
        share = teacher_logits.shape[1] / student_logits.shape[1] if weight is None else weight
        result = WALoss(share * distillation + (1 - share) * classification, classification, distillation)
    if result.loss.device.type == "cpu" and result.loss.isnan():
        raise ValueError("the loss is NaN: student_logits or teacher_logits hold NaN or infinite values")
    return result


def wa_distillation_loss(
    student_logits: Float[Tensor, "batch classes"],
    teacher_logits: Float[Tensor, "batch old"],
    *,
    temperature: float | int = 2.0,
) -> Float[Tensor, ""]:
    """Cross-entropy of the softened old-class distributions, ``-mean Σ_{k<old} q_k log p_k``.

    ``q = softmax(teacher / temperature)``, ``p = softmax(student[:, :old] / temperature)``: the student is normalised
    over the old columns alone. There is no factor temperature², and the least value is the entropy of q, not 0.

    Args:
        student_logits: ``[batch, classes]``, the old classes first.
        teacher_logits: ``[batch, old]``, ``1 <= old <= classes``; detached.
        temperature: above 0.

    Returns:
        A scalar in nats, mean over rows, at least float32; an empty batch gives 0 with a zero gradient.

    Raises:
        ValueError: no old class, more old classes than classes, unequal rows, or a temperature not above 0.

    Source: arXiv 1911.07053, distillation loss; the authors' code.
    """
    check_positive("temperature", temperature)
    (rows, classes), (teacher_rows, old) = student_logits.shape, teacher_logits.shape
    if not 1 <= old <= classes or rows != teacher_rows:
        raise ValueError(
            f"teacher_logits must be [{rows}, old] with old in 1 … {classes}, the student's classes; "
            f"got {[teacher_rows, old]}"
        )
    log_student = tempered(student_logits[:, :old], temperature).log_softmax(-1)
    teacher = tempered(teacher_logits.detach(), temperature).softmax(-1)
    return -masked_mean((teacher * log_student).sum(-1))


@torch.no_grad()
def weight_align_gamma(
    weight: Float[Tensor, "classes features"],
    old_classes: int,
    *,
    norm: float | int = 1,
    clamp_max: float | int | None = 1.0,
) -> Float[Tensor, ""]:
    """Mean norm of the old classes' rows over that of the new ones, clamped from above.

    Args:
        weight: ``[classes, features]`` of the last layer, old classes first; no gradient is kept.
        old_classes: how many, ``1 … classes - 1``.
        norm: order p of the row norm; 1 in the authors' code.
        clamp_max: largest value, so that new rows are never stretched; None: none.

    Returns:
        A scalar above 0, at least float32. Where all new rows are 0 it is ``clamp_max`` (1 without).

    Raises:
        ValueError: ``old_classes`` is out of range, all old rows are 0 (gamma 0 would erase the new classes), the
            weight holds NaN or infinite values, or norm or clamp_max is not above 0.

    Source: arXiv 1911.07053, weight aligning; the authors' code for norm and clamping.
    """
    classes = weight.shape[0]
    if not 1 <= old_classes <= classes - 1:
        raise ValueError(
            f"old_classes must lie in 1 … {classes - 1} for a weight of {classes} rows; got {old_classes}"
        )
    if not norm > 0:
        raise ValueError(f"norm must be above 0; got {norm}")
    if clamp_max is not None:
        check_positive("clamp_max", clamp_max)
    lengths = torch.linalg.vector_norm(upcast(weight), ord=norm, dim=1)
    old, new = lengths[:old_classes].mean(), lengths[old_classes:].mean()
    if not (old.isfinite() and new.isfinite()):
        raise ValueError("weight holds NaN or infinite values")
    if old == 0:
        raise ValueError("the rows of all old classes are 0: aligning to them would erase the new classes")
    if new == 0:
        return torch.full_like(old, 1.0 if clamp_max is None else clamp_max)
    gamma: Tensor = old / new
    return gamma if clamp_max is None else gamma.clamp(max=clamp_max)


@torch.no_grad()
def weight_align(
    weight: Float[Tensor, "classes features"],
    old_classes: int,
    *,
    norm: float | int = 1,
    clamp_max: float | int | None = 1.0,
) -> WeightAlignment:
    """A new weight whose newest rows are scaled by `weight_align_gamma`; at gamma 1 it is equal bit for bit.

    The order of logits within the old and within the new classes stays; a bias, if any, is scaled by the caller.

    Args:
        weight: ``[classes, features]`` of the last layer, old classes first; stays as it is.
        old_classes: how many, ``1 … classes - 1``.
        norm, clamp_max: as in `weight_align_gamma`.

    Raises:
        ValueError: as `weight_align_gamma`.

    Source: arXiv 1911.07053, weight aligning.
    """
    gamma = weight_align_gamma(weight, old_classes, norm=norm, clamp_max=clamp_max)
    aligned = weight.detach().clone()
    aligned[old_classes:] *= gamma.to(aligned.dtype)
    return WeightAlignment(aligned, gamma)


def wa_align_logits(
    logits: Float[Tensor, "batch classes"],
    newest_start: int,
    gamma: float | int | Float[Tensor, ""] | Float[Tensor, "*one"],
) -> Float[Tensor, "batch classes"]:
    """Logits with those from column ``newest_start`` on multiplied by ``gamma``: what an aligned bias-free head gives.

    Args:
        logits: ``[batch, classes]``; gradients reach them.
        newest_start: first column of the newest classes, ``0 … classes``.
        gamma: a number, or a tensor of one.

    Raises:
        ValueError: ``newest_start`` is out of range, or ``gamma`` is not finite or not one number.

    Source: arXiv 1911.07053, weight aligning, seen from the logits.
    """
    classes = logits.shape[1]
    if not 0 <= newest_start <= classes:
        raise ValueError(f"newest_start must lie in 0 … {classes}; got {newest_start}")
    if isinstance(gamma, Tensor):
        if gamma.numel() != 1:
            raise ValueError(f"gamma must be one number; got shape {list(gamma.shape)}")
    elif not math.isfinite(gamma):
        raise ValueError(f"gamma must be finite; got {gamma}")
    elif gamma == 1:
        return logits
    return torch.cat([logits[:, :newest_start], logits[:, newest_start:] * gamma], dim=1)


@torch.no_grad()
def herding_selection(
    features: Float[Tensor, "samples features"], count: int, *, max_rounds: float | int = 1.5
) -> Integer[Tensor, " chosen"]:
    """Samples of one class whose running mean follows the class mean most closely, in order of choice.

    Features are scaled to length one, ``d``, with mean ``mu``; from ``w = mu`` on, each round picks
    ``i = argmax <w, d_i>`` and moves ``w`` by ``mu - d_i``; a sample picked again is not listed twice. What is missing
    after ``max_rounds · count`` rounds is filled with the others of largest ``<mu, d_i>``. Of equals the first counts.

    Args:
        features: ``[samples, features]`` of one class.
        count: how many to choose; 0 is allowed, more than there are gives all.
        max_rounds: rounds a wanted sample; above 0.

    Returns:
        Row numbers ``[min(samples, count)]``, int64.

    Raises:
        ValueError: ``count`` is below 0, or ``max_rounds`` not above 0.

    Source: the authors' code of arXiv 1911.07053 (herding as in iCaRL, arXiv 1611.07725); the filling is ours.
    """
    check_positive("max_rounds", max_rounds)
    if count < 0:
        raise ValueError(f"count must be at least 0; got {count}")
    wanted = min(count, len(features))
    chosen: dict[int, None] = {}
    if wanted:
        directions = F.normalize(upcast(features), dim=1)
        mean = directions.mean(0)
        drift = mean.clone()
        for _ in range(math.ceil(max_rounds * count)):
            pick = int((directions @ drift).argmax())
            drift += mean - directions[pick]
            chosen.setdefault(pick)
            if len(chosen) == wanted:
                break
        if len(chosen) < wanted:
            closest = (directions @ mean).argsort(descending=True, stable=True).tolist()
            chosen |= dict.fromkeys(closest)
    return torch.tensor(list(chosen)[:wanted], dtype=torch.int64, device=features.device)


def incremental_accuracy(
    correct: Sequence[Shaped[Tensor, " _seen"]],
    total: Shaped[Tensor, " classes"],
    *,
    include_first: bool = False,
) -> IncrementalAccuracy:
    """Accuracies over the steps of class-incremental learning, from right answers by class.

    ``by_step[t]`` is the share of right answers among all test samples of the classes seen up to step t; ``average``
    its mean over the steps after the first (the first is no incremental step); ``forgetting`` the mean, over all steps
    j but the last, of the best accuracy on the classes of j before the last step, less that after it. A single step is
    its own average and forgets nothing.

    Args:
        correct: for each step t, right answers ``[classes seen by then]`` in class order.
        total: test samples of every class ``[classes]``.
        include_first: average over the first step too.

    Returns:
        float64 on the CPU: shares, forgetting in [-1, 1].

    Raises:
        ValueError: no step, steps that bring no class, counts that do not fit ``total``, or a step whose classes have
            no test sample.

    Source: arXiv 1911.07053, evaluation; forgetting by its common definition (arXiv 1801.10112).
    """
    sizes = [len(counts) for counts in correct]
    if (
        not sizes
        or sizes[0] < 1
        or any(after <= before for before, after in itertools.pairwise(sizes))
        or sizes[-1] != len(total)
    ):
        raise ValueError(
            f"correct must grow step by step to the {len(total)} classes of total; its lengths are {sizes}"
        )
    counts = total.to("cpu", torch.float64)
    right = torch.stack([F.pad(c.to("cpu", torch.float64), (0, sizes[-1] - len(c))) for c in correct])
    if not ((right >= 0) & (right <= counts)).all():
        raise ValueError("correct must lie between 0 and total in every class")
    groups = torch.tensor([after - before for before, after in itertools.pairwise([0, *sizes])])
    step_of = torch.arange(len(sizes)).repeat_interleave(groups)
    samples = torch.zeros(len(sizes), dtype=torch.float64).index_add_(0, step_of, counts)
    if not (samples > 0).all():
        raise ValueError(f"step {int((samples <= 0).nonzero()[0])} has classes without any test sample")
    hits = torch.zeros(len(sizes), len(sizes), dtype=torch.float64).index_add_(1, step_of, right)
    by_step = hits.sum(1) / samples.cumsum(0)
    averaged = by_step if include_first or len(sizes) == 1 else by_step[1:]
    return IncrementalAccuracy(by_step, averaged.mean(), by_step[-1], _forgetting(hits / samples))


def _forgetting(accuracy: Float[Tensor, "steps steps"]) -> Float[Tensor, ""]:
    """From the accuracy after step t on the classes of step j, 0 where those are still unseen."""
    if len(accuracy) == 1:
        return accuracy.new_zeros(())
    return (accuracy[:-1, :-1].amax(0) - accuracy[-1, :-1]).mean()


def old_to_new_rate(
    prediction: Integer[Tensor, " samples"], target: Integer[Tensor, " samples"], old_classes: int
) -> Float[Tensor, ""]:
    """Share of the samples of old classes that are predicted as one of the new ones; 0 without such samples.

    Args:
        prediction: class ids ``[samples]``, classes in task order.
        target: class ids ``[samples]``.
        old_classes: classes below this id are old; at least 0.

    Raises:
        ValueError: shapes do not agree, or ``old_classes`` is below 0.

    Source: arXiv 1911.07053, figure of the confusion between old and new classes.
    """
    check_same_shape(prediction=prediction, target=target)
    if old_classes < 0:
        raise ValueError(f"old_classes must be at least 0; got {old_classes}")
    old = target < old_classes
    return (old & (prediction >= old_classes)).sum() / old.sum().clamp(min=1)
