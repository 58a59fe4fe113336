"""The loss of OFA-KD (arXiv 2310.19444), and the merging of patches in its exit branches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float, Integer
from torch import Tensor

from tutelage.functional.checks import check_positive, check_same_shape, check_target
from tutelage.functional.divergences import tempered
from tutelage.functional.reductions import masked_mean, upcast

__all__ = ["OFATerms", "ofa_loss", "ofakd_loss", "patch_merge"]

Form = Literal["code", "paper"]


class OFATerms(NamedTuple):
    """OFA-KD: its sum, and its three parts, all with their weights in them."""

    total: Float[Tensor, ""]
    label: Float[Tensor, ""]
    logits: Float[Tensor, ""]
    branches: Float[Tensor, ""]


def ofa_loss(
    logits: Float[Tensor, "batch classes"],
    teacher_logits: Float[Tensor, "batch classes"],
    target: Integer[Tensor, " batch"] | Float[Tensor, "batch classes"],
    gamma: float | int = 1.0,
    temperature: float | int = 1.0,
    form: Form = "code",
) -> Float[Tensor, ""]:
    """Cross-entropy with the teacher's probabilities, the target class enhanced: ``-mean Σ_c w_c log q_c``.

    ``p`` and ``q`` are the softmaxes of teacher and student logits over ``temperature``, ``t`` the target class.

    - ``code``: ``w_t = (1 + p_t)^gamma - 1``, every other ``w_c = p_c^gamma``;
    - ``paper``: ``w_t = (1 + p_t)^gamma``, which holds the label's cross-entropy, every other ``w_c = p_c``.

    With gamma 1, ``code`` is the plain cross-entropy to ``p``. The weights do not sum to one otherwise, so the loss is
    not least at ``q = p``, and values near 10 are normal for gamma 2. There is no factor temperature².

    Args:
        logits: of the student or of one of its exits, ``[batch, classes]``.
        teacher_logits: ``[batch, classes]``; detached.
        target: class ids ``[batch]``, or distributions ``[batch, classes]`` whose largest entry is the target class.
        gamma: power of the enhancement; above 0.
        temperature: softens both sides; above 0.
        form: which weights.

    Returns:
        A scalar in nats, mean over rows, at least float32; an empty batch gives 0 with a zero gradient.

    Raises:
        ValueError: shapes do not agree, gamma or temperature is not above 0, or an unknown form.
        IndexError: a class id is out of range.

    Source: arXiv 2310.19444, section 3.3; the authors' code for ``code``.
    """
    check_same_shape(logits=logits, teacher_logits=teacher_logits)
    return exit_losses([logits], teacher_logits, target, [gamma], temperature, form)[0]


def ofakd_loss(
    student_logits: Float[Tensor, "batch classes"],
    branch_logits: Sequence[Float[Tensor, "batch classes"]],
    teacher_logits: Float[Tensor, "batch classes"],
    target: Integer[Tensor, " batch"] | Float[Tensor, "batch classes"],
    gamma: float | int | Sequence[float | int] = 1.0,
    temperature: float | int = 1.0,
    label_weight: float | int = 1.0,
    logit_weight: float | int = 1.0,
    branch_weight: float | int = 1.0,
    form: Form = "code",
) -> OFATerms:
    """The whole loss of a step: label, `ofa_loss` of the final logits, and the sum of it over the exits.

    Args:
        student_logits: ``[batch, classes]``.
        branch_logits: of the exit branches, each ``[batch, classes]``; nothing of them is detached.
        teacher_logits: ``[batch, classes]``; detached.
        target: class ids ``[batch]``, or distributions ``[batch, classes]``, which the label's part takes whole.
        gamma: one for all, or one a branch and then the final logits'.
        temperature: of the `ofa_loss` parts; above 0.
        label_weight, logit_weight, branch_weight: weights of the three parts. ``form="paper"`` holds the label itself:
            give it ``label_weight=0``.
        form: as `ofa_loss`.

    Returns:
        Scalars in nats, means over rows, at least float32.

    Raises:
        ValueError: shapes do not agree, the number of gammas fits neither, or as `ofa_loss`.
        IndexError: a class id is out of range.

    Source: arXiv 2310.19444, section 3.3; the authors' code.
    """
    exits = {f"branch_logits[{k}]": logits for k, logits in enumerate(branch_logits)}
    check_same_shape(student_logits=student_logits, teacher_logits=teacher_logits, **exits)
    gammas = spread_gamma(gamma, len(branch_logits))
    *branches, last = exit_losses(
        [*branch_logits, student_logits], teacher_logits, target, gammas, temperature, form
    )
    label = label_weight * _label_loss(student_logits, target)
    logits = logit_weight * last
    exit_sum = branch_weight * torch.stack(branches).sum() if branches else torch.zeros_like(last)
    return OFATerms(label + logits + exit_sum, label, logits, exit_sum)


def patch_merge(
    tokens: Float[Tensor, "batch patches dim"], height: int, width: int
) -> Float[Tensor, "batch merged 4*dim"]:
    """Concatenate each 2x2 square of patches into one, channel-wise.

    In a square they come in the order (even row, even column), (odd, even), (even, odd), (odd, odd), counted from 0.

    Args:
        tokens: ``[batch, height * width, dim]``, row by row, without class tokens.
        height, width: of the grid; even.

    Returns:
        ``[batch, height * width / 4, 4 * dim]``, row by row.

    Raises:
        ValueError: an odd grid, or one that does not have so many patches.

    Source: Liu et al., "Swin Transformer" (arXiv 2103.14030), section 3.1.
    """
    batch, patches, dim = tokens.shape
    if height % 2 or width % 2:
        raise ValueError(f"patches are merged in squares of 2x2: the grid {height}x{width} must be even")
    if height * width != patches:
        raise ValueError(f"a grid {height}x{width} has {height * width} patches; got {patches}")
    # [batch, row, odd row?, column, odd column?, dim]: the column's parity is the slower index in the result.
    squares = tokens.reshape(batch, height // 2, 2, width // 2, 2, dim).permute(0, 1, 3, 4, 2, 5)
    return squares.reshape(batch, patches // 4, 4 * dim)


def exit_losses(
    exits: Sequence[Float[Tensor, "batch classes"]],
    teacher_logits: Float[Tensor, "batch classes"],
    target: Integer[Tensor, " batch"] | Float[Tensor, "batch classes"],
    gammas: Sequence[float | int],
    temperature: float | int,
    form: str,
) -> list[Float[Tensor, ""]]:
    """`ofa_loss` of each of several logits, one gamma each; weights that are alike are made once."""
    check_positive("temperature", temperature)
    for gamma in gammas:
        check_positive("gamma", gamma)
    if form not in ("code", "paper"):
        raise ValueError(f"form must be 'code' or 'paper'; got {form!r}")
    check_target(target, teacher_logits)
    teacher = tempered(teacher_logits.detach(), temperature).softmax(-1)
    ids = (target.argmax(1) if target.dim() == 2 else target.long())[:, None]
    weights = {gamma: _weights(teacher, ids, gamma, form) for gamma in set(gammas)}
    return [
        -masked_mean((weights[gamma] * tempered(logits, temperature).log_softmax(-1)).sum(-1))
        for logits, gamma in zip(exits, gammas, strict=True)
    ]


def spread_gamma(gamma: float | int | Sequence[float | int], branches: int) -> list[float | int]:
    """One gamma a branch and one for the final logits, from one for all or from that many.

    Raises:
        ValueError: another number of gammas.
    """
    given = list(gamma) if isinstance(gamma, Sequence) else [gamma]
    if len(given) not in (1, branches + 1):
        raise ValueError(
            f"gamma must be one number, or {branches + 1}: one for each of {branches} branch(es) and one for the "
            f"final logits; got {len(given)}"
        )
    return given * (branches + 1) if len(given) == 1 else given


def _weights(
    teacher: Float[Tensor, "batch classes"], ids: Integer[Tensor, "batch 1"], gamma: float | int, form: str
) -> Float[Tensor, "batch classes"]:
    # expm1 and log1p, since (1 + p)^gamma - 1 would lose a small p.
    growth = torch.expm1(gamma * torch.log1p(teacher.gather(1, ids)))
    if form == "paper":
        return teacher.scatter(1, ids, growth + 1)
    return teacher.pow(gamma).scatter_(1, ids, growth)


def _label_loss(
    logits: Float[Tensor, "batch classes"],
    target: Integer[Tensor, " batch"] | Float[Tensor, "batch classes"],
) -> Float[Tensor, ""]:
    log_probs = upcast(logits).log_softmax(-1)
    if target.dim() == 2:
        return -masked_mean((target.detach() * log_probs).sum(-1))
    return -masked_mean(log_probs.gather(1, target.long()[:, None])[:, 0])
