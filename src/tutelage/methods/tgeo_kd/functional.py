"""Fusion ratios from the geometry of student, teacher and ground truth, as pure functions of tensors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Integer
from torch import Tensor

from tutelage.functional.checks import check_positive, check_same_shape, check_share, check_target
from tutelage.functional.classes import class_ids, class_sums
from tutelage.functional.divergences import forward_kl
from tutelage.functional.reductions import masked_mean, upcast, without_autocast

__all__ = [
    "TGeoLoss",
    "class_mean_prediction",
    "tgeo_alpha_gradient",
    "tgeo_fusion_ratio",
    "tgeo_kd_loss",
    "tgeo_state",
]

Edges = Literal["signed", "squared"]


class TGeoLoss(NamedTuple):
    """The loss, and its two parts row by row, unweighted."""

    total: Tensor
    kd: Tensor
    cls: Tensor


def class_mean_prediction(
    probabilities: Float[Tensor, "batch classes"],
    target: Integer[Tensor, " batch"] | Float[Tensor, "batch classes"],
    *,
    spread: bool = True,
) -> Float[Tensor, "rows classes"]:
    """Mean prediction over the rows of each true class.

    Args:
        probabilities: ``[batch, classes]``, a teacher's.
        target: class ids ``[batch]``, or distributions ``[batch, classes]``, whose largest entry counts.
        spread: give every row the mean of its class; else the table by class.

    Returns:
        ``[batch, classes]``, or ``[classes, classes]`` with zeros where a class has no rows; at least float32.

    Raises:
        ValueError: shapes do not fit, or a label names no class.
    """
    check_target(target, probabilities)
    labels, values = class_ids(target), upcast(probabilities)
    table = class_sums(values, labels, values.shape[1]).means
    return table[labels] if spread else table


def tgeo_state(
    student_prob: Float[Tensor, "batch classes"],
    teacher_prob: Float[Tensor, "batch classes"],
    target: Integer[Tensor, " batch"] | Float[Tensor, "batch classes"],
    class_mean: Float[Tensor, "batch classes"],
    *,
    edges: Edges = "signed",
) -> Float[Tensor, "batch features"]:
    """What the ratio network reads of each row: the edges between student ``S``, teacher ``T``, truth ``G`` and the
    teacher's mean prediction of the class ``M``.

    Args:
        student_prob: ``[batch, classes]`` at temperature 1.
        teacher_prob: ``[batch, classes]`` at temperature 1.
        target: class ids ``[batch]``, or distributions ``[batch, classes]``.
        class_mean: ``[batch, classes]``, from `class_mean_prediction`.
        edges: ``signed`` (the paper): ``G-S, G-T, T-S, G-M, M-S``. ``squared`` (the authors' code): ``S, T, G, M``,
            then the squares of ``M-S, G-S, T-S, T-G, M-G``.

    Returns:
        ``[batch, 5 · classes]`` or ``[batch, 9 · classes]``, at least float32; detached.

    Raises:
        ValueError: shapes do not fit, a label names no class, or other edges.

    Source: Hu et al., TGeo-KD (arXiv 2312.15112).
    """
    check_same_shape(student_prob=student_prob, teacher_prob=teacher_prob, class_mean=class_mean)
    check_target(target, student_prob)
    student, teacher, mean = (upcast(p.detach()) for p in (student_prob, teacher_prob, class_mean))
    truth = _one_hot(target, student)
    if edges == "signed":
        return _edges(
            [], [(truth, student), (truth, teacher), (teacher, student), (truth, mean), (mean, student)]
        )
    if edges == "squared":
        sides = [(mean, student), (truth, student), (teacher, student), (teacher, truth), (mean, truth)]
        return _edges([student, teacher, truth, mean], sides, squared=True)
    raise ValueError(f"edges is {edges!r}; allowed: signed, squared")


def tgeo_fusion_ratio(
    state: Float[Tensor, "batch features"],
    layers: Sequence[Sequence[Tensor]],
    *,
    negative_slope: float = 0.01,
) -> Float[Tensor, " batch"]:
    """The share in (0, 1) of each row's loss that is distillation: linear layers with leaky rectifiers between them,
    and a sigmoid.

    Args:
        state: ``[batch, features]``, from `tgeo_state`.
        layers: ``(weight [out, in], bias [out])`` from first to last; the last gives one value.
        negative_slope: of the rectifiers.

    Returns:
        ``[batch]``, in the weights' dtype but at least float32, inside autocast too.

    Raises:
        ValueError: there are no layers, a layer does not fit what comes in, or the last gives not one value.
    """
    _check_layers(state.shape[1], layers)
    hidden = state.to(upcast(layers[0][0]).dtype)
    with without_autocast(state):
        for position, (weight, bias) in enumerate(layers):
            if position:
                hidden = F.leaky_relu(hidden, negative_slope)
            hidden = F.linear(hidden, upcast(weight), upcast(bias))
    return hidden[:, 0].sigmoid()


def tgeo_kd_loss(
    student_logits: Float[Tensor, "batch classes"],
    teacher_logits: Float[Tensor, "batch classes"],
    target: Integer[Tensor, " batch"] | Float[Tensor, "batch classes"],
    alpha: Float[Tensor, " batch"] | float | int,
    *,
    temperature: float | int = 4.0,
    ce_on: Literal["logits", "probabilities"] = "logits",
) -> TGeoLoss:
    """``mean alpha · temperature² · KL(p_t || p_s) + (1 - alpha) · CE``, with a ratio for every row.

    Args:
        student_logits: ``[batch, classes]``.
        teacher_logits: ``[batch, classes]``; detached.
        target: class ids ``[batch]``, or distributions ``[batch, classes]``.
        alpha: weight of the distillation part, in [0, 1]: ``[batch]``, or one for all. Gradients reach it; give it
            detached where the student alone learns.
        temperature: softens both sides of the divergence; above 0.
        ce_on: ``probabilities`` takes the softmax twice, as the authors' code does.

    Returns:
        ``total``, a scalar; ``kd [batch]``, without the temperature's square; ``cls [batch]``; in nats, at least
        float32. Without rows the total is 0 with a zero gradient.

    Raises:
        ValueError: shapes do not fit, a label names no class, the temperature is not above 0, or (on the CPU) a ratio
            lies outside [0, 1].
    """
    check_target(target, student_logits)
    kd = forward_kl(student_logits, teacher_logits, temperature)
    _check_ratio(alpha, kd)
    scores = upcast(student_logits)
    if ce_on == "probabilities":
        scores = scores.softmax(1)
    elif ce_on != "logits":
        raise ValueError(f"ce_on is {ce_on!r}; allowed: logits, probabilities")
    labels = target.to(scores.dtype) if target.dim() == 2 else target.long()
    cls = F.cross_entropy(scores, labels, reduction="none")
    share = alpha.to(kd.dtype) if isinstance(alpha, Tensor) else float(alpha)
    return TGeoLoss(masked_mean(torch.lerp(cls, kd * temperature**2, share)), kd, cls)


def tgeo_alpha_gradient(directional: Float[Tensor, " batch"], lr: float | int) -> Float[Tensor, " batch"]:
    """Gradient of the outer loss with respect to every row's ratio, through one plain gradient step of the student.

    Args:
        directional: ``[batch]``, the derivative of ``temperature² · kd - cls`` of each row, at the parameters before
            the step, along the outer loss's gradient after it.
        lr: the step's learning rate; above 0.

    Returns:
        ``[batch]``: ``-(lr / batch) · directional``.

    Raises:
        ValueError: the rate is not above 0.
    """
    check_positive("lr", lr)
    return directional * (-lr / max(len(directional), 1))


def _one_hot(target: Tensor, like: Float[Tensor, "batch classes"]) -> Float[Tensor, "batch classes"]:
    if target.dim() == 2:
        return target.detach().to(like.dtype)
    return torch.zeros_like(like).scatter_(1, target.long()[:, None], 1.0)


def _edges(
    vertices: Sequence[Float[Tensor, "batch classes"]],
    sides: Sequence[tuple[Float[Tensor, "batch classes"], Float[Tensor, "batch classes"]]],
    *,
    squared: bool = False,
) -> Float[Tensor, "batch features"]:
    """Vertices, then differences, side by side; each is written straight to its place."""
    rows, classes = sides[0][0].shape
    dtype = max((end.dtype for side in sides for end in side), key=lambda kind: kind.itemsize)
    whole = sides[0][0].new_empty(rows, len(vertices) + len(sides), classes, dtype=dtype)
    places = whole.unbind(1)
    for place, vertex in zip(places, vertices, strict=False):
        place.copy_(vertex)
    for place, (end, start) in zip(places[len(vertices) :], sides, strict=True):
        torch.sub(end, start, out=place)
    if squared:
        whole[:, len(vertices) :].square_()
    return whole.flatten(1)


def _check_layers(width: int, layers: Sequence[Sequence[Tensor]]) -> None:
    if not layers:
        raise ValueError("the ratio network has no layers; give (weight, bias) of at least one")
    for position, (weight, bias) in enumerate(layers):
        if weight.dim() != 2 or weight.shape[1] != width or bias.shape != weight.shape[:1]:
            raise ValueError(
                f"layer {position} of the ratio network takes {width} values a row; its weight has shape "
                f"{list(weight.shape)}, its bias {list(bias.shape)}"
            )
        width = len(weight)
    if width != 1:
        raise ValueError(f"the last layer of the ratio network gives one value a row; this one gives {width}")


def _check_ratio(alpha: Tensor | float | int, rows: Float[Tensor, " batch"]) -> None:
    if not isinstance(alpha, Tensor):
        check_share("alpha", alpha)
        return
    check_same_shape(alpha=alpha, rows=rows)
    if alpha.device.type == "cpu" and len(alpha):
        low, high = (float(value) for value in alpha.detach().aminmax())
        if not (low >= 0 and high <= 1):
            raise ValueError(f"alpha must lie in [0, 1]; it goes from {low:g} to {high:g}")
