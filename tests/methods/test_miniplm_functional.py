"""MiniPLM: the authors' values, scores and what is kept, batches, the KD baseline, extremes, bad input."""

from __future__ import annotations

import math
from functools import partial
from inspect import unwrap
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tutelage.functional import (
    difference_sampling,
    difference_score,
    fused_linear_instance_nll,
    language_model_batch,
    miniplm_vanilla_kd_loss,
    per_instance_nll,
)

GOLDEN = Path(__file__).parent.parent / "golden" / "miniplm"
seeds = st.integers(0, 2**31 - 1)
quick = settings(max_examples=25, deadline=None)
close = partial(torch.testing.assert_close, rtol=1e-9, atol=1e-12)
near = partial(torch.testing.assert_close, rtol=1e-5, atol=1e-6)


def arrays(case: str) -> dict[str, Tensor]:
    with np.load(GOLDEN / f"{case}.npz") as data:
        return {name: torch.from_numpy(data[name]) for name in data}


def draw(seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Student and teacher logits, targets, and a mask of prefixes."""
    generator = torch.Generator().manual_seed(seed)
    student, teacher = 2 * torch.randn(2, 3, 5, 7, generator=generator, dtype=torch.float64)
    target = torch.randint(7, (3, 5), generator=generator)
    return student.requires_grad_(), teacher, target, torch.arange(5) < torch.tensor([[5], [2], [1]])


def test_golden_scores() -> None:
    data = arrays("per_instance_nll")
    near(per_instance_nll(data["in_logits"], data["in_label"], data["in_mask"]), data["out_nll"])
    data = arrays("difference_sampling_r0.5")
    near(difference_score(data["in_teacher_nll"], data["in_reference_nll"]), data["out_diff"])
    assert torch.equal(difference_sampling(data["out_diff"]), data["out_kept_sorted"])


def test_golden_batch() -> None:
    data = arrays("collate_pad")
    found = language_model_batch(data["in_tokens"], max_length=8, pad_id=0)
    for tensor, name in zip(found, ("input_ids", "attention_mask", "label", "loss_mask"), strict=True):
        assert torch.equal(tensor.double(), data[f"out_{name}"].double())
    lists = [[token for token in row if token >= 0] for row in data["in_tokens"].tolist()]
    for tensor, other in zip(language_model_batch(lists, max_length=8, pad_id=0), found, strict=True):
        assert torch.equal(tensor, other)


def test_golden_vanilla_kd() -> None:
    data = arrays("vanilla_kd_baseline")
    student = data["in_student"].requires_grad_()
    found = miniplm_vanilla_kd_loss(student, data["in_teacher"], data["in_label"], data["in_mask"])
    found.loss.backward()
    for name, value in found._asdict().items():
        near(value, data[f"out_{name}"])
    near(student.grad, data["grad_student"])


@quick
@given(seeds)
def test_nll_is_a_mean_over_each_sequence(seed: int) -> None:
    logits, _, target, mask = draw(seed)
    found = per_instance_nll(logits, target, mask)
    log_probs = logits.log_softmax(-1)
    for row, length in enumerate((5, 2, 1)):
        wanted = -sum(log_probs[row, i, target[row, i]] for i in range(length)) / length
        close(found[row], wanted)
    padded = torch.where(mask, target, -100)
    close(per_instance_nll(logits + 4, padded, mask.float()), found)
    assert per_instance_nll(logits.bfloat16(), target, mask).dtype == torch.float32


@quick
@given(st.lists(st.integers(-3, 3), min_size=2, max_size=40), st.floats(0.5, 1.0))
def test_kept_are_the_largest_in_order_and_of_equal_ones_the_first(scores: list[int], ratio: float) -> None:
    kept = difference_sampling(torch.tensor(scores, dtype=torch.float32), ratio)
    order = sorted(range(len(scores)), key=lambda position: (-scores[position], position))
    assert kept.tolist() == sorted(order[: int(ratio * len(scores))])


def test_fused_is_the_plain_score() -> None:
    generator = torch.Generator().manual_seed(5)
    hidden = torch.randn(3, 5, 4, generator=generator, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(7, 4, generator=generator, dtype=torch.float64)
    _, _, target, mask = draw(5)
    target = torch.where(mask, target, -100)
    wanted = per_instance_nll(hidden @ weight.T, target, mask).detach()
    for chunk_size in (None, 2):
        found = fused_linear_instance_nll(hidden, weight, target, mask, chunk_size=chunk_size)
        assert not found.requires_grad
        torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-9)
    everywhere = torch.ones(3, 5)  # -100 does not count, whatever the mask says
    close(per_instance_nll(hidden @ weight.T, target, everywhere).detach(), wanted)
    close(fused_linear_instance_nll(hidden, weight, target, everywhere), wanted)


def test_how_many_are_kept() -> None:
    assert len(difference_sampling(torch.arange(7.0), 0.3)) == 2  # cut off
    assert (
        len(difference_sampling(torch.arange(100.0), 0.29)) == 28
    )  # 0.29 · 100 is 28.999… in floating point
    assert difference_sampling(torch.zeros(4), 1).tolist() == [0, 1, 2, 3]
    with pytest.raises(ValueError, match=r"a ratio of 0.1 keeps none of 5 sequences"):
        difference_sampling(torch.zeros(5), 0.1)
    for ratio in (0.0, -0.5, 1.5, math.nan):
        with pytest.raises(ValueError, match=r"ratio must lie in \(0, 1\]; got"):
            difference_sampling(torch.zeros(5), ratio)


def test_scores_refuse() -> None:
    good = torch.ones(3)
    for bad in (math.nan, math.inf):
        scores = torch.tensor([1.0, bad, bad])
        with pytest.raises(ValueError, match=rf"score of sequence 1 is {bad}"):
            difference_sampling(scores)
        with pytest.raises(ValueError, match=rf"teacher_nll of sequence 1 is {bad}"):
            difference_score(scores, good)
        with pytest.raises(ValueError, match=rf"reference_nll of sequence 1 is {bad}"):
            difference_score(good, scores)
    with pytest.raises(ValueError, match=r"teacher_nll \[3\], reference_nll \[2\]"):
        unwrap(difference_score)(good, good[:2])
    with pytest.raises(ValueError, match=r"score must hold one score a sequence; got shape \[1, 3\]"):
        unwrap(difference_sampling)(good[None])
    logits, _, target, mask = draw(0)
    mask[1] = False
    with pytest.raises(ValueError, match=r"sequence 1 of the batch has no token that counts"):
        per_instance_nll(logits, target, mask)
    with pytest.raises(IndexError, match=r"target 7 names none of the 7"):
        per_instance_nll(logits, torch.full((3, 5), 7), torch.ones(3, 5))
    with pytest.raises(ValueError, match=r"target \[3, 4\], mask \[3, 5\]"):
        unwrap(per_instance_nll)(logits, target[:, :4], torch.ones(3, 5))
    with pytest.raises(ValueError, match=r"ids must hold one value a token, \[3, 5\]; got \[3, 4\]"):
        unwrap(per_instance_nll)(logits, target[:, :4], torch.ones(3, 4))
    with pytest.raises(ValueError, match=r"sequence 0 of the batch has no token that counts"):
        fused_linear_instance_nll(logits, torch.ones(7, 7).double(), target, torch.zeros(3, 5))


def test_batches_are_shifted_cut_and_padded() -> None:
    found = language_model_batch([[5, 9, 6, 7, 8], [5, 9, 6], [4], []], max_length=3, pad_id=9)
    assert found.inputs.tolist() == [[5, 9, 6], [5, 9, 9], [9, 9, 9], [9, 9, 9]]
    assert found.target.tolist() == [[9, 6, 7], [9, 6, 9], [9, 9, 9], [9, 9, 9]]
    # the end-of-text token 9 is also the padding: what follows it does not count, itself it is a target
    assert found.mask.tolist() == [[True, False, True], [True, False, False], [False] * 3, [False] * 3]
    assert found.attention_mask.tolist() == [[1, 1, 1], [1, 1, 0], [0] * 3, [0] * 3]
    assert language_model_batch([], max_length=3, pad_id=0).inputs.shape == (0, 3)
    for options in ({"max_length": 0, "pad_id": 0}, {"max_length": 2, "pad_id": -1}):
        with pytest.raises(ValueError, match=r"max_length must be at least 1 and pad_id at least 0; got"):
            language_model_batch([[1, 2]], **options)


@quick
@given(seeds, st.floats(0, 1))
def test_vanilla_kd_by_definition(seed: int, ratio: float) -> None:
    student, teacher, target, mask = draw(seed)
    found = miniplm_vanilla_kd_loss(student, teacher, target, mask, kd_ratio=ratio)
    close(found.lm_loss, per_instance_nll(student, target, mask).mean())
    close(found.teacher_loss, per_instance_nll(teacher, target, mask).mean())
    p = teacher.softmax(-1)

    def by_row(log_q: Tensor) -> Tensor:
        return ((-(p * log_q).sum(-1)) * mask).sum(1) / mask.sum(1)

    close(found.kd_per_sample, by_row(student.log_softmax(-1)).detach())
    close(found.kd_loss, by_row(student.log_softmax(-1)).mean())
    close(found.kd_entropy, by_row(p.log()).mean())
    close(found.loss, (1 - ratio) * found.lm_loss + ratio * found.kd_loss)
    assert found.kd_loss >= found.kd_entropy


def test_vanilla_kd_leaves_out_empty_sequences() -> None:
    student, teacher, target, mask = draw(1)
    mask[1] = False
    found = miniplm_vanilla_kd_loss(student, teacher, target, mask)
    rest = [tensor[[0, 2]] for tensor in (student, teacher, target, mask)]
    close(found.loss, miniplm_vanilla_kd_loss(*rest).loss)
    assert found.kd_per_sample[1] == 0
    none = miniplm_vanilla_kd_loss(student, teacher, target, torch.zeros(3, 5))
    none.loss.backward()
    assert none.loss == 0
    assert student.grad is not None
    assert (student.grad == 0).all()


def test_vanilla_kd_gradients() -> None:
    student, teacher, target, mask = draw(2)
    teacher.requires_grad_()
    assert torch.autograd.gradcheck(
        lambda logits: miniplm_vanilla_kd_loss(logits, teacher.detach(), target, mask).loss, student
    )
    found = miniplm_vanilla_kd_loss(student, teacher, target, mask)
    found.loss.backward()
    assert teacher.grad is None
    assert not found.kd_per_sample.requires_grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_extremes_are_finite(dtype: torch.dtype) -> None:
    student, _, target, mask = draw(3)
    logits = (1e4 * student.detach().sign()).to(dtype).requires_grad_()
    found = miniplm_vanilla_kd_loss(logits, -logits.detach(), target, mask)
    (found.loss + per_instance_nll(logits, target, mask).sum()).backward()
    assert all(value.isfinite().all() and value.dtype == torch.float32 for value in found)
    assert logits.grad is not None
    assert logits.grad.isfinite().all()


def test_vanilla_kd_refuses() -> None:
    student, teacher, target, mask = draw(4)
    with pytest.raises(ValueError, match=r"kd_ratio must lie in \[0, 1\]; got 2"):
        miniplm_vanilla_kd_loss(student, teacher, target, mask, kd_ratio=2)
    with pytest.raises(ValueError, match=r"vocabularies of 7 and 6"):
        unwrap(miniplm_vanilla_kd_loss)(student, teacher[..., :6], target, mask)
    with pytest.raises(ValueError, match=r"target \[3, 5\], mask \[3, 4\]"):
        unwrap(miniplm_vanilla_kd_loss)(student, teacher, target, mask[:, :4])
