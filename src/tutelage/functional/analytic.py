"""Divergences of next-token distributions with their gradients written out, for the losses of `fused`.

Each is a sum over the vocabulary of a term of ``log q`` (student) and ``log p`` (teacher). A class gives a row's sum
and the terms' derivatives by ``log q``; the softmax's own derivative is the same for all: the gradient by the logits is
``derivative - q · Σ derivative``. A new divergence inherits everything else from `fused`.

An entry that is -inf on either side is left out of value and gradient, as in `token_divergences`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any, ClassVar

import torch
from torch import Tensor

from tutelage.functional.checks import check_share
from tutelage.functional.fused_vocabulary import Vocabulary

__all__ = ["make_divergence"]

Values = tuple[Tensor, Tensor]
"""A row's divergence ``[rows]``, and the derivative of its terms by log q, ``[rows, vocabulary]``."""


@dataclass(frozen=True)
class Divergence(ABC):
    """One divergence."""

    def __call__(self, log_q: Tensor, log_p: Tensor, vocabulary: Vocabulary | None = None) -> Values:
        """The divergence of each row ``[rows]`` and its gradient by the student's logits ``[rows, vocabulary]``.

        Args:
            log_q: the student's log-probabilities ``[rows, vocabulary]``, float32 or float64.
            log_p: the teacher's, likewise.
            vocabulary: how rows are summed; left out: they lie here whole.
        """
        vocabulary = vocabulary or Vocabulary(log_q.shape[-1])
        q = log_q.exp()
        value, slope = self.values(log_q.clone(), log_p.clone(), q, vocabulary, finite=False)
        return value, slope.addcmul(q, vocabulary.total_of(slope)[:, None], value=-1)

    @abstractmethod
    def values(
        self, log_q: Tensor, log_p: Tensor, q: Tensor, vocabulary: Vocabulary, *, finite: bool
    ) -> Values:
        """Sums and derivatives of the terms; overwrites ``log_q`` and ``log_p`` and leaves ``q`` as it is.

        Args:
            finite: nothing is -inf, so nothing has to be looked for.
        """


class TermByTerm(Divergence):
    """A sum of terms, each of one entry. Subclasses write `terms`."""

    reads_p: ClassVar[bool] = True
    """Whether `terms` looks at ``p``, which takes a pass over all entries to make."""

    def values(
        self, log_q: Tensor, log_p: Tensor, q: Tensor, vocabulary: Vocabulary, *, finite: bool
    ) -> Values:
        """See `Divergence.values`."""
        p = log_p.exp() if self.reads_p else log_p
        if not finite:
            left_out = log_q.isinf() | log_p.isinf()
            q = q.masked_fill(left_out, 0.0)
            for entries in (log_q, log_p, p):
                entries.masked_fill_(left_out, 0.0)
        return self.terms(log_q, log_p, q, p, vocabulary)

    @abstractmethod
    def terms(self, log_q: Tensor, log_p: Tensor, q: Tensor, p: Tensor, vocabulary: Vocabulary) -> Values:
        """As `values`, of what is finite; ``p`` may be overwritten too. Where it is not read, it is ``log_p``."""


@dataclass(frozen=True)
class ForwardKL(TermByTerm):
    """``Σ p (log p - log q)``; without the teacher's entropy ``-Σ p log q``."""

    subtract_entropy: bool = True

    def terms(self, log_q: Tensor, log_p: Tensor, q: Tensor, p: Tensor, vocabulary: Vocabulary) -> Values:
        against = log_p.sub_(log_q) if self.subtract_entropy else log_q.neg_()
        return vocabulary.dot(p, against), p.neg_()


@dataclass(frozen=True)
class ReverseKL(TermByTerm):
    """``Σ q (log q - log p)``."""

    reads_p = False

    def terms(self, log_q: Tensor, log_p: Tensor, q: Tensor, p: Tensor, vocabulary: Vocabulary) -> Values:
        apart = log_q.sub_(log_p)
        return vocabulary.dot(q, apart), torch.addcmul(q, q, apart, out=apart)


def _both_ways(
    log_q: Tensor,
    log_p: Tensor,
    q: Tensor,
    p: Tensor,
    vocabulary: Vocabulary,
    reverse: float | int | Tensor,
    subtract_entropy: bool = True,
) -> Values:
    """``(1 - reverse) KL(p || q) + reverse KL(q || p)``; the share a number, or one a row."""
    against = log_p - log_q if subtract_entropy else -log_q
    value = (1 - reverse) * vocabulary.dot(p, against)
    apart = log_q.sub_(log_p)
    value = value + reverse * vocabulary.dot(q, apart)
    share = reverse[:, None] if isinstance(reverse, Tensor) else reverse
    return value, torch.addcmul(q, q, apart, out=apart).mul_(share).sub_(p.mul_(1 - share))


