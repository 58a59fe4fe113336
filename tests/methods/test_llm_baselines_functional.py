"""Labels of generated rows, DistiLLM's scheduler, MiniLLM's rewards and policy loss: reference values, hand values."""

from __future__ import annotations

import math
from inspect import unwrap
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tutelage.functional import (
    adaptive_sgo_source,
    adaptive_sgo_threshold,
    minillm_advantages,
    minillm_policy_loss,
    minillm_rollout,
    on_policy_labels,
)

GOLDEN = Path(__file__).parent.parent / "golden" / "llm_baselines"
seeds = st.integers(0, 2**31 - 1)
quick = settings(max_examples=25, deadline=None)


def arrays(case: str) -> dict[str, Tensor]:
    with np.load(GOLDEN / f"{case}.npz") as data:
        return {name: torch.from_numpy(data[name]) for name in data}


def draw(seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Student and teacher logits, sampled ids, and a mask of prefixes."""
    generator = torch.Generator().manual_seed(seed)
    student, teacher = 2 * torch.randn(2, 3, 5, 7, generator=generator, dtype=torch.float64)
    ids = torch.randint(7, (3, 5), generator=generator)
    return student, teacher, ids, torch.arange(5) < torch.tensor([[5], [3], [1]])


def test_labels_golden() -> None:
    data = arrays("onpolicy_labels")
    found = on_policy_labels(data["in_prompts"], data["in_prompt_mask"], data["in_completion"], 2)
    for tensor, name in zip(found, ("input_ids", "attention_mask", "labels"), strict=True):
        assert torch.equal(tensor, data[f"out_{name}"])


def test_the_first_of_several_stop_tokens_counts_and_none_stops_nothing() -> None:
    prompt, mask = torch.tensor([[9, 9]]), torch.tensor([[False, True]])
    completion = torch.tensor([[0, 7, 3, 0]])
    _, attention, target = on_policy_labels(prompt, mask, completion, [3, 7], ignore_index=-1)
    assert target.tolist() == [[-1, -1, 0, 7, -1, -1]]
    assert attention.tolist() == [[0, 1, 1, 1, 0, 0]]
    unmet: list[int | list[int] | None] = [None, [], 5]
    for stops in unmet:
        assert on_policy_labels(prompt, mask, completion, stops)[2].tolist() == [[-100, -100, 0, 7, 3, 0]]
    assert on_policy_labels(prompt, mask, completion, 0)[2].tolist() == [[-100, -100, 0, -100, -100, -100]]
    nothing_written = on_policy_labels(prompt, mask, completion[:, :0], 3)
    assert [tensor.tolist() for tensor in nothing_written] == [[[9, 9]], [[0, 1]], [[-100, -100]]]


def test_labels_refuse_other_shapes() -> None:
    ids = torch.zeros(2, 3, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"shapes must agree; got prompt_ids \[2, 3\], prompt_mask \[2, 2\]"):
        unwrap(on_policy_labels)(ids, ids[:, :2], ids, 1)
    with pytest.raises(ValueError, match=r"of one batch; got \[2, 3\] and \[1, 3\]"):
        unwrap(on_policy_labels)(ids, ids, ids[:1], 1)


def test_threshold_golden() -> None:
    data = arrays("adaptive_sgo_threshold")
    found = adaptive_sgo_threshold(data["in_val_losses"])
    torch.testing.assert_close(found, data["out_threshold"].double(), rtol=1e-6, atol=1e-6)


def test_threshold_by_hand() -> None:
    # only a rise renews the reference, and it is held against the last reference and not the last loss
    losses = torch.tensor([2.0, 2.05, 1.0, 2.1, 2.15, 2.2, 9.0], dtype=torch.float64)
    found = adaptive_sgo_threshold(losses, step=0.4, start=0.1)
    assert found.tolist() == pytest.approx([0.1, 0.1, 0.1, 0.5, 0.5, 0.9, 1.0])
    assert adaptive_sgo_threshold(torch.zeros(0)).shape == (0,)
    rising = adaptive_sgo_threshold(torch.arange(20.0))
    assert rising[-1] == 1  # stays at the cap
    assert (rising.diff() >= 0).all()


def test_threshold_refuses() -> None:
    with pytest.raises(ValueError, match=r"validation 1 has the loss nan"):
        adaptive_sgo_threshold(torch.tensor([1.0, math.nan]))
    for option in ("start", "maximum"):
        with pytest.raises(ValueError, match=rf"{option} must lie in \[0, 1\]; got 2"):
            adaptive_sgo_threshold(torch.ones(1), **{option: 2})
    with pytest.raises(ValueError, match=r"step must be finite and above 0"):
        adaptive_sgo_threshold(torch.ones(1), step=0)


def test_source_by_hand() -> None:
    assert adaptive_sgo_source(0.6, 0.5, 0.0, True) == "data"
    assert adaptive_sgo_source(0.5, 0.5, 0.0, True) == "data"
    assert adaptive_sgo_source(0.4, 0.5, 0.0, True) == "generate"  # 0.5 · (1 - 0)
    assert adaptive_sgo_source(0.4, 0.5, 0.5, True) == "replay"
    assert adaptive_sgo_source(0.4, 0.5, 0.5, False) == "generate"
    assert adaptive_sgo_source(0.2, 0.5, 0.9, True, replay="constant") == "generate"
    assert adaptive_sgo_source(0.4, 0.5, 0.9, True, replay="increasing") == "generate"
    assert adaptive_sgo_source(0.4, 0.5, 0.1, True, replay="increasing") == "replay"
    assert adaptive_sgo_source(0.0, 0.0, 0.0, False) == "data"


def test_source_refuses() -> None:
    for position, name in enumerate(("u", "threshold", "progress")):
        values = [0.5, 0.5, 0.5]
        values[position] = 1.5
        with pytest.raises(ValueError, match=rf"{name} must lie in \[0, 1\]; got 1.5"):
            adaptive_sgo_source(*values, True)
    with pytest.raises(
        ValueError, match=r"replay must be one of decreasing, constant, increasing; got 'never'"
    ):
        unwrap(adaptive_sgo_source)(0.5, 0.5, 0.5, True, replay="never")


def test_minillm_golden() -> None:
    data = arrays("minillm_step")
    ids, mask = data["in_ids"], data["in_mask"]
    rollout = minillm_rollout(
        data["in_teacher_logits"], data["in_rollout_logits"], ids, mask, reward_mask=data["in_reward_mask"]
    )
    close: dict[str, Any] = {"rtol": 1e-5, "atol": 2e-6}
    for field, name in {
        "teacher_logprobs": "teacher_reward",
        "rollout_logprobs": "rollout_logprobs",
        "rewards": "rewards_scaled",
        "importance_weight": "importance_w",
        "reverse_kl": "rev_kl",
    }.items():
        torch.testing.assert_close(getattr(rollout, field), data[f"out_{name}"], **close)
    for whiten, name in ((False, "out_advantage_no_whiten"), (True, "out_advantages")):
        found = minillm_advantages(rollout.rewards, mask, gamma=1.0, whiten=whiten)
        torch.testing.assert_close(found, data[name], **close)
    student = data["in_student_logits"].requires_grad_()
    loss = minillm_policy_loss(
        student, ids, mask, rollout.rollout_logprobs, data["out_advantages"], rollout.importance_weight
    )
    loss.backward()
    torch.testing.assert_close(loss, data["out_pg_loss"], **close)
    torch.testing.assert_close(student.grad, data["grad_pg"], **close)


@quick
@given(seeds, st.floats(0, 1))
def test_rollout_definitions(seed: int, alpha: float) -> None:
    rollout_logits, teacher_logits, ids, mask = draw(seed)
    found = minillm_rollout(
        teacher_logits, rollout_logits, ids, mask, teacher_mixed_alpha=alpha, cliprange_reward=1.5
    )
    p, q = (
        logits.softmax(-1).gather(-1, ids[..., None])[..., 0] for logits in (teacher_logits, rollout_logits)
    )
    rewards = ((p / q).log() / 0.5).clamp(-1.5, 1.5)
    torch.testing.assert_close(found.rewards, torch.where(mask, rewards, 0.0))
    weight = q / ((1 - alpha) * q + alpha * p)
    torch.testing.assert_close(found.importance_weight, torch.where(mask, weight, 1.0))
    torch.testing.assert_close(found.reverse_kl, torch.where(mask, p / q - 1 - (p / q).log(), 0.0))
    assert (found.reverse_kl >= 0).all()
    masked_ids = torch.where(mask, ids, -100)  # what does not count may hold any id
    again = minillm_rollout(teacher_logits, rollout_logits, masked_ids, mask, teacher_mixed_alpha=alpha)
    torch.testing.assert_close(again.importance_weight, found.importance_weight)


def test_advantages_by_hand() -> None:
    rewards = torch.tensor([[1.0, 2.0, 4.0], [3.0, 0.0, 0.0]], dtype=torch.float64)
    mask = torch.tensor([[1, 1, 1], [1, 0, 0]])
    found = minillm_advantages(rewards, mask, gamma=0.5, whiten=False)
    wanted = torch.tensor([[(1 + 1 + 1) / 3, (2 + 2) / 2, 4.0], [3.0, 0.0, 0.0]], dtype=torch.float64)
    torch.testing.assert_close(found, wanted)
    whole = minillm_advantages(rewards, mask, gamma=0.5)
    torch.testing.assert_close(whole, (wanted - wanted.mean()) / (wanted.var() + 1e-8).sqrt())
    masked = minillm_advantages(rewards, mask, gamma=0.5, whiten="masked")
    counted = wanted[mask == 1]
    torch.testing.assert_close(masked[mask == 1], (counted - counted.mean()) / (counted.var() + 1e-8).sqrt())
    assert (masked[mask == 0] == 0).all()


@pytest.mark.parametrize("whiten", [True, False, "masked"])
def test_advantages_of_one_token_or_none_are_finite(whiten: Any) -> None:
    for shape in ((1, 1), (0, 3), (2, 0)):
        for mask in (torch.zeros(shape), torch.ones(shape)):
            assert minillm_advantages(torch.ones(shape), mask, whiten=whiten).isfinite().all()
    assert not minillm_advantages(torch.ones(2, 2, requires_grad=True), torch.ones(2, 2)).requires_grad


def test_policy_loss_is_the_clipped_one() -> None:
    student, teacher, ids, mask = draw(1)
    rollout = minillm_rollout(teacher, student, ids, mask)
    advantages = minillm_advantages(rollout.rewards, mask)
    moved = (student + 0.5 * teacher).requires_grad_()
    loss = minillm_policy_loss(
        moved, ids, mask, rollout.rollout_logprobs, advantages, rollout.importance_weight
    )
    ratio = (moved.log_softmax(-1).gather(-1, ids[..., None])[..., 0] - rollout.rollout_logprobs).exp()
    ratio = ratio * rollout.importance_weight
    by_token = torch.maximum(-advantages * ratio, -advantages * ratio.clamp(0.8, 1.2))
    torch.testing.assert_close(loss, by_token[mask].mean())
    fixed = [rollout.rollout_logprobs, advantages, rollout.importance_weight]
    assert torch.autograd.gradcheck(lambda logits: minillm_policy_loss(logits, ids, mask, *fixed), moved)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_extremes_are_finite_and_an_empty_mask_is_zero_with_a_gradient(dtype: torch.dtype) -> None:
    _, _, ids, mask = draw(2)
    student = torch.full((3, 5, 7), -1e4, dtype=dtype).scatter(2, ids[..., None], 1e4)
    for rollout_logits, teacher_logits in ((student, -student), (-student, student)):
        rollout = minillm_rollout(teacher_logits, rollout_logits, ids, mask)
        assert all(part.dtype == torch.float32 for part in rollout)
        assert rollout.rewards.abs().max() == 100
        assert rollout.importance_weight.isfinite().all()
        for advantage in (1.0, -1.0):  # a ratio of e^20000, in both directions
            leaf = student.clone().requires_grad_()
            loss = minillm_policy_loss(
                leaf,
                ids,
                mask,
                rollout.rollout_logprobs,
                advantage * torch.ones(3, 5),
                rollout.importance_weight,
            )
            loss.backward()
            assert loss.isfinite()
            assert leaf.grad is not None
            assert leaf.grad.isfinite().all()
    leaf = student.clone().requires_grad_()
    ones = torch.ones(3, 5)
    empty = minillm_policy_loss(leaf, ids, torch.zeros(3, 5), -ones, ones, ones)
    empty.backward()
    assert empty == 0
    assert leaf.grad is not None
    assert (leaf.grad == 0).all()


def test_minillm_refuses() -> None:
    student, teacher, ids, mask = draw(3)
    ones = torch.ones(3, 5)
    with pytest.raises(ValueError, match=r"teacher_mixed_alpha must lie in \[0, 1\]"):
        minillm_rollout(teacher, student, ids, mask, teacher_mixed_alpha=2)
    for option in ("reward_scaling", "cliprange_reward"):
        with pytest.raises(ValueError, match=rf"{option} must be finite and above 0; got 0"):
            minillm_rollout(teacher, student, ids, mask, **{option: 0})
    with pytest.raises(ValueError, match=r"vocabularies of 7 and 6"):
        unwrap(minillm_rollout)(teacher[..., :6], student, ids, mask)
    with pytest.raises(ValueError, match=r"reward_mask \[3, 1\]"):
        unwrap(minillm_rollout)(teacher, student, ids, mask, reward_mask=ones[:, :1])
    with pytest.raises(IndexError, match=r"target 7 names none of the 7"):
        minillm_rollout(teacher, student, torch.where(mask, 7, ids), mask)
    with pytest.raises(ValueError, match=r"gamma must lie in \[0, 1\]"):
        minillm_advantages(ones, mask, gamma=1.5)
    with pytest.raises(ValueError, match=r"whiten must be True, False or 'masked'; got 'rows'"):
        unwrap(minillm_advantages)(ones, mask, whiten="rows")
    with pytest.raises(ValueError, match=r"rewards \[3, 5\], mask \[3, 4\]"):
        unwrap(minillm_advantages)(ones, mask[:, :4])
    with pytest.raises(ValueError, match=r"cliprange must be finite and above 0"):
        minillm_policy_loss(student, ids, mask, ones, ones, ones, cliprange=0)
    with pytest.raises(ValueError, match=r"advantages \[3, 4\]"):
        unwrap(minillm_policy_loss)(student, ids, mask, ones, ones[:, :4], ones)
