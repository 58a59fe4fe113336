"""DDK: how much to draw from each domain, by how far student and teacher differ there (arXiv 2407.16154)."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from jaxtyping import Float, Integer, Shaped
from torch import Tensor

from tutelage.functional.checks import check_class_ids, check_same_shape, check_share
from tutelage.functional.reductions import masked_mean, upcast
from tutelage.functional.token_divergences import forward_kl_loss
from tutelage.functional.tokens import check_same_vocabulary, counted_tokens, token_nll

__all__ = [
    "DDKLoss",
    "ddk_draw_domains",
    "ddk_initial_factor",
    "ddk_loss",
    "ddk_update_factor",
    "domain_perplexity",
]


class DDKLoss(NamedTuple):
    """The weighted total, the cross-entropy with the labels, and the KL divergence without its weight."""

    loss: Float[Tensor, ""]
    ce: Float[Tensor, ""]
    kl: Float[Tensor, ""]


def ddk_loss(
    student_logits: Float[Tensor, "*rows vocabulary"],
    teacher_logits: Float[Tensor, "*rows vocabulary"],
    target: Integer[Tensor, "*rows"],
    mask: Shaped[Tensor, "*rows"] | None = None,
    *,
    gamma: float | int = 1.0,
    temperature: float | int = 1.0,
) -> DDKLoss:
    """``CE(student, target) + gamma KL(p || q)``, both means over the same tokens; the cross-entropy is not softened.

    Args:
        student_logits: ``[..., vocabulary]``, row i already predicts target i.
        teacher_logits: ``[..., vocabulary]``; detached.
        target: ``[...]``, token ids; -100 does not count.
        mask: ``[...]``, not zero where a token counts; without one, all do.
        gamma: weight of the KL divergence, at least 0.
        temperature: of the KL divergence, above 0; its square is no factor here.

    Returns:
        Scalars in nats, at least float32; 0 with a zero gradient where no token counts.

    Raises:
        ValueError: shapes or vocabularies do not agree, or an option is out of range.
        IndexError: a target that counts lies outside the vocabulary.

    Source: Liu et al., "DDK: Distilling Domain Knowledge for Efficient Large Language Models" (arXiv 2407.16154),
    equation 3, read as forward KL.
    """
    if not (math.isfinite(gamma) and gamma >= 0):
        raise ValueError(f"gamma must be finite and at least 0; got {gamma}")
    check_same_vocabulary(student_logits, teacher_logits)
    counts = counted_tokens(student_logits.shape[:-1], mask, target)
    ce = masked_mean(token_nll(student_logits, target, counts), counts)
    kl = forward_kl_loss(student_logits, teacher_logits, counts, temperature=temperature)
    return DDKLoss(ce + gamma * kl, ce, kl)


def ddk_initial_factor(
    student_perplexity: Float[Tensor, " domains"], teacher_perplexity: Float[Tensor, " domains"]
) -> Float[Tensor, " domains"]:
    """The first share of each domain, a softmax of the ratios of perplexities ``student / teacher``.

    Args:
        student_perplexity, teacher_perplexity: ``[domains]``, `domain_perplexity` of one validation set a domain, by
            one tokenizer.

    Returns:
        ``[domains]``, which sum to 1, detached.

    Raises:
        ValueError: shapes do not agree, there is no domain, or a perplexity is not finite and above 0.

    Source: Liu et al., "DDK: Distilling Domain Knowledge for Efficient Large Language Models" (arXiv 2407.16154),
    equation 1.
    """
    return _ratios(student_perplexity, teacher_perplexity).softmax(0)


def ddk_update_factor(
    factor: Float[Tensor, " domains"],
    student_perplexity: Float[Tensor, " domains"],
    teacher_perplexity: Float[Tensor, " domains"],
    *,
    alpha: float | int = 0.5,
) -> Float[Tensor, " domains"]:
    """The next share of each domain, ``alpha psi / Σ psi + (1 - alpha) / domains`` with ``psi = factor · exp(student /
    teacher)``: no domain falls below ``(1 - alpha) / domains``.

    Args:
        factor: ``[domains]``, the shares so far; they sum to 1.
        student_perplexity, teacher_perplexity: ``[domains]``, as in `ddk_initial_factor`.
        alpha: in [0, 1]. With 1 there is no floor, and a domain whose share comes to 0 stays there.

    Returns:
        ``[domains]``, which sum to 1, detached. However large a ratio is, the result is finite.

    Raises:
        ValueError: shapes do not agree, there is no domain, shares below 0 or that do not sum to 1, a perplexity
            that is not finite and above 0, or alpha outside [0, 1].

    Source: Liu et al., "DDK: Distilling Domain Knowledge for Efficient Large Language Models" (arXiv 2407.16154),
    equation 2.
    """
    check_share("alpha", alpha)
    ratios = _ratios(student_perplexity, teacher_perplexity)
    check_same_shape(factor=factor, perplexity=ratios)
    shares = _shares(factor)
    return alpha * (shares.log() + ratios).softmax(0) + (1 - alpha) / len(shares)


def ddk_draw_domains(
    factor: Float[Tensor, " domains"],
    n: int,
    *,
    generator: torch.Generator | None = None,
    systematic: bool = False,
) -> Integer[Tensor, " n"]:
    """The domain of each of the next n samples, drawn by the domains' shares.

    Args:
        factor: ``[domains]``; the shares sum to 1.
        n: how many samples, at least 0.
        generator: of the draws, on the factor's device.
        systematic: take ``n · factor`` of each domain, rounded to sum to n (the largest remainders up), and shuffle
            them, instead of drawing one by one.

    Returns:
        ``[n]`` int64.

    Raises:
        ValueError: shares below 0 or that do not sum to 1, or n below 0.
    """
    if n < 0:
        raise ValueError(f"n must be at least 0; got {n}")
    shares = _shares(factor)
    if n == 0:
        return torch.zeros(0, dtype=torch.long, device=factor.device)
    if not systematic:
        return torch.multinomial(shares, n, replacement=True, generator=generator)
    wanted = shares * (n / shares.sum())
    counts = wanted.floor().long()
    remainders = (wanted - counts).argsort(descending=True, stable=True)
    counts[remainders[: n - int(counts.sum())]] += 1
    domains = torch.arange(len(shares), device=factor.device).repeat_interleave(counts)
    return domains[torch.randperm(n, generator=generator, device=factor.device)]


def domain_perplexity(
    nll: Float[Tensor, " tokens"],
    domain: Integer[Tensor, " tokens"],
    mask: Shaped[Tensor, " tokens"] | None,
    n_domains: int,
) -> Float[Tensor, " domains"]:
    """``exp(Σ nll / count)`` over all tokens of each domain, not a mean over sequences.

    Args:
        nll: ``[tokens]``, cross-entropy of each token in nats; detached. Sums are taken in float64.
        domain: ``[tokens]``, ids below ``n_domains``.
        mask: ``[tokens]``, not zero where a token counts; None counts all.
        n_domains: at least 1.

    Returns:
        ``[n_domains]``, detached, at least float32; infinite where the mean is beyond its type.

    Raises:
        ValueError: shapes do not agree, or a domain without a token that counts.
        IndexError: a domain's id is out of range.

    Source: Liu et al., "DDK: Distilling Domain Knowledge for Efficient Large Language Models" (arXiv 2407.16154).
    """
    if n_domains < 1:
        raise ValueError(f"n_domains must be at least 1; got {n_domains}")
    check_class_ids(domain, len(nll), n_domains)
    counts = torch.ones_like(nll, dtype=torch.bool) if mask is None else mask != 0
    check_same_shape(nll=nll, mask=counts)
    values = torch.where(counts, nll.detach(), 0.0).double()
    sums = values.new_zeros(n_domains).index_add(0, domain, values)
    tokens = values.new_zeros(n_domains).index_add(0, domain, counts.double())
    empty = (tokens == 0).nonzero().flatten().tolist()
    if empty:
        raise ValueError(
            f"domain {empty[0]} has no token that counts; give it validation data or leave it out"
        )
    return (sums / tokens).exp().to(upcast(nll).dtype)


def _ratios(student: Tensor, teacher: Tensor) -> Tensor:
    check_same_shape(student_perplexity=student, teacher_perplexity=teacher)
    if student.dim() != 1 or not len(student):
        raise ValueError(f"perplexities must be [domains], at least one; got {list(student.shape)}")
    for side, perplexity in (("student", student), ("teacher", teacher)):
        for domain, value in enumerate(perplexity.tolist()):
            if not (math.isfinite(value) and value > 0):
                raise ValueError(
                    f"the {side}'s perplexity on domain {domain} is {value}; it must be finite and above 0"
                )
    return upcast(student.detach()) / upcast(teacher.detach())


def _shares(factor: Tensor) -> Tensor:
    shares = upcast(factor.detach())
    if factor.dim() != 1 or not len(factor):
        raise ValueError(f"factor must be [domains], at least one; got {list(factor.shape)}")
    if not (bool((shares >= 0).all()) and math.isclose(float(shares.sum()), 1, abs_tol=1e-4)):
        raise ValueError(f"factor must hold shares from 0 on that sum to 1; got {shares.tolist()}")
    return shares