@dataclass(frozen=True)
class SymmetricKL(TermByTerm):
    """``(1 - weight) KL(p || q) + weight KL(q || p)``."""

    weight: float | int = 0.9
    subtract_entropy: bool = True

    def __post_init__(self) -> None:
        check_share("weight", self.weight)

    def terms(self, log_q: Tensor, log_p: Tensor, q: Tensor, p: Tensor, vocabulary: Vocabulary) -> Values:
        return _both_ways(log_q, log_p, q, p, vocabulary, self.weight, self.subtract_entropy)


@dataclass(frozen=True)
class AdaptiveKL(TermByTerm):
    """``a KL(p || q) + (1 - a) KL(q || p)``: ``a``, detached, is the share of ``Σ |p - q|`` that lies in the teacher's
    head, its likeliest entries whose mass is up to ``mu``, the first of them always among them. Where ``p = q``, ½.

    Source: Wu et al., "Rethinking Kullback-Leibler Divergence in Knowledge Distillation for Large Language Models"
    (arXiv 2404.02657).
    """

    mu: float | int = 0.5

    def __post_init__(self) -> None:
        check_share("mu", self.mu)

    def terms(self, log_q: Tensor, log_p: Tensor, q: Tensor, p: Tensor, vocabulary: Vocabulary) -> Values:
        return _both_ways(log_q, log_p, q, p, vocabulary, 1 - self._head_share(q, p, vocabulary))

    def _head_share(self, q: Tensor, p: Tensor, vocabulary: Vocabulary) -> Tensor:
        q, p = vocabulary.whole(q), vocabulary.whole(p)
        gap = (p - q).abs_()
        whole = gap.sum(-1)
        if self.mu >= 1:  # of all mass, 1, the sum's rounding says nothing
            return torch.where(whole > 0, 1.0, 0.5).to(whole)
        # Mostly few entries hold the head's mass, and to sort all takes longer than everything else.
        for count in (64, 1024, p.shape[-1]):
            largest, ids = p.topk(min(count, p.shape[-1]))
            mass = largest.cumsum(-1)
            if bool((mass[:, -1] > self.mu).all()):
                break
        head = mass <= self.mu
        head[:, 0] = True
        in_head = (gap.gather(-1, ids) * head).sum(-1)
        return torch.where(whole > 0, in_head / whole.clamp(min=torch.finfo(whole.dtype).tiny), 0.5)


@dataclass(frozen=True)
class TotalVariation(TermByTerm):
    """``½ Σ |p - q|``."""

    def terms(self, log_q: Tensor, log_p: Tensor, q: Tensor, p: Tensor, vocabulary: Vocabulary) -> Values:
        apart = torch.sub(q, p, out=p)
        value = vocabulary.sum_(torch.linalg.vector_norm(apart, 1, -1))
        return value / 2, apart.sign_().mul_(q).mul_(0.5)


def _mixture(first: Tensor, second: Tensor, share: float | int) -> Tensor:
    """``(1 - share) first + share second``. Where it is too small for a number, so are both sides, and what its
    logarithm multiplies is 0: any finite one serves."""
    return torch.lerp(first, second, share).clamp_(min=torch.finfo(first.dtype).tiny)


@dataclass(frozen=True)
class SkewedForwardKL(TermByTerm):
    """``Σ p (log p - log m)``, ``m = skew p + (1 - skew) q``; without the teacher's entropy ``-Σ p log m``."""

    skew: float | int = 0.1
    subtract_entropy: bool = True

    def __post_init__(self) -> None:
        check_share("skew", self.skew)

    def terms(self, log_q: Tensor, log_p: Tensor, q: Tensor, p: Tensor, vocabulary: Vocabulary) -> Values:
        if self.skew == 0:
            return ForwardKL(self.subtract_entropy).terms(log_q, log_p, q, p, vocabulary)
        mixture = _mixture(q, p, self.skew)
        log_mixture = mixture.log()
        against = log_p.sub_(log_mixture) if self.subtract_entropy else log_mixture.neg_()
        return vocabulary.dot(p, against), p.mul_(q).div_(mixture).mul_(self.skew - 1)


@dataclass(frozen=True)
class SkewedReverseKL(TermByTerm):
    """``Σ q (log q - log m)``, ``m = (1 - skew) p + skew q``."""

    skew: float | int = 0.1

    def __post_init__(self) -> None:
        check_share("skew", self.skew)

    def terms(self, log_q: Tensor, log_p: Tensor, q: Tensor, p: Tensor, vocabulary: Vocabulary) -> Values:
        if self.skew == 0:
            return ReverseKL().terms(log_q, log_p, q, p, vocabulary)
        mixture = _mixture(p, q, self.skew)
        apart = log_q.sub_(mixture.log())
        value = vocabulary.dot(q, apart)
        apart.sub_(torch.div(q, mixture, out=mixture), alpha=self.skew)
        return value, torch.addcmul(q, q, apart, out=apart)


