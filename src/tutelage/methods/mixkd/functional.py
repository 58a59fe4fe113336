"""The study's own math: how much is mixed, the loss without a temperature, and how smooth outputs are."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from tutelage.functional.checks import check_positive, check_same_shape, check_share, check_target
from tutelage.functional.divergences import entropy
from tutelage.functional.reductions import upcast

__all__ = [
    "MixStdLoss",
    "Smoothness",
    "mixstd_loss",
    "output_smoothness",
    "partial_mixup_weight",
    "standardize_logits",
]

Logits = Float[Tensor, "batch classes"]
Scalar = Float[Tensor, ""]


class MixStdLoss(NamedTuple):
    """``total = cls + div``, the parts with their weights in them."""

    total: Scalar
    cls: Scalar
    div: Scalar


class Smoothness(NamedTuple):
    """Means over rows: entropy in nats and largest probability of ``softmax(z / temperature)``, deviation of ``z``."""

    entropy: Scalar
    std: Scalar
    max_prob: Scalar


def partial_mixup_weight(
    batch: int,
    *,
    beta: float | int = 1.0,
    unmixed: float | int = 0.9,
    exact: bool = True,
    generator: torch.Generator | None = None,
) -> Float[Tensor, " batch"]:
    """Share of each row's first partner: drawn from ``Beta(beta, beta)``, and 1 for the rows that stay unmixed.

    Args:
        batch: rows.
        beta: both parameters of the distribution, above 0; 1 is uniform.
        unmixed: share of the rows that is left alone, in [0, 1]: 0.9 mixes about a tenth, 0 all.
        exact: ``int(batch * unmixed)`` different rows are left alone. False, as in the authors' code: as many are drawn
            with replacement, so that a share of about ``1 - exp(-unmixed)`` is left alone (59 % for 0.9).
        generator: draws on its own device; none: the global one on the CPU.

    Returns:
        ``[batch]`` in [0, 1].

    Raises:
        ValueError: a negative ``batch``, ``beta`` not above 0, or ``unmixed`` outside [0, 1].

    Source: Choi et al., "Understanding the Role of Mixup in Knowledge Distillation" (arXiv 2211.03946), section 4.
    """
    if batch < 0:
        raise ValueError(f"batch must be 0 or more rows; got {batch}")
    check_positive("beta", beta)
    check_share("unmixed", unmixed)
    device = generator.device if generator is not None else None
    # torch.distributions takes no generator. Two-part Dirichlet is Beta, and has no 0/0 where beta is small.
    parts = torch.full((batch, 2), float(beta), device=device)
    weight = torch._sample_dirichlet(parts, generator)[:, 0].clone() if batch else parts[:, 0]
    count = int(batch * unmixed)
    if exact:
        alone = torch.randperm(batch, generator=generator, device=device)[:count]
    else:
        alone = torch.randint(max(batch, 1), (count,), generator=generator, device=device)
    return weight.index_fill_(0, alone, 1.0)


def standardize_logits(logits: Logits, *, eps: float = 1e-7) -> Logits:
    """Logits divided by their own standard deviation over the classes (unbiased), which keeps its gradient.

    Args:
        logits: ``[batch, classes]`` of at least two classes.
        eps: least deviation, for rows of equal logits.

    Returns:
        ``[batch, classes]``, at least float32, of deviation 1; not centred. Rows of equal logits stay equal.

    Raises:
        ValueError: fewer than two classes.

    Source: Choi et al. (arXiv 2211.03946), section 4.
    """
    if logits.shape[1] < 2:
        raise ValueError(f"a deviation over classes needs two of them; got {logits.shape[1]}")
    wide = upcast(logits)
    if not len(wide):
        return wide
    return wide / wide.std(1, keepdim=True).clamp(min=eps)


def mixstd_loss(
    student_logits: Logits,
    teacher_logits: Logits,
    target: Tensor,
    *,
    gamma: float | int = 0.1,
    alpha: float | int = 0.9,
) -> MixStdLoss:
    """Cross-entropy with the labels and divergence from the teacher, both of logits divided by their own deviation.

    ``cls = gamma · mean CE(softmax(u_s), target)``, ``div = alpha · mean KL(softmax(u_t) || softmax(u_s))`` with
    ``u = z / std(z)``: the deviation stands in for a temperature, so there is no factor of one. No class can be more
    probable than a bound that depends on their number (0.72 for ten), so ``cls`` does not reach 0 with class ids.

    Args:
        student_logits: ``[batch, classes]``.
        teacher_logits: ``[batch, classes]``; detached.
        target: distributions ``[batch, classes]``, or class ids ``[batch]``.
        gamma, alpha: weights of the two parts.

    Returns:
        Scalars in nats, at least float32. No rows: 0 with a zero gradient.

    Raises:
        ValueError: shapes do not agree, or there are fewer than two classes.

    Source: Choi et al. (arXiv 2211.03946), section 4.
    """
    check_same_shape(student_logits=student_logits, teacher_logits=teacher_logits)
    check_target(target, student_logits)
    rows = max(len(student_logits), 1)
    ours = F.log_softmax(standardize_logits(student_logits), dim=1)
    theirs = F.log_softmax(standardize_logits(teacher_logits.detach()), dim=1).to(ours.dtype)
    if target.dim() == 2:
        label = -torch.dot(target.to(ours.dtype).flatten(), ours.flatten())
    else:
        label = F.nll_loss(ours, target.long(), reduction="sum")
    cls = label * (gamma / rows)
    div = F.kl_div(ours, theirs, reduction="sum", log_target=True) * (alpha / rows)
    return MixStdLoss(cls + div, cls, div)


def output_smoothness(logits: Logits, *, temperature: float | int = 1.0) -> Smoothness:
    """How smooth outputs are: mean entropy, mean deviation of the logits, mean largest probability.

    Args:
        logits: ``[batch, classes]`` of at least two classes.
        temperature: of the probabilities; above 0.

    Raises:
        ValueError: fewer than two classes, no rows, or a temperature that is not above 0.

    Source: after the analysis of Choi et al. (arXiv 2211.03946), section 3.
    """
    check_positive("temperature", temperature)
    if not len(logits) or logits.shape[1] < 2:
        raise ValueError(f"smoothness needs rows of at least two classes; got shape {list(logits.shape)}")
    wide = upcast(logits)
    largest = F.softmax(wide / temperature, dim=1).amax(1)
    return Smoothness(entropy(wide, temperature).mean(), wide.std(1).mean(), largest.mean())
