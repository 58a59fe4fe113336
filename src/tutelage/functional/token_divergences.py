"""Divergences of next-token distributions, mean over the tokens that count; the comparison set for language models.

`p` is the teacher's distribution of a token, always detached, `q` the student's. There is no factor temperature².
A vocabulary entry whose logit is infinite on either side is left out of every sum, value and gradient: where only the
student excludes what the teacher holds possible, the true divergence would be infinite.
"""

from __future__ import annotations

from typing import Literal

from jaxtyping import Float, Integer, Shaped
from torch import Tensor

from tutelage.functional.checks import check_share
from tutelage.functional.reductions import masked_mean
from tutelage.functional.tokens import counted_pair

__all__ = [
    "forward_kl_loss",
    "generalized_jsd_loss",
    "reverse_kl_loss",
    "skewed_forward_kl_loss",
    "skewed_reverse_kl_loss",
    "symmetric_kl_loss",
    "total_variation_loss",
]


def forward_kl_loss(
    student_logits: Float[Tensor, "*rows vocabulary"],
    teacher_logits: Float[Tensor, "*rows vocabulary"],
    mask: Shaped[Tensor, "*rows"] | None = None,
    *,
    target: Integer[Tensor, "*rows"] | None = None,
    ignore_index: int = -100,
    temperature: float | int = 1.0,
    subtract_entropy: bool = True,
) -> Float[Tensor, ""]:
    """Mean over tokens of ``KL(p || q) = Σ p (log p - log q)``: the student spreads over all that the teacher holds
    possible.

    Args:
        student_logits: ``[..., vocabulary]``, row i already predicts target i.
        teacher_logits: ``[..., vocabulary]`` of the same vocabulary; detached.
        mask: ``[...]``, not zero where a token counts; without one, all do.
        target: ``[...]``, token ids; where they equal ``ignore_index``, a token does not count either.
        ignore_index: the id that stands for no target.
        temperature: softens both sides; above 0. Its square is no factor here.
        subtract_entropy: False leaves the cross-entropy ``-Σ p log q``: the same gradient, a larger value.

    Returns:
        A scalar in nats, the mean over counted tokens, at least float32; 0 with a zero gradient where none counts.

    Raises:
        ValueError: shapes or vocabularies do not agree, or the temperature is not above 0.
    """
    pair = counted_pair(student_logits, teacher_logits, mask, target, ignore_index, temperature)
    return masked_mean(pair.forward_kl(subtract_entropy))


def reverse_kl_loss(
    student_logits: Float[Tensor, "*rows vocabulary"],
    teacher_logits: Float[Tensor, "*rows vocabulary"],
    mask: Shaped[Tensor, "*rows"] | None = None,
    *,
    target: Integer[Tensor, "*rows"] | None = None,
    ignore_index: int = -100,
    temperature: float | int = 1.0,
) -> Float[Tensor, ""]:
    """Mean over tokens of ``KL(q || p) = Σ q (log q - log p)``: it draws the student to where the teacher is most
    certain. The gradient reaches the student through both factors.

    Arguments, result and errors as in `forward_kl_loss`.

    Source: Gu et al., "MiniLLM: Knowledge Distillation of Large Language Models" (arXiv 2306.08543).
    """
    pair = counted_pair(student_logits, teacher_logits, mask, target, ignore_index, temperature)
    return masked_mean(pair.reverse_kl())


def symmetric_kl_loss(
    student_logits: Float[Tensor, "*rows vocabulary"],
    teacher_logits: Float[Tensor, "*rows vocabulary"],
    mask: Shaped[Tensor, "*rows"] | None = None,
    *,
    weight: float | int = 0.9,
    target: Integer[Tensor, "*rows"] | None = None,
    ignore_index: int = -100,
    temperature: float | int = 1.0,
    subtract_entropy: bool = True,
) -> Float[Tensor, ""]:
    """Mean over tokens of ``(1 - weight) KL(p || q) + weight KL(q || p)``.

    Args:
        weight: share of the reverse part, in [0, 1].

    Other arguments, result and errors as in `forward_kl_loss`; ``subtract_entropy`` is that of the forward part.
    """
    check_share("weight", weight)
    pair = counted_pair(student_logits, teacher_logits, mask, target, ignore_index, temperature)
    return masked_mean((1 - weight) * pair.forward_kl(subtract_entropy) + weight * pair.reverse_kl())


def total_variation_loss(
    student_logits: Float[Tensor, "*rows vocabulary"],
    teacher_logits: Float[Tensor, "*rows vocabulary"],
    mask: Shaped[Tensor, "*rows"] | None = None,
    *,
    target: Integer[Tensor, "*rows"] | None = None,
    ignore_index: int = -100,
    temperature: float | int = 1.0,
) -> Float[Tensor, ""]:
    """Mean over tokens of ``½ Σ |p - q|``, from 0 to 1.

    Arguments, result and errors as in `forward_kl_loss`. The gradient at ``p = q`` is 0.
    """
    pair = counted_pair(student_logits, teacher_logits, mask, target, ignore_index, temperature)
    return masked_mean(0.5 * (pair.teacher.exp() - pair.student.exp()).abs().sum(-1))