@dataclass(frozen=True)
class GeneralizedJSD(TermByTerm):
    """``beta KL(p || m) + (1 - beta) KL(q || m)``, ``m = beta p + (1 - beta) q``; at beta 0 ``KL(p || q)`` and at
    beta 1 ``KL(q || p)``: a switch, not the limit."""

    beta: float | int = 0.5

    def __post_init__(self) -> None:
        check_share("beta", self.beta)

    def terms(self, log_q: Tensor, log_p: Tensor, q: Tensor, p: Tensor, vocabulary: Vocabulary) -> Values:
        if self.beta in (0, 1):
            switched = ReverseKL() if self.beta == 1 else ForwardKL()
            return switched.terms(log_q, log_p, q, p, vocabulary)
        log_mixture = _mixture(q, p, self.beta).log_()
        teachers = vocabulary.dot(p, log_p.sub_(log_mixture))
        apart = log_q.sub_(log_mixture)
        students = vocabulary.dot(q, apart)
        return self.beta * teachers + (1 - self.beta) * students, apart.mul_(q).mul_(1 - self.beta)


@dataclass(frozen=True)
class Interpolated(Divergence):
    """TAID: a divergence from ``p_t = softmax((1 - t) log q + t log p)`` in place of p, the student's part detached.

    Attributes:
        t: the teacher's weight, in [0, 1]: a number, or a tensor of one (not checked: a device need not be waited for).
        subtract_entropy: ``KL(p_t || q)``; else ``-Σ p_t log q``.
        of: another divergence than these two.

    Source: Shing et al., "TAID: Temporally Adaptive Interpolated Distillation for Efficient Knowledge Transfer in
    Language Models" (arXiv 2501.16937).
    """

    t: float | int | Tensor = 1.0
    subtract_entropy: bool = False
    of: Divergence | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.t, Tensor):
            check_share("t", self.t)
        elif self.t.dim() != 0:
            raise ValueError(f"t must be a single number; got a tensor of shape {list(self.t.shape)}")

    def values(
        self, log_q: Tensor, log_p: Tensor, q: Tensor, vocabulary: Vocabulary, *, finite: bool
    ) -> Values:
        t = self.t.to(log_q) if isinstance(self.t, Tensor) else log_q.new_full((), self.t)
        if finite:
            mixed = torch.lerp(log_q, log_p, t)
        else:  # at the ends one side is out of play, and 0 times its -inf would be NaN
            mixed = torch.where(t == 0, log_q, torch.where(t == 1, log_p, (1 - t) * log_q + t * log_p))
        divergence = self.of or ForwardKL(self.subtract_entropy)
        return divergence.values(log_q, vocabulary.log_softmax_(mixed), q, vocabulary, finite=finite)


DIVERGENCES: dict[str, type[Divergence]] = {
    "forward_kl": ForwardKL,
    "reverse_kl": ReverseKL,
    "symmetric_kl": SymmetricKL,
    "skewed_forward_kl": SkewedForwardKL,
    "skewed_reverse_kl": SkewedReverseKL,
    "generalized_jsd": GeneralizedJSD,
    "adaptive_kl": AdaptiveKL,
    "total_variation": TotalVariation,
    "taid": Interpolated,
}

OfLogits = Callable[[Tensor, Tensor], Tensor]
"""A divergence of one's own: student logits and teacher logits ``[rows, vocabulary]`` to values ``[rows]``."""


def make_divergence(
    divergence: str | Divergence | OfLogits = "forward_kl", **options: Any
) -> Divergence | OfLogits:
    """A divergence by name and options; an object or a callable as it is.

    Args:
        divergence: ``forward_kl``, ``reverse_kl``, ``symmetric_kl``, ``skewed_forward_kl``, ``skewed_reverse_kl``,
            ``generalized_jsd``, ``adaptive_kl``, ``total_variation`` or ``taid``; or what is already one.
        options: of the named one: ``subtract_entropy``, ``weight``, ``skew``, ``beta``, ``mu``, ``t``, ``of``.

    Raises:
        ValueError: unknown name or option, or an option out of its range.
    """
    if not isinstance(divergence, str):
        if options:
            raise ValueError(f"options belong to a divergence given by name; got {', '.join(options)}")
        return divergence
    if divergence not in DIVERGENCES:
        raise ValueError(f"divergence must be one of {', '.join(DIVERGENCES)}; got {divergence!r}")
    made = DIVERGENCES[divergence]
    allowed = [each.name for each in fields(made)]
    unknown = [name for name in options if name not in allowed]
    if unknown:
        takes = f"takes {', '.join(allowed)}" if allowed else "takes no options"
        raise ValueError(f"{divergence} {takes}; got {', '.join(unknown)}")
    return made(**options)
