"""WA's tensor math: the authors' values, herding and accuracies by hand, properties, bad input."""

from __future__ import annotations

import math
from inspect import unwrap
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tutelage.functional import (
    herding_selection,
    incremental_accuracy,
    old_to_new_rate,
    wa_align_logits,
    wa_distillation_loss,
    wa_loss,
    weight_align,
    weight_align_gamma,
)

GOLDEN = Path(__file__).parent.parent / "golden" / "wa"
seeds = st.integers(0, 2**31 - 1)
quick = settings(max_examples=25, deadline=None)


def arrays(case: str) -> dict[str, Tensor]:
    with np.load(GOLDEN / f"{case}.npz") as data:
        return {name: torch.from_numpy(np.asarray(data[name])) for name in data}


def draw(seed: int, old: int = 4, classes: int = 6) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    student = 3 * torch.randn(5, classes, generator=generator, dtype=torch.float64)
    teacher = 3 * torch.randn(5, old, generator=generator, dtype=torch.float64)
    return student.requires_grad_(), teacher, torch.randint(classes, (5,), generator=generator)


@pytest.mark.parametrize(("case", "old", "norm"), [("align_l1_clipped", 4, 1), ("align_l2", 6, 2)])
def test_alignment_golden(case: str, old: int, norm: int) -> None:
    data = arrays(case)
    weight, gamma = weight_align(data["in_fc_weight"], old, norm=norm)
    torch.testing.assert_close(gamma, data["out_gamma"], rtol=1e-5, atol=1e-6)
    aligned = wa_align_logits(data["out_logits_raw"], old, gamma)
    torch.testing.assert_close(aligned, data["out_logits_aligned"], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(data["in_x"] @ weight.T, aligned, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("case", ["loss_kd_ce", "loss_kd_ce_old_aligned"])
def test_loss_golden(case: str) -> None:
    data = arrays(case)
    student = data["in_logits"].requires_grad_()
    start = int(data["in_prev_task_start"])
    result = wa_loss(
        student,
        data["in_labels"],
        data["in_old_logits_raw"],
        teacher_gamma=data["in_old_gamma"],
        teacher_newest_start=start,
    )
    result.loss.backward()
    torch.testing.assert_close(result.loss, data["out_loss"], rtol=1e-9, atol=0)
    torch.testing.assert_close(student.grad, data["grad_logits"], rtol=1e-8, atol=1e-11)


def test_pycil_golden() -> None:
    data = arrays("pycil_variant")
    old = len(data["in_fc_weight"]) - int(data["in_n_new"])
    aligned = weight_align(data["in_fc_weight"], old, norm=2, clamp_max=None).weight
    torch.testing.assert_close(aligned, data["out_fc_weight_aligned"], rtol=1e-10, atol=1e-13)
    student = data["in_pred"].requires_grad_()
    loss = wa_distillation_loss(student, data["in_soft"], temperature=2.0)
    loss.backward()
    torch.testing.assert_close(loss, data["out_kd_loss"], rtol=1e-10, atol=0)
    torch.testing.assert_close(student.grad, data["grad_pred"], rtol=1e-8, atol=1e-12)


def test_a_clipped_step_golden() -> None:
    """One SGD step on a linear model, then the head's weight is cut at 0."""
    data = arrays("step_weight_clip")
    weight = data["in_fc_weight"].requires_grad_()
    stage = int(data["in_stage"])
    result = wa_loss(
        data["in_x"] @ weight.T,
        data["in_labels"],
        data["in_x"] @ data["in_old_fc_weight"].T,
        weight=stage / (stage + 1),
    )
    result.loss.backward()
    assert weight.grad is not None
    stepped = (weight - float(data["in_lr"]) * weight.grad).clamp(min=0)
    torch.testing.assert_close(result.loss, data["out_loss"], rtol=1e-9, atol=0)
    torch.testing.assert_close(stepped, data["out_fc_weight"], rtol=1e-8, atol=1e-10)


@quick
@given(seeds, st.floats(0.5, 8.0))
def test_distillation_softens_the_old_slice_alone(seed: int, temperature: float) -> None:
    student, teacher, _ = draw(seed)
    loss = wa_distillation_loss(student, teacher, temperature=temperature)
    q = (teacher / temperature).softmax(1)
    torch.testing.assert_close(loss, -(q * (student[:, :4] / temperature).log_softmax(1)).sum(1).mean())
    loss.backward()
    assert student.grad is not None
    assert (student.grad[:, 4:] == 0).all()
    least = wa_distillation_loss(teacher, teacher, temperature=temperature)
    torch.testing.assert_close(least, -(q * q.log()).sum(1).mean())
    assert loss >= least - 1e-12


def test_default_weight_is_the_old_classes_share() -> None:
    student, teacher, target = draw(1)
    for old, classes in [(2, 4), (4, 6), (3, 4)]:
        result = wa_loss(student[:, :classes], target % classes, teacher[:, :old])
        share = old / classes
        torch.testing.assert_close(
            result.loss, share * result.distillation + (1 - share) * result.classification
        )
    assert wa_loss(student, target, teacher, weight=0).loss == wa_loss(student, target).loss


def test_the_first_step_is_plain_training() -> None:
    student, _, target = draw(2)
    result = wa_loss(student, target, weight=0.5)
    assert result.loss == result.classification
    assert result.distillation == 0
    torch.testing.assert_close(result.loss, torch.nn.functional.cross_entropy(student, target))


def test_teacher_gamma_scales_the_newest_columns() -> None:
    student, teacher, target = draw(3)
    scaled = torch.cat([teacher[:, :3], 0.5 * teacher[:, 3:]], 1)
    for gamma in (0.5, torch.tensor(0.5), torch.tensor([0.5])):
        result = wa_loss(student, target, teacher, teacher_gamma=gamma, teacher_newest_start=3)
        torch.testing.assert_close(result, wa_loss(student, target, scaled))


def test_gradcheck() -> None:
    student, teacher, target = draw(4)
    assert torch.autograd.gradcheck(lambda s: wa_loss(s, target, teacher).loss, student)
    assert torch.autograd.gradcheck(lambda s: wa_align_logits(s, 2, 0.7), student)


def test_finite_at_extremes_in_a_batch_of_one_and_without_rows() -> None:
    logits = torch.tensor([[1e4, -1e4, 0.0], [-1e4, 1e4, 1e4]])
    for rows in (2, 1, 0):
        student = logits[:rows].clone().requires_grad_()
        loss = wa_loss(student, torch.tensor([1, 0])[:rows], logits[:rows, 1:]).loss
        loss.backward()
        assert loss.isfinite()
        assert student.grad is not None
        assert student.grad.isfinite().all()
        assert rows or loss == 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(dtype: torch.dtype) -> None:
    student, teacher, target = draw(5)
    student, teacher = student.detach().to(dtype), teacher.to(dtype)
    loss = wa_loss(student, target, teacher, teacher_gamma=0.7).loss
    assert loss.dtype == torch.float32
    assert loss == wa_loss(student.float(), target, teacher.float(), teacher_gamma=0.7).loss
    weight = torch.randn(6, 40).abs().to(dtype)
    aligned = weight_align(weight, 3)
    assert aligned.weight.dtype == dtype
    assert aligned.gamma == weight_align_gamma(weight.float(), 3)


def test_the_teacher_gets_no_gradient() -> None:
    student, teacher, target = draw(6)
    teacher.requires_grad_()
    wa_loss(student, target, teacher, teacher_gamma=0.5).loss.backward()
    assert teacher.grad is None


@quick
@given(seeds, st.integers(1, 5), st.sampled_from([1, 2, math.inf]))
def test_alignment_levels_the_groups_and_keeps_their_order(seed: int, old: int, norm: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.rand(6, 8, generator=generator, dtype=torch.float64)
    weight[old:] *= 2
    aligned, gamma = weight_align(weight, old, norm=norm)
    assert 0 < gamma <= 1
    if gamma < 1:
        lengths = torch.linalg.vector_norm(aligned, ord=norm, dim=1)
        torch.testing.assert_close(lengths[old:].mean(), lengths[:old].mean())
    x = torch.rand(9, 8, generator=generator, dtype=torch.float64)
    before, after = x @ weight.T, x @ aligned.T
    assert torch.equal(before[:, old:].argmax(1), after[:, old:].argmax(1))
    assert torch.equal(weight[:old], aligned[:old])
    torch.testing.assert_close(after, wa_align_logits(before, old, gamma))


def test_shorter_new_rows_are_left_alone_bit_for_bit_unless_the_clamp_is_off() -> None:
    weight = torch.rand(6, 8)
    weight[4:] *= 0.25
    before = weight.clone()
    aligned, gamma = weight_align(weight, 4)
    assert gamma == 1
    assert torch.equal(aligned, before)
    assert aligned is not weight
    assert weight_align_gamma(weight, 4, clamp_max=None) > 1
    weight_align(weight, 4, clamp_max=None)
    assert torch.equal(weight, before)


def test_new_rows_of_zero_are_not_blown_up() -> None:
    weight = torch.rand(5, 3)
    weight[3:] = 0
    assert weight_align_gamma(weight, 3) == 1
    assert weight_align_gamma(weight, 3, clamp_max=None) == 1
    assert weight_align_gamma(weight, 3, clamp_max=0.5) == 0.5
    assert weight_align(weight, 3).weight.isfinite().all()


def test_alignment_keeps_no_graph() -> None:
    weight = torch.rand(4, 3, requires_grad=True)
    assert not any(tensor.requires_grad for tensor in weight_align(weight, 2))


POINTS = torch.tensor([[1.0, 0], [0, 1], [3, 1], [1, 2], [5, 4]], dtype=torch.float64)


@pytest.mark.parametrize(
    ("count", "chosen"), [(3, [4, 3, 2]), (9, [4, 3, 2, 0, 1]), (1, [4]), (0, [])], ids=["3", "9", "1", "0"]
)
def test_herding_by_hand(count: int, chosen: list[int]) -> None:
    picked = herding_selection(POINTS, count)
    assert picked.dtype == torch.int64
    assert picked.tolist() == chosen


def test_herding_fills_what_the_rounds_leave_open() -> None:
    features = torch.tensor([[1.0, 0], [1, 0.01], [1, -0.01], [0, 1], [0, -1]], dtype=torch.float64)
    one_round = herding_selection(features, 4, max_rounds=0.25)
    directions = torch.nn.functional.normalize(features, dim=1)
    closest = (directions @ directions.mean(0)).argsort(descending=True, stable=True).tolist()
    assert one_round.tolist() == closest[:4]


@quick
@given(seeds, st.integers(1, 12), st.integers(0, 15))
def test_herding_gives_distinct_rows_whatever_their_lengths(seed: int, rows: int, count: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(rows, 4, generator=generator, dtype=torch.float64)
    picked = herding_selection(features, count)
    assert len(picked) == min(rows, count) == len(set(picked.tolist()))
    # Powers of two scale without rounding.
    lengths = 2.0 ** torch.randint(-3, 4, (rows, 1), generator=generator)
    assert torch.equal(herding_selection(lengths * features, count), picked)


def test_herding_follows_the_mean_better_than_chance() -> None:
    generator = torch.Generator().manual_seed(0)
    features = torch.nn.functional.normalize(torch.randn(200, 8, generator=generator) + 1, dim=1)
    herded = (features[herding_selection(features, 10)].mean(0) - features.mean(0)).norm()
    random = torch.stack(
        [
            (features[torch.randperm(200, generator=generator)[:10]].mean(0) - features.mean(0)).norm()
            for _ in range(20)
        ]
    )
    assert herded < random.min()


def test_herding_of_one_zero_vectors_and_none() -> None:
    assert herding_selection(torch.ones(1, 3), 5).tolist() == [0]
    assert herding_selection(torch.zeros(3, 2), 2).tolist() == [0, 1]
    assert herding_selection(torch.zeros(0, 2), 2).tolist() == []


def test_incremental_accuracy_by_hand() -> None:
    correct = [torch.tensor([8, 6]), torch.tensor([4, 6, 9]), torch.tensor([2, 4, 3, 10])]
    result = incremental_accuracy(correct, torch.tensor([10, 10, 10, 10]))
    by_step = torch.tensor([14 / 20, 19 / 30, 19 / 40], dtype=torch.float64)
    torch.testing.assert_close(result.by_step, by_step)
    torch.testing.assert_close(result.average, by_step[1:].mean())
    assert result.last == by_step[-1]
    # Classes 0 and 1 (step 0): best 14/20, last 6/20. Class 2 (step 1): best 9/10, last 3/10.
    assert math.isclose(result.forgetting, ((14 - 6) / 20 + (9 - 3) / 10) / 2)
    all_steps = incremental_accuracy(correct, torch.tensor([10, 10, 10, 10]), include_first=True)
    torch.testing.assert_close(all_steps.average, by_step.mean())


def test_incremental_accuracy_of_one_step_and_of_an_untested_class() -> None:
    result = incremental_accuracy([torch.tensor([3, 0])], torch.tensor([4, 0]))
    assert result.average == result.last == 0.75
    assert result.forgetting == 0


@quick
@given(seeds, st.lists(st.integers(1, 3), min_size=2, max_size=5))
def test_forgetting_is_the_definition(seed: int, widths: list[int]) -> None:
    generator = torch.Generator().manual_seed(seed)
    ends = np.cumsum(widths)
    total = torch.randint(1, 9, (int(ends[-1]),), generator=generator)
    correct = [(torch.rand(int(end), generator=generator) * (total[: int(end)] + 1)).long() for end in ends]
    drops = []
    for j, (start, end) in enumerate(zip([0, *ends[:-1]], ends[:-1], strict=False)):
        share = [float(c[start:end].sum() / total[start:end].sum()) for c in correct[j:]]
        drops.append(max(share[:-1]) - share[-1])
    assert math.isclose(incremental_accuracy(correct, total).forgetting, np.mean(drops), abs_tol=1e-6)


def test_old_to_new_rate() -> None:
    prediction, target = torch.tensor([0, 3, 2, 1, 3]), torch.tensor([0, 1, 1, 3, 3])
    torch.testing.assert_close(old_to_new_rate(prediction, target, 2), torch.tensor(2 / 3))
    assert old_to_new_rate(prediction, target, 4) == 0
    assert old_to_new_rate(prediction, target, 0) == 0


def test_bad_losses() -> None:
    student, teacher, target = draw(7)
    for value in (6, -1):
        with pytest.raises(ValueError, match=rf"target {value} names none of the 6 classes"):
            wa_loss(student, torch.tensor([0, 1, 2, 3, value]))
    with pytest.raises(ValueError, match=r"class ids \[batch\]"):
        unwrap(wa_loss)(student, student.detach().softmax(1))
    with pytest.raises(ValueError, match=r"old in 1 … 4, the student's classes; got \[5, 6\]"):
        wa_loss(teacher, torch.zeros(5, dtype=torch.int64), student)
    with pytest.raises(ValueError, match=r"got \[5, 0\]"):
        wa_loss(student, target, teacher[:, :0])
    with pytest.raises(ValueError, match=r"got \[4, 4\]"):
        unwrap(wa_distillation_loss)(student, teacher[:4])
    for weight in (-0.1, 1.1, math.nan):
        with pytest.raises(ValueError, match=r"weight must lie in \[0, 1\]"):
            wa_loss(student, target, teacher, weight=weight)
    for temperature in (0, -2.0, math.nan):
        with pytest.raises(ValueError, match=r"temperature"):
            wa_loss(student, target, teacher, temperature=temperature)
    with pytest.raises(ValueError, match=r"gamma must be finite; got nan"):
        wa_loss(student, target, teacher, teacher_gamma=math.nan)
    for broken in ((student * math.nan, teacher), (student, teacher * math.nan)):
        with pytest.raises(ValueError, match=r"hold NaN"):
            wa_loss(broken[0], target, broken[1])


def test_bad_alignment() -> None:
    weight = torch.rand(5, 3)
    for old in (0, 5, -1):
        with pytest.raises(ValueError, match=rf"old_classes must lie in 1 … 4 .*; got {old}"):
            weight_align(weight, old)
    with pytest.raises(ValueError, match=r"norm must be above 0; got 0"):
        weight_align(weight, 2, norm=0)
    with pytest.raises(ValueError, match=r"clamp_max"):
        weight_align(weight, 2, clamp_max=0.0)
    with pytest.raises(ValueError, match=r"would erase the new classes"):
        weight_align(torch.cat([torch.zeros(2, 3), weight]), 2)
    with pytest.raises(ValueError, match=r"NaN or infinite"):
        weight_align(torch.cat([weight, torch.full((1, 3), math.nan)]), 2)
    with pytest.raises(ValueError, match=r"newest_start must lie in 0 … 3; got 4"):
        wa_align_logits(weight, 4, 0.5)
    with pytest.raises(ValueError, match=r"one number; got shape \[3\]"):
        wa_align_logits(weight, 1, torch.ones(3))


def test_bad_selections_and_counts() -> None:
    with pytest.raises(ValueError, match=r"count must be at least 0; got -1"):
        herding_selection(POINTS, -1)
    with pytest.raises(ValueError, match=r"max_rounds"):
        herding_selection(POINTS, 1, max_rounds=0)
    ten = torch.tensor([10, 10])
    for correct in (
        [],
        [torch.tensor([1, 1]), torch.tensor([1, 1])],
        [torch.tensor([1])],
        [torch.zeros(0), ten],
    ):
        with pytest.raises(ValueError, match=r"must grow step by step to the 2 classes"):
            incremental_accuracy(correct, ten)
    for counts in (torch.tensor([11, 0]), torch.tensor([-1, 0])):
        with pytest.raises(ValueError, match=r"between 0 and total"):
            incremental_accuracy([counts], ten)
    with pytest.raises(ValueError, match=r"step 1 has classes without any test sample"):
        incremental_accuracy([torch.tensor([1]), torch.tensor([1, 0])], torch.tensor([10, 0]))
    with pytest.raises(ValueError, match=r"old_classes must be at least 0; got -1"):
        old_to_new_rate(ten, ten, -1)
    with pytest.raises(ValueError, match=r"prediction \[2\], target \[1\]"):
        unwrap(old_to_new_rate)(ten, ten[:1], 1)
