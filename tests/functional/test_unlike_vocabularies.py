"""ULD: reference values, alignment by bytes, groups by hand, what counts, what is refused."""

from __future__ import annotations

from inspect import unwrap
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tutelage.functional import align_byte_offsets, uld_loss

GOLDEN = Path(__file__).parent.parent / "golden" / "llm_baselines"
seeds = st.integers(0, 2**31 - 1)
quick = settings(max_examples=25, deadline=None)


def arrays(case: str) -> dict[str, Tensor]:
    with np.load(GOLDEN / f"{case}.npz") as data:
        return {name: torch.from_numpy(data[name]) for name in data}


def labels(*rows: tuple[int, int], length: int = 6, vocabulary: int = 5) -> Tensor:
    """Targets with an answer from a position on, so many tokens long."""
    target = torch.full((len(rows), length), -100)
    for row, (start, size) in enumerate(rows):
        target[row, start : start + size] = torch.arange(size) % vocabulary
    return target


def draw(seed: int, rows: int = 2, length: int = 6, vocabulary: int = 5) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return 2 * torch.randn(rows, length, vocabulary, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize(
    ("case", "options", "value"),
    [
        ("uld_original", {"weight": 1.5}, "out_distill_loss"),
        ("uld_trl_positional_bayesian", {}, "out_loss"),
        ("uld_trl_positional_observed", {"shift": 0}, "out_loss"),
        ("uld_trl_extended_bayesian", {"alignment": "bytes"}, "out_loss"),
    ],
)
def test_golden(case: str, options: dict[str, Any], value: str) -> None:
    data = arrays(case)
    student = data["in_student"].requires_grad_()
    if "alignment" in options:
        options |= {
            f"{side}_byte_offsets": data[f"in_{side}_byte_offsets"] for side in ("student", "teacher")
        }
        options |= {f"{side}_ids": data[f"in_{side}_ids"] for side in ("student", "teacher")}
    loss = uld_loss(
        student, data["in_teacher"], data["in_student_label"], data["in_teacher_label"], **options
    )
    loss.backward()
    tolerance: dict[str, Any] = (
        {"rtol": 1e-6, "atol": 1e-8} if case == "uld_original" else {"rtol": 1e-9, "atol": 1e-12}
    )
    torch.testing.assert_close(loss.double(), data[value].double(), **tolerance)
    torch.testing.assert_close(student.grad, data["grad_student"], **tolerance)


def test_is_the_distance_of_sorted_probabilities() -> None:
    student, teacher = draw(0), draw(1, length=8, vocabulary=9)
    found = uld_loss(student, teacher, labels((2, 3), (1, 4)), labels((3, 4), (5, 2), length=8))
    wanted = []
    for row, s, t, size in ((0, 1, 2, 3), (1, 0, 4, 2)):
        p = student[row, s : s + size].softmax(-1).sort(descending=True).values
        q = teacher[row, t : t + size].softmax(-1).sort(descending=True).values
        p = torch.cat([p, p.new_zeros(size, 4)], 1)
        wanted.append((p - q).abs().sum(1).mean())
    torch.testing.assert_close(found, sum(wanted) / 2)


@quick
@given(seeds, st.sampled_from([0, 1]), st.floats(0.5, 3.0))
def test_the_order_of_a_vocabulary_and_a_constant_change_nothing(
    seed: int, shift: int, temperature: float
) -> None:
    student, teacher = draw(seed), draw(seed + 1, vocabulary=7)
    target = labels((1, 4), (2, 2))
    options: dict[str, Any] = {"shift": shift, "student_temperature": temperature}
    order = torch.randperm(7, generator=torch.Generator().manual_seed(seed))
    torch.testing.assert_close(
        uld_loss(student + 5, teacher[..., order] - 3, target, target, **options),
        uld_loss(student, teacher, target, target, **options),
    )


def test_zero_where_both_are_one_and_gradients_are_the_numerical_ones() -> None:
    student, teacher, target = draw(2).requires_grad_(), draw(3), labels((1, 3), (2, 3))
    ends = torch.tensor([[0, 0], [0, 2], [2, 5], [5, 6], [6, 8], [8, 9]]).expand(2, 6, 2)
    by_bytes: dict[str, Any] = {"student_byte_offsets": ends, "teacher_byte_offsets": ends}
    assert uld_loss(student, student.detach(), target, target) == 0
    for options in ({}, {"alignment": "bytes", **by_bytes}):
        assert torch.autograd.gradcheck(
            lambda logits, options=options: uld_loss(logits, teacher, target, target, **options), student
        )


def test_a_group_is_the_last_distribution_times_the_probabilities_before() -> None:
    student, teacher = draw(4, rows=1), draw(5, rows=1)
    student_target, teacher_target = labels((1, 3)), labels((2, 2))
    offsets = torch.zeros(1, 6, 2, dtype=torch.int64)
    student_offsets, teacher_offsets = offsets.clone(), offsets.clone()
    student_offsets[0, 1:4] = torch.tensor([[0, 1], [1, 2], [2, 4]])
    teacher_offsets[0, 2:4] = torch.tensor([[0, 2], [2, 4]])
    p, q = student[0].softmax(-1), teacher[0].softmax(-1)

    def found(shift: int) -> Any:
        return uld_loss(
            student,
            teacher,
            student_target,
            teacher_target,
            student_byte_offsets=student_offsets,
            teacher_byte_offsets=teacher_offsets,
            alignment="bytes",
            shift=shift,
        )

    def distance(a: Tensor, b: Tensor) -> Tensor:
        gap: Tensor = a.sort(descending=True).values - b.sort(descending=True).values
        return gap.abs().sum()

    # tokens 0 and 1 of the student against token 0 of the teacher, then 2 against 1
    first = distance(p[0, 0] * p[1], q[1])
    torch.testing.assert_close(found(1), (first + distance(p[2], q[2])) / 2)
    first = distance(p[1] * p[2, 1], q[2])
    torch.testing.assert_close(found(0), (first + distance(p[3], q[3])) / 2)


def test_an_answer_that_starts_its_row_leaves_out_its_first_position() -> None:
    student, teacher = draw(6, rows=1), draw(7, rows=1)
    found = uld_loss(student, teacher, labels((0, 3)), labels((2, 3)))
    shorter = uld_loss(student, teacher, labels((1, 2)), labels((3, 2)))
    torch.testing.assert_close(found, shorter)
    ends = torch.tensor([[0, 1], [1, 2], [2, 3], [3, 4], [4, 5], [5, 6]])[None]
    by_bytes: dict[str, Any] = {
        "alignment": "bytes",
        "student_byte_offsets": ends,
        "teacher_byte_offsets": ends - 2,
    }
    torch.testing.assert_close(
        uld_loss(student, teacher, labels((0, 3)), labels((2, 3)), **by_bytes), shorter
    )
    assert uld_loss(student, teacher, labels((0, 1)), labels((2, 1))) == 0  # nothing is left


@pytest.mark.parametrize("skip_eos", [False, True])
def test_rows_without_an_answer_count_with_zero(skip_eos: bool) -> None:
    student, teacher = draw(8, rows=3).requires_grad_(), draw(9, rows=3)
    size = 2 if skip_eos else 1  # the last token is left out
    some = uld_loss(
        student, teacher, labels((2, size), (0, 0), (1, 2)), labels((1, 3), (1, 2), (0, 0)), skip_eos=skip_eos
    )
    one = uld_loss(student[:1], teacher[:1], labels((2, 1)), labels((1, 1)))
    torch.testing.assert_close(some, one / 3)
    none = uld_loss(student, teacher, labels(*[(0, 0)] * 3), labels(*[(0, 0)] * 3), skip_eos=skip_eos)
    none.backward()
    assert none == 0
    assert student.grad is not None
    assert (student.grad == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_extreme_and_infinite_logits_are_finite(dtype: torch.dtype) -> None:
    student = (1e4 * draw(10).sign()).to(dtype)
    student[..., 0] = -torch.inf
    student.requires_grad_()
    ends = torch.tensor([[0, 0], [0, 2], [2, 5], [5, 6], [6, 8], [8, 9]]).expand(2, 6, 2)
    target = labels((1, 3), (1, 4))
    other = ends.clone()
    other[:, 2] = torch.tensor([2, 4])
    loss = uld_loss(
        student,
        -student.detach(),
        target,
        target,
        alignment="bytes",
        student_byte_offsets=ends,
        teacher_byte_offsets=other,
    )
    loss.backward()
    assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert student.grad is not None
    assert student.grad.isfinite().all()


class Written(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the entries of all tensors that operations make."""

    entries = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        if isinstance(made, Tensor) and not func.is_view:
            self.entries += made.numel()
        return made


def test_work_grows_with_the_rows_alone() -> None:
    def entries(rows: int, answer: int, dtype: torch.dtype = torch.float32) -> int:
        student = draw(0, rows=rows, length=16, vocabulary=500).to(dtype).requires_grad_()
        target = labels(*[(2, answer)] * rows, length=16)
        with Written() as written:  # type: ignore[no-untyped-call]
            uld_loss(student, student.detach(), target, target).backward()
        return int(written.entries)

    assert entries(32, 3) < 2.5 * entries(16, 3)
    # Where there is nothing to compare, a gradient of zeros is all that is made.
    assert entries(8, 0, torch.bfloat16) < 2 * 8 * 16 * 500


def test_without_rows_the_loss_is_zero() -> None:
    none = torch.zeros(0, 6, 5, requires_grad=True)
    loss = uld_loss(none, none.detach(), labels()[:0].reshape(0, 6), labels()[:0].reshape(0, 6))
    loss.backward()
    assert loss == 0


def test_align_byte_offsets_by_hand() -> None:
    assert align_byte_offsets([(0, 2), (2, 5), (5, 6)], [(0, 5), (5, 6)]) == ([[0, 1], [2]], [[0], [1]])
    assert align_byte_offsets([(0, 3)], [(0, 1), (1, 3)]) == ([[0]], [[0, 1]])
    # what is left forms a last group, and an end-of-text token without bytes is dropped where it has no partner
    assert align_byte_offsets([(0, 2), (2, 4)], [(0, 2), (2, 3)]) == ([[0], [1]], [[0], [1]])
    assert align_byte_offsets([(0, 2), (2, 2)], [(0, 2)]) == ([[0]], [[0]])
    assert align_byte_offsets([(0, 2), (2, 2)], [(0, 1), (1, 2), (2, 2)]) == ([[0], [1]], [[0, 1], [2]])
    assert align_byte_offsets([], [(0, 1)]) == ([], [])


@quick
@given(st.sets(st.integers(1, 30)), st.sets(st.integers(1, 30)))
def test_groups_cover_the_same_bytes(student_cuts: set[int], teacher_cuts: set[int]) -> None:
    def offsets(cuts: set[int]) -> list[tuple[int, int]]:
        ends = sorted(cuts | {31})
        return list(zip([0, *ends], ends, strict=False))

    student, teacher = offsets(student_cuts), offsets(teacher_cuts)
    groups = align_byte_offsets(student, teacher)
    assert [position for group in groups[0] for position in group] == list(range(len(student)))
    assert [position for group in groups[1] for position in group] == list(range(len(teacher)))
    for ours, theirs in zip(*groups, strict=True):
        assert (student[ours[0]][0], student[ours[-1]][1]) == (teacher[theirs[0]][0], teacher[theirs[-1]][1])
    assert len(groups[0]) == len((student_cuts | {31}) & (teacher_cuts | {31}))  # as short as can be


def test_bad_input() -> None:
    student, teacher, target, loss = draw(11), draw(12), labels((1, 2), (1, 2)), unwrap(uld_loss)
    with pytest.raises(ValueError, match=r"alignment must be 'positional' or 'bytes'; got 'words'"):
        loss(student, teacher, target, target, alignment="words")
    with pytest.raises(ValueError, match=r"shift must be 0 or 1; got 2"):
        loss(student, teacher, target, target, shift=2)
    for side in ("student", "teacher"):
        with pytest.raises(ValueError, match=rf"{side}_temperature must be finite and above 0; got 0"):
            loss(student, teacher, target, target, **{f"{side}_temperature": 0})
    with pytest.raises(
        ValueError, match=r"student_logits must be \[batch, length, vocabulary\]; got \[6, 5\]"
    ):
        loss(student[0], teacher, target, target)
    with pytest.raises(ValueError, match=r"teacher_target must be \[2, 6\], as the logits; got \[2, 5\]"):
        loss(student, teacher, target, target[:, :5])
    with pytest.raises(ValueError, match=r"student_ids must be \[2, 6\]"):
        loss(student, teacher, target, target, student_ids=target[:1])
    with pytest.raises(ValueError, match=r"as many rows; got 2 and 1"):
        loss(student, teacher[:1], target, target[:1])
    with pytest.raises(ValueError, match=r"by bytes needs student_byte_offsets \[2, 6, 2\]; got none"):
        loss(student, teacher, target, target, alignment="bytes")
    split = target.clone()
    split[1, 5] = 3
    with pytest.raises(
        ValueError, match=r"row 1 of teacher_target has an answer in pieces, 3 labels between .* 1 and 5"
    ):
        loss(student, teacher, target, split)
    falling = torch.tensor([[0, 4], [2, 3]])
    with pytest.raises(ValueError, match=r"teacher token 1 has the byte offsets \(2, 3\) after an end at 4"):
        align_byte_offsets([(0, 4)], falling.tolist())