def skewed_forward_kl_loss(
    student_logits: Float[Tensor, "*rows vocabulary"],
    teacher_logits: Float[Tensor, "*rows vocabulary"],
    mask: Shaped[Tensor, "*rows"] | None = None,
    *,
    skew: float | int = 0.1,
    target: Integer[Tensor, "*rows"] | None = None,
    ignore_index: int = -100,
    temperature: float | int = 1.0,
    subtract_entropy: bool = True,
) -> Float[Tensor, ""]:
    """Mean over tokens of ``KL(p || m)``, ``m = skew · p + (1 - skew) q``: never more than ``-log skew``.

    Args:
        skew: the teacher's share of ``m``, in [0, 1]; 0 is the forward KL, and 1 is 0.
        subtract_entropy: False leaves ``-Σ p log m``: the same gradient, a larger value.

    Other arguments, result and errors as in `forward_kl_loss`.

    Source: Ko et al., "DistiLLM: Towards Streamlined Distillation for Large Language Models" (arXiv 2402.03898).
    """
    check_share("skew", skew)
    pair = counted_pair(student_logits, teacher_logits, mask, target, ignore_index, temperature)
    return masked_mean(pair._replace(student=pair.mixture(skew)).forward_kl(subtract_entropy))


def skewed_reverse_kl_loss(
    student_logits: Float[Tensor, "*rows vocabulary"],
    teacher_logits: Float[Tensor, "*rows vocabulary"],
    mask: Shaped[Tensor, "*rows"] | None = None,
    *,
    skew: float | int = 0.1,
    target: Integer[Tensor, "*rows"] | None = None,
    ignore_index: int = -100,
    temperature: float | int = 1.0,
) -> Float[Tensor, ""]:
    """Mean over tokens of ``KL(q || m)``, ``m = (1 - skew) p + skew · q``: never more than ``-log skew``.

    Args:
        skew: the student's share of ``m``, in [0, 1]; 0 is the reverse KL, and 1 is 0. The gradient flows through m.

    Other arguments, result and errors as in `forward_kl_loss`.

    Source: Ko et al., "DistiLLM: Towards Streamlined Distillation for Large Language Models" (arXiv 2402.03898).
    """
    check_share("skew", skew)
    pair = counted_pair(student_logits, teacher_logits, mask, target, ignore_index, temperature)
    return masked_mean(pair._replace(teacher=pair.mixture(1 - skew)).reverse_kl())


def generalized_jsd_loss(
    student_logits: Float[Tensor, "*rows vocabulary"],
    teacher_logits: Float[Tensor, "*rows vocabulary"],
    mask: Shaped[Tensor, "*rows"] | None = None,
    *,
    beta: float | int = 0.5,
    temperature: float | int = 1.0,
    target: Integer[Tensor, "*rows"] | None = None,
    ignore_index: int = -100,
    reduction: Literal["tokenmean", "batchmean"] = "tokenmean",
) -> Float[Tensor, ""]:
    """Mean over tokens of the generalised Jensen-Shannon divergence ``beta KL(p || m) + (1 - beta) KL(q || m)`` with
    ``m = beta p + (1 - beta) q``.

    Args:
        beta: the teacher's share, in [0, 1]. 0 is ``KL(p || q)`` and 1 is ``KL(q || p)``: a switch and not the limit,
            which is 0.
        reduction: ``tokenmean``; or ``batchmean``, the sum over all tokens by the length of the first axis, without
            mask and target alone.

    Other arguments, result and errors as in `forward_kl_loss`.

    Raises:
        ValueError: also for an unknown reduction, or ``batchmean`` with a mask or target.

    Source: Agarwal et al., "On-Policy Distillation of Language Models: Learning from Self-Generated Mistakes"
    (arXiv 2306.13649), equation 1.
    """
    check_share("beta", beta)
    if reduction not in ("tokenmean", "batchmean"):
        raise ValueError(f"reduction must be 'tokenmean' or 'batchmean'; got {reduction!r}")
    if reduction == "batchmean" and not (mask is None and target is None):
        raise ValueError("reduction 'batchmean' counts every token; use 'tokenmean' with a mask or target")
    pair = counted_pair(student_logits, teacher_logits, mask, target, ignore_index, temperature)
    if beta in (0, 1):
        by_token = pair.reverse_kl() if beta == 1 else pair.forward_kl()
    else:
        mixture = pair.mixture(beta)
        by_token = beta * pair._replace(student=mixture).forward_kl()
        by_token = by_token + (1 - beta) * pair._replace(teacher=mixture).reverse_kl()
    if reduction == "batchmean":
        return by_token.sum() / max(by_token.shape[0] if by_token.dim() else 1, 1)
    return masked_mean(by_token)
