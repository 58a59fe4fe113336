"""TAID: a target that moves from the student's own distribution to the teacher's (arXiv 2501.16937)."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Integer, Shaped
from torch import Tensor

from tutelage.functional.checks import check_positive, check_same_shape, check_share
from tutelage.functional.fused import fused_linear_divergence
from tutelage.functional.reductions import masked_mean, upcast
from tutelage.functional.tokens import check_same_vocabulary, counted_pair

__all__ = [
    "TaidPath",
    "TaidState",
    "fused_linear_taid_loss",
    "taid_loss",
    "taid_schedule",
    "taid_target",
    "taid_update",
]


class TaidState(NamedTuple):
    """Where the schedule stands: the teacher's weight t, the momentum of the loss's relative fall, the loss before
    (None before the first), and the last adaptive step (NaN before the second loss)."""

    t: float
    momentum: float
    previous: float | None
    delta_t: float


class TaidPath(NamedTuple):
    """`TaidState` after each of n losses, ``[n]`` float64 each."""

    t: Float[Tensor, " n"]
    momentum: Float[Tensor, " n"]
    delta_t: Float[Tensor, " n"]


class TaidStep(NamedTuple):
    """The fields of `TaidState` as float64 scalars on a device; ``previous`` is NaN before the first loss."""

    t: Tensor
    momentum: Tensor
    previous: Tensor
    delta_t: Tensor


def taid_target(
    student_logits: Float[Tensor, "*rows vocabulary"],
    teacher_logits: Float[Tensor, "*rows vocabulary"],
    t: float | int | Float[Tensor, ""],
) -> Float[Tensor, "*rows vocabulary"]:
    """``softmax((1 - t) student + t · teacher)``, logits and not probabilities being mixed.

    Args:
        student_logits, teacher_logits: ``[..., vocabulary]``; both detached. An entry of -inf on either side has
            probability 0; at t = 0 the student's alone count, at t = 1 the teacher's.
        t: the teacher's weight, in [0, 1]; a scalar tensor is not checked where that would wait for an accelerator.

    Returns:
        Probabilities ``[..., vocabulary]``, detached, at least float32.

    Raises:
        ValueError: shapes or vocabularies do not agree, or t lies outside [0, 1].

    Source: Shing et al., "TAID: Temporally Adaptive Interpolated Distillation for Efficient Knowledge Transfer in
    Language Models" (arXiv 2501.16937), and its code.
    """
    return mixed_logits(student_logits, teacher_logits, t).softmax(-1)


def taid_loss(
    student_logits: Float[Tensor, "*rows vocabulary"],
    teacher_logits: Float[Tensor, "*rows vocabulary"],
    mask: Shaped[Tensor, "*rows"] | None = None,
    *,
    t: float | int | Float[Tensor, ""],
    subtract_entropy: bool = False,
) -> Float[Tensor, ""]:
    """Cross-entropy ``-Σ p_t log q`` of the student with the moving target of `taid_target`, mean over tokens.

    At t = 0 the gradient is exactly 0.

    Args:
        student_logits: ``[..., vocabulary]``, row i already predicts target i. Entries of -inf are left out of the sum.
        teacher_logits: ``[..., vocabulary]``; detached.
        mask: ``[...]``, not zero where a token counts; without one, all do.
        t: the teacher's weight, in [0, 1], from before this loss moves it.
        subtract_entropy: True gives ``KL(p_t || q)``: the same gradient, another value for the schedule.

    Returns:
        A scalar in nats, mean over counted tokens, at least float32; 0 with a zero gradient where none counts.

    Raises:
        ValueError: as `taid_target`.

    Source: Shing et al., "TAID: Temporally Adaptive Interpolated Distillation for Efficient Knowledge Transfer in
    Language Models" (arXiv 2501.16937), and its code.
    """
    pair = counted_pair(student_logits, mixed_logits(student_logits, teacher_logits, t), mask)
    return masked_mean(pair.forward_kl(subtract_entropy))


def fused_linear_taid_loss(
    student_hidden: Float[Tensor, "*rows width"],
    student_weight: Float[Tensor, "vocabulary width"],
    teacher_hidden: Float[Tensor, "*rows teacher_width"],
    teacher_weight: Float[Tensor, "vocabulary teacher_width"],
    mask: Shaped[Tensor, "*rows"] | None = None,
    *,
    t: float | int | Float[Tensor, ""],
    chunk_size: int | None = None,
    **options: Any,
) -> Float[Tensor, ""]:
    """`taid_loss` from hidden states and heads; the logits of all tokens are never held at once.

    Args:
        student_hidden, student_weight: ``[..., width]`` and ``[vocabulary, width]``.
        teacher_hidden, teacher_weight: of any width; they get no gradient.
        mask: ``[...]``, not zero where a token counts.
        t: the teacher's weight, in [0, 1].
        chunk_size: tokens whose logits are made at once; None: by bytes.
        options: ``subtract_entropy``, and those of `fused_linear_divergence`.

    Raises:
        ValueError: as in `fused_linear_divergence`.
    """
    return fused_linear_divergence(
        student_hidden,
        student_weight,
        teacher_hidden,
        teacher_weight,
        mask,
        divergence="taid",
        t=t,
        chunk_size=chunk_size,
        **options,
    )


def taid_update(
    state: TaidState,
    loss: float | int,
    progress: float | int,
    *,
    t_start: float | int = 0.4,
    t_end: float | int = 1.0,
    alpha: float | int = 5e-4,
    beta: float | int = 0.99,
    adaptive: bool = True,
    eps: float = 1e-15,
) -> TaidState:
    """The schedule after one more loss: t moves faster the better the loss falls, and is never behind a line from
    ``t_start`` to ``t_end``.

    ``m <- beta m + (1 - beta) (previous - loss) / previous`` and ``t <- t + alpha sigmoid(m) (1 - t)``, but at least
    ``t_start + (t_end - t_start) progress`` and at most ``t_end``. The first loss is only remembered.

    Args:
        state: of the call before; at first ``TaidState(t_start, 0.0, None, math.nan)``.
        loss: of this step, computed with ``state.t``; where no token counted, do not call.
        progress: optimiser step / all steps, in [0, 1].
        t_start, t_end: the line's ends, ``0 <= t_start < 1``, ``t_start <= t_end``, ``0 < t_end <= 1``.
        alpha: size of the adaptive step, in [0, 1].
        beta: of the momentum, in [0, 1].
        adaptive: False makes t the line; momentum and step are still there to be seen.
        eps: added to the loss before, in the division.

    Raises:
        ValueError: a value is out of range, or the loss is not finite.

    Source: Shing et al., "TAID: Temporally Adaptive Interpolated Distillation for Efficient Knowledge Transfer in
    Language Models" (arXiv 2501.16937), and its code.
    """
    _check_schedule(t_start, t_end, alpha, beta)
    check_share("progress", progress)
    if not math.isfinite(loss):
        raise ValueError(f"loss must be finite; got {loss}; the schedule would not recover from it")
    previous = math.nan if state.previous is None else state.previous
    step = TaidStep(*(torch.tensor(v, dtype=torch.float64) for v in state._replace(previous=previous)))
    after = taid_step(
        step, torch.tensor(loss, dtype=torch.float64), progress, t_start, t_end, alpha, beta, adaptive, eps
    )
    return TaidState(*(value.item() for value in after))


def taid_step(
    state: TaidStep,
    loss: Float[Tensor, ""],
    progress: float | int | Float[Tensor, ""],
    t_start: float | int = 0.4,
    t_end: float | int = 1.0,
    alpha: float | int = 5e-4,
    beta: float | int = 0.99,
    adaptive: bool = True,
    eps: float = 1e-15,
) -> TaidStep:
    """`taid_update` on scalars of a device: it never waits for one, and checks nothing."""
    loss = loss.detach().to(state.t)
    first = state.previous.isnan()
    fall = (state.previous - loss) / (state.previous + eps)
    momentum = torch.where(first, state.momentum, beta * state.momentum + (1 - beta) * fall)
    delta_t = alpha * momentum.sigmoid() * (1 - state.t)
    line = t_start + (t_end - t_start) * progress
    moved = (
        (state.t + delta_t).clamp(min=line).clamp(max=t_end) if adaptive else torch.zeros_like(loss) + line
    )
    return TaidStep(torch.where(first, state.t, moved), momentum, loss, torch.where(first, math.nan, delta_t))


def taid_schedule(
    losses: Float[Tensor, " n"],
    global_step: Integer[Tensor, " n"],
    num_train_steps: int,
    *,
    t_start: float | int = 0.4,
    t_end: float | int = 1.0,
    alpha: float | int = 5e-4,
    beta: float | int = 0.99,
    adaptive: bool = True,
    eps: float = 1e-15,
) -> TaidPath:
    """The schedule's whole path along a curve of losses, by `taid_update`.

    Args:
        losses: ``[n]``, in order.
        global_step: ``[n]``, the optimiser step at each.
        num_train_steps: all steps, at least 1.
        t_start, t_end, alpha, beta, adaptive, eps: of `taid_update`.

    Raises:
        ValueError: shapes do not agree, or as `taid_update`.
    """
    check_same_shape(losses=losses, global_step=global_step)
    check_positive("num_train_steps", num_train_steps)
    _check_schedule(t_start, t_end, alpha, beta)
    state, path = TaidState(float(t_start), 0.0, None, math.nan), []
    for loss, step in zip(losses.tolist(), global_step.tolist(), strict=True):
        state = taid_update(
            state,
            loss,
            step / num_train_steps,
            t_start=t_start,
            t_end=t_end,
            alpha=alpha,
            beta=beta,
            adaptive=adaptive,
            eps=eps,
        )
        path.append((state.t, state.momentum, state.delta_t))
    columns = torch.tensor(path, dtype=torch.float64).reshape(-1, 3)
    return TaidPath(*columns.unbind(1))


def mixed_logits(student_logits: Tensor, teacher_logits: Tensor, t: float | int | Tensor) -> Tensor:
    """Mixed logits, detached."""
    check_same_vocabulary(student_logits, teacher_logits)
    student, teacher = upcast(student_logits.detach()), upcast(teacher_logits.detach())
    if not (isinstance(t, Tensor) and t.device.type != "cpu"):
        check_share("t", float(t))
    t = t.to(student.device) if isinstance(t, Tensor) else student.new_tensor(t)
    # At the ends one side is out of play, and 0 times its -inf would be NaN.
    return torch.where(t == 0, student, torch.where(t == 1, teacher, (1 - t) * student + t * teacher))


def _check_schedule(t_start: float | int, t_end: float | int, alpha: float | int, beta: float | int) -> None:
    if not (0 <= t_start < 1 and 0 < t_end <= 1 and t_start <= t_end):
        raise ValueError(
            f"t_start and t_end must hold 0 <= t_start < 1, 0 < t_end <= 1, t_start <= t_end; got {t_start}, {t_end}"
        )
    check_share("alpha", alpha)
    check_share("beta", beta)
