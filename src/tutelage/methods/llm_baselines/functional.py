"""What training on a model's own text needs: labels of generated rows, DistiLLM's scheduler, MiniLLM's policy loss."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from jaxtyping import Bool, Float, Integer, Shaped
from torch import Tensor

from tutelage.functional.checks import check_positive, check_same_shape, check_share
from tutelage.functional.reductions import masked_mean, upcast
from tutelage.functional.tokens import check_same_vocabulary, token_nll

__all__ = [
    "MiniLLMRollout",
    "adaptive_sgo_source",
    "adaptive_sgo_threshold",
    "minillm_advantages",
    "minillm_policy_loss",
    "minillm_rollout",
    "on_policy_labels",
]

_WHITENING_EPS = 1e-8


class MiniLLMRollout(NamedTuple):
    """What is kept of sampled text, all ``[batch, length]`` and detached: log-probabilities of its tokens under teacher
    and rollout model (0 where they do not count), rewards, importance weights, and the estimated reverse KL."""

    teacher_logprobs: Float[Tensor, "batch length"]
    rollout_logprobs: Float[Tensor, "batch length"]
    rewards: Float[Tensor, "batch length"]
    importance_weight: Float[Tensor, "batch length"]
    reverse_kl: Float[Tensor, "batch length"]


def on_policy_labels(
    prompt_ids: Integer[Tensor, "batch prompt"],
    prompt_mask: Shaped[Tensor, "batch prompt"],
    completion_ids: Integer[Tensor, "batch completion"],
    eos_token_id: int | Sequence[int] | None,
    *,
    ignore_index: int = -100,
) -> tuple[Integer[Tensor, "batch length"], Integer[Tensor, "batch length"], Integer[Tensor, "batch length"]]:
    """Prompts and what a model wrote after them as one row each, with its labels: the completion up to its first stop
    token, which counts.

    Args:
        prompt_ids: ``[batch, prompt]``.
        prompt_mask: ``[batch, prompt]``, not zero where a token is no padding.
        completion_ids: ``[batch, completion]``; what follows the first stop token is padding.
        eos_token_id: the stop token, several of them, or None: then every token of a completion counts.
        ignore_index: label of what does not count: the prompt, and all after the stop token.

    Returns:
        ``input_ids``, ``attention_mask`` (0 or 1) and ``target``, each ``[batch, prompt + completion]`` int64. The
        target is not shifted: it stands where the input's token does.

    Raises:
        ValueError: shapes do not agree.

    Source: Agarwal et al., "On-Policy Distillation of Language Models: Learning from Self-Generated Mistakes"
    (arXiv 2306.13649).
    """
    check_same_shape(prompt_ids=prompt_ids, prompt_mask=prompt_mask)
    if prompt_ids.dim() != 2 or completion_ids.dim() != 2 or len(prompt_ids) != len(completion_ids):
        raise ValueError(
            "prompts and completions must be [batch, tokens] of one batch; got "
            f"{list(prompt_ids.shape)} and {list(completion_ids.shape)}"
        )
    stops = [eos_token_id] if isinstance(eos_token_id, int) else list(eos_token_id or [])
    is_stop = torch.isin(completion_ids, torch.tensor(stops, dtype=torch.long, device=completion_ids.device))
    written = is_stop.cumsum(1) - is_stop.long() == 0  # no stop token stands before
    attention = torch.cat([prompt_mask != 0, written], 1).long()
    labels = torch.where(written, completion_ids.long(), ignore_index)
    target = torch.cat([torch.full_like(prompt_ids, ignore_index, dtype=torch.long), labels], 1)
    return torch.cat([prompt_ids, completion_ids], 1).long(), attention, target


def adaptive_sgo_threshold(
    val_losses: Float[Tensor, " n"],
    *,
    loss_eps: float | int = 0.1,
    start: float | int = 0.0,
    step: float | int = 0.1,
    maximum: float | int = 1.0,
) -> Float[Tensor, " n"]:
    """How often to train on student-generated output, after each validation: the threshold rises by ``step`` when the
    loss stands ``loss_eps`` or more above its reference, and that loss becomes the reference.

    The first loss is the first reference. It serves the whole past at once: a loop keeps the losses and takes the last
    value.

    Args:
        val_losses: ``[n]``, in the order of the validations.
        loss_eps: how much worse counts as worse.
        start, step, maximum: of the threshold; start and maximum in [0, 1], step above 0.

    Returns:
        ``[n]``, the threshold after each validation, in the losses' type.

    Raises:
        ValueError: a loss is not finite, or an option is out of range.

    Source: Ko et al., "DistiLLM: Towards Streamlined Distillation for Large Language Models" (arXiv 2402.03898).
    """
    check_share("start", start)
    check_share("maximum", maximum)
    check_positive("step", step)
    reference, rises, thresholds = math.inf, 0, []
    for position, loss in enumerate(val_losses.tolist()):
        if not math.isfinite(loss):
            raise ValueError(f"validation {position} has the loss {loss}; the schedule needs finite ones")
        if position == 0:
            reference = loss
        elif loss >= reference + loss_eps:
            reference, rises = loss, rises + 1
        thresholds.append(min(maximum, start + rises * step))
    return val_losses.new_tensor(thresholds)


def adaptive_sgo_source(
    u: float | int,
    threshold: float | int,
    progress: float | int,
    buffer_full: bool,
    *,
    replay: Literal["decreasing", "constant", "increasing"] = "decreasing",
) -> Literal["generate", "replay", "data"]:
    """Where a batch comes from: written by the student anew, from the buffer of what it wrote, or the data.

    ``generate`` where u lies below the threshold times a factor, or below the threshold while the buffer is not full;
    else ``replay`` below the threshold; else ``data``.

    Args:
        u: drawn uniformly from [0, 1).
        threshold: of `adaptive_sgo_threshold`, in [0, 1].
        progress: step / total steps, in [0, 1].
        buffer_full: whether the buffer holds as much as it can.
        replay: the factor: ``decreasing`` is 1 - progress, ``constant`` one half, ``increasing`` is progress.

    Raises:
        ValueError: a value out of range, or an unknown replay.

    Source: Ko et al., "DistiLLM: Towards Streamlined Distillation for Large Language Models" (arXiv 2402.03898).
    """
    for name, value in (("u", u), ("threshold", threshold), ("progress", progress)):
        check_share(name, value)
    factors = {"decreasing": 1 - progress, "constant": 0.5, "increasing": progress}
    if replay not in factors:
        raise ValueError(f"replay must be one of {', '.join(factors)}; got {replay!r}")
    if u >= threshold:
        return "data"
    return "generate" if u < threshold * factors[replay] or not buffer_full else "replay"


def minillm_rollout(
    teacher_logits: Float[Tensor, "batch length vocabulary"],
    rollout_logits: Float[Tensor, "batch length vocabulary"],
    ids: Integer[Tensor, "batch length"],
    mask: Shaped[Tensor, "batch length"],
    *,
    reward_mask: Shaped[Tensor, "batch length"] | None = None,
    teacher_mixed_alpha: float | int = 0.2,
    reward_scaling: float | int = 0.5,
    cliprange_reward: float | int = 100.0,
) -> MiniLLMRollout:
    """Rewards ``clip((log p - log q) / reward_scaling)`` of sampled tokens, and the weights that undo the teacher's
    share in the sampling, ``q / ((1 - alpha) q + alpha p)``: token by token, without the prefix's product.

    ``p`` is the teacher's and ``q`` the rollout model's probability of the token.

    Args:
        teacher_logits, rollout_logits: ``[batch, length, vocabulary]``, row i predicts id i.
        ids: ``[batch, length]``, the sampled tokens; of no account where they do not count.
        mask: ``[batch, length]``, not zero where a token counts.
        reward_mask: as ``mask``, for the teacher's part of rewards; ``mask`` itself unless given.
        teacher_mixed_alpha: the teacher's share of the policy that sampled, in [0, 1]; 0 makes all weights 1.
        reward_scaling: divides rewards before they are clipped; above 0.
        cliprange_reward: largest size of a reward; above 0.

    Returns:
        A `MiniLLMRollout`. ``reverse_kl`` is ``exp(x) - 1 - x``, ``x = log p - log q``, which estimates the reverse KL
        where the rollout model alone has sampled.

    Raises:
        ValueError: shapes or vocabularies do not agree, or an option is out of range.
        IndexError: an id that counts lies outside the vocabulary.

    Source: Gu et al., "MiniLLM: Knowledge Distillation of Large Language Models" (arXiv 2306.08543), and its code.
    """
    check_share("teacher_mixed_alpha", teacher_mixed_alpha)
    check_positive("reward_scaling", reward_scaling)
    check_positive("cliprange_reward", cliprange_reward)
    check_same_vocabulary(rollout_logits, teacher_logits)
    reward_mask = mask if reward_mask is None else reward_mask
    check_same_shape(ids=ids, mask=mask, reward_mask=reward_mask)
    counts, rewarded = mask != 0, reward_mask != 0
    # Where only one of the masks counts, the other side still reads its token.
    teacher = -token_nll(teacher_logits.detach(), ids, counts | rewarded)
    rollout = -token_nll(rollout_logits.detach(), ids, counts)
    rewards = torch.where(rewarded, teacher, 0.0) - rollout
    counted_teacher = torch.where(counts, teacher, 0.0)
    mixed = torch.logaddexp(
        rollout + _log(1 - teacher_mixed_alpha), counted_teacher + _log(teacher_mixed_alpha)
    )
    gap = torch.where(counts, rewards, 0.0)
    return MiniLLMRollout(
        teacher_logprobs=torch.where(rewarded, teacher, 0.0),
        rollout_logprobs=rollout,
        rewards=(rewards / reward_scaling).clamp(-cliprange_reward, cliprange_reward),
        importance_weight=(rollout - mixed).exp(),
        reverse_kl=gap.expm1() - gap,
    )


def minillm_advantages(
    rewards: Float[Tensor, "batch length"],
    mask: Shaped[Tensor, "batch length"],
    *,
    gamma: float | int = 0.95,
    whiten: bool | Literal["masked"] = True,
) -> Float[Tensor, "batch length"]:
    """Rewards to come, ``Σ_{k ≥ i} gamma^(k - i) r_k``, by the count of tokens from i on, then whitened.

    Args:
        rewards: ``[batch, length]``.
        mask: ``[batch, length]``, not zero where a token counts.
        gamma: discount of later rewards, in [0, 1].
        whiten: True takes mean and variance of all entries, padding included, as the authors' code does; ``"masked"``
            of those that count, and leaves 0 elsewhere; False does not whiten.

    Returns:
        ``[batch, length]``, detached, at least float32.

    Raises:
        ValueError: shapes do not agree, gamma lies outside [0, 1], or whiten is something else.

    Source: Gu et al., "MiniLLM: Knowledge Distillation of Large Language Models" (arXiv 2306.08543), and its code.
    """
    check_same_shape(rewards=rewards, mask=mask)
    check_share("gamma", gamma)
    if whiten not in (True, False, "masked"):
        raise ValueError(f"whiten must be True, False or 'masked'; got {whiten!r}")
    counts = mask != 0
    to_come, later = [], upcast(rewards.detach()).new_zeros(len(rewards))
    for reward in upcast(rewards.detach()).flip(1).unbind(1):
        later = reward + gamma * later
        to_come.append(later)
    total = torch.stack(to_come[::-1], 1) if to_come else upcast(rewards.detach())
    advantages = total / counts.long().flip(1).cumsum(1).flip(1).clamp(min=1)
    if whiten is False:
        return advantages
    return _whitened(advantages, counts if whiten == "masked" else torch.ones_like(counts))


def minillm_policy_loss(
    student_logits: Float[Tensor, "batch length vocabulary"],
    ids: Integer[Tensor, "batch length"],
    mask: Shaped[Tensor, "batch length"],
    rollout_logprobs: Float[Tensor, "batch length"],
    advantages: Float[Tensor, "batch length"],
    importance_weight: Float[Tensor, "batch length"],
    *,
    cliprange: float | int = 0.2,
) -> Float[Tensor, ""]:
    """PPO's clipped policy loss ``max(-A ratio, -A clamp(ratio, 1 - c, 1 + c))``, mean over the tokens that count.

    ``ratio = importance_weight · q(id) / q_rollout(id)``; the clamp acts on the whole of it.

    Args:
        student_logits: ``[batch, length, vocabulary]``, row i predicts id i.
        ids, mask: ``[batch, length]``, the sampled tokens and which of them count.
        rollout_logprobs, importance_weight: ``[batch, length]``, of `minillm_rollout`; detached.
        advantages: ``[batch, length]``, of `minillm_advantages`; detached.
        cliprange: c, above 0.

    Returns:
        A scalar, at least float32; 0 with a zero gradient where no token counts. A ratio that its type could not hold
        twice over stays at that bound, without a gradient.

    Raises:
        ValueError: shapes do not agree, or cliprange is not above 0.
        IndexError: an id that counts lies outside the vocabulary.

    Source: Gu et al., "MiniLLM: Knowledge Distillation of Large Language Models" (arXiv 2306.08543), and its code.
    """
    check_positive("cliprange", cliprange)
    check_same_shape(
        ids=ids,
        mask=mask,
        rollout_logprobs=rollout_logprobs,
        advantages=advantages,
        importance_weight=importance_weight,
    )
    counts = mask != 0
    log_ratio = torch.where(counts, -token_nll(student_logits, ids, counts) - rollout_logprobs.detach(), 0.0)
    bound = math.log(torch.finfo(log_ratio.dtype).max) / 2
    ratio = log_ratio.clamp(max=bound).exp() * importance_weight.detach()
    gain = -advantages.detach()
    return masked_mean(torch.maximum(gain * ratio, gain * ratio.clamp(1 - cliprange, 1 + cliprange)), mask)


def _whitened(
    values: Float[Tensor, "batch length"], counts: Bool[Tensor, "batch length"]
) -> Float[Tensor, "batch length"]:
    number = counts.sum()
    mean = torch.where(counts, values, 0.0).sum() / number.clamp(min=1)
    centred = torch.where(counts, values - mean, 0.0)
    variance = centred.square().sum() / (number - 1).clamp(min=1)
    return centred * (variance + _WHITENING_EPS).rsqrt()


def _log(share: float | int) -> float:
    return math.log(share) if share > 0 else -math.inf
