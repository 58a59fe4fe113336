"""AKL: forward and reverse KL of next-token distributions, weighed by where the student is off (arXiv 2404.02657)."""

from __future__ import annotations

import torch
from jaxtyping import Float, Integer, Shaped
from torch import Tensor

from tutelage.functional.checks import check_share
from tutelage.functional.reductions import masked_mean
from tutelage.functional.tokens import Pair, counted_pair

__all__ = ["adaptive_kl_loss", "adaptive_kl_weights"]


def adaptive_kl_loss(
    student_logits: Float[Tensor, "*rows vocabulary"],
    teacher_logits: Float[Tensor, "*rows vocabulary"],
    mask: Shaped[Tensor, "*rows"] | None = None,
    *,
    mu: float | int = 0.5,
    target: Integer[Tensor, "*rows"] | None = None,
    ignore_index: int = -100,
    temperature: float | int = 1.0,
) -> Float[Tensor, ""]:
    """Mean over tokens of ``a KL(p || q) + (1 - a) KL(q || p)``, AKL: the weights are `adaptive_kl_weights`, taken of
    the softened distributions.

    Args:
        mu: the teacher's mass that makes up the head, in [0, 1].

    Other arguments, result and errors as in `forward_kl_loss`.

    Source: Wu et al., "Rethinking Kullback-Leibler Divergence in Knowledge Distillation for Large Language Models"
    (arXiv 2404.02657).
    """
    check_share("mu", mu)
    pair = counted_pair(student_logits, teacher_logits, mask, target, ignore_index, temperature)
    head = _head_share(pair, mu)
    return masked_mean(head * pair.forward_kl() + (1 - head) * pair.reverse_kl())


def adaptive_kl_weights(
    student_logits: Float[Tensor, "*rows vocabulary"],
    teacher_logits: Float[Tensor, "*rows vocabulary"],
    *,
    mu: float | int = 0.5,
) -> tuple[Float[Tensor, "*rows"], Float[Tensor, "*rows"]]:
    """Where each token's gap ``|p - q|`` lies: its share in the teacher's head, and the rest, which is the tail's.

    The head holds the teacher's likeliest entry, and the next ones while the mass of all up to them is at most ``mu``;
    of equally likely ones the first comes first.

    Args:
        student_logits, teacher_logits: ``[..., vocabulary]``; both detached.
        mu: mass of the head, in [0, 1].

    Returns:
        The weights of the forward and of the reverse KL, ``[...]``, detached; they sum to 1, one half each where there
        is no gap.

    Raises:
        ValueError: shapes or vocabularies do not agree, or mu lies outside [0, 1].

    Source: Wu et al., "Rethinking Kullback-Leibler Divergence in Knowledge Distillation for Large Language Models"
    (arXiv 2404.02657).
    """
    check_share("mu", mu)
    head = _head_share(counted_pair(student_logits.detach(), teacher_logits), mu)
    return head, 1 - head


def _head_share(pair: Pair, mu: float | int) -> Tensor:
    student, teacher = pair.student.detach().exp(), pair.teacher.exp()
    ordered, order = teacher.sort(dim=-1, descending=True, stable=True)
    gap = (teacher - student).abs().gather(-1, order)
    in_head = (ordered.cumsum(-1) <= mu) | (mu >= 1)  # of 1 the sum's rounding says nothing
    in_head[..., 0] = True
    head, whole = torch.where(in_head, gap, 0.0).sum(-1), gap.sum(-1)
    return torch.where(whole > 0, head / torch.where(whole > 0, whole, 1.0), 0.5)
