"""ULD: distributions over two tokenisers' vocabularies, compared by their sorted probabilities (arXiv 2402.12030)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Integer
from torch import Tensor

from tutelage.functional.checks import check_positive
from tutelage.functional.divergences import tempered
from tutelage.functional.reductions import upcast

__all__ = ["align_byte_offsets", "uld_loss"]

# A token's probability scales its group by no less than this.
_LEAST_PROBABILITY = 1e-8


class Answer(NamedTuple):
    """One row's answer: log-probabilities over the vocabulary, one row a token, and each token's id and byte ends."""

    log_probs: Float[Tensor, "tokens vocabulary"]
    ids: Integer[Tensor, " tokens"]
    offsets: Integer[Tensor, "tokens 2"] | None


def uld_loss(
    student_logits: Float[Tensor, "batch student_length student_vocabulary"],
    teacher_logits: Float[Tensor, "batch teacher_length teacher_vocabulary"],
    student_target: Integer[Tensor, "batch student_length"],
    teacher_target: Integer[Tensor, "batch teacher_length"],
    *,
    student_ids: Integer[Tensor, "batch student_length"] | None = None,
    teacher_ids: Integer[Tensor, "batch teacher_length"] | None = None,
    student_byte_offsets: Integer[Tensor, "batch student_length 2"] | None = None,
    teacher_byte_offsets: Integer[Tensor, "batch teacher_length 2"] | None = None,
    alignment: Literal["positional", "bytes"] = "positional",
    shift: int = 1,
    skip_eos: bool = False,
    student_temperature: float | int = 1.0,
    teacher_temperature: float | int = 1.0,
    weight: float | int = 1.0,
    ignore_index: int = -100,
) -> Float[Tensor, ""]:
    """L1 distance of sorted next-token probabilities, for a teacher with another tokenizer.

    Positions of the two answers are paired by their count or by bytes; which entry of one vocabulary is which of the
    other never matters. Each vector is sorted from large to small, the shorter filled up with zeros. The distance is
    summed over the vocabulary, averaged over a row's aligned positions, and over rows.

    Args:
        student_logits, teacher_logits: ``[batch, length, vocabulary]``, **not** shifted: row i predicts token i + 1.
            Lengths and vocabularies may differ. The teacher's are detached.
        student_target, teacher_target: ``[batch, length]``, not shifted: the answer's ids, in one piece, and
            ``ignore_index`` elsewhere.
        student_ids, teacher_ids: ``[batch, length]``, the tokens themselves; those of the target unless given.
        student_byte_offsets, teacher_byte_offsets: ``[batch, length, 2]``, where each token of the answer starts and
            ends in it; for ``bytes``.
        alignment: ``positional`` pairs the k-th tokens of both answers; ``bytes`` groups of tokens that end at the same
            byte (`align_byte_offsets`). A group of several is the distribution at its last token, times the
            probabilities of the tokens before.
        shift: 1 takes the rows that predict the answer's tokens; an answer that starts its row leaves out its first
            position or group. 0 takes the rows at the tokens, and a group is then the distribution at its first token,
            times the probabilities of the later ones.
        skip_eos: leave out each answer's last token.
        student_temperature, teacher_temperature: above 0.
        weight: factor of the loss.
        ignore_index: label of what is not the answer.

    Returns:
        A scalar, at least float32. A row without an answer on either side counts with 0.

    Raises:
        ValueError: shapes do not fit, an answer is not in one piece, byte offsets are missing or fall, or a bad option.

    Source: Boizard et al., "Towards Cross-Tokenizer Distillation: the Universal Logit Distillation Loss for LLMs"
    (arXiv 2402.12030); alignment by bytes as in TRL's GOLD trainer.
    """
    check_positive("student_temperature", student_temperature)
    check_positive("teacher_temperature", teacher_temperature)
    if alignment not in ("positional", "bytes"):
        raise ValueError(f"alignment must be 'positional' or 'bytes'; got {alignment!r}")
    if shift not in (0, 1):
        raise ValueError(f"shift must be 0 or 1; got {shift!r}")
    _check_side("student", student_logits, student_target, student_ids, student_byte_offsets, alignment)
    _check_side("teacher", teacher_logits, teacher_target, teacher_ids, teacher_byte_offsets, alignment)
    if len(student_logits) != len(teacher_logits):
        raise ValueError(
            f"student and teacher must have as many rows; got {len(student_logits)} and {len(teacher_logits)}"
        )
    # Taken apart once: a row's gradient is then a row, and not a whole batch that is zero elsewhere.
    student_rows, teacher_rows = student_logits.unbind(), teacher_logits.detach().unbind()
    # A 0 with a gradient, should no row have an answer.
    total = upcast((student_rows[0] if student_rows else student_logits)[:0]).sum()
    for row in range(len(student_logits)):
        spans = [
            _span(target[row], side, row, skip_eos, ignore_index)
            for side, target in (("student", student_target), ("teacher", teacher_target))
        ]
        if all(spans):
            sides = (
                (student_rows, student_target, student_ids, student_byte_offsets, student_temperature),
                (
                    teacher_rows,
                    teacher_target,
                    teacher_ids,
                    teacher_byte_offsets,
                    teacher_temperature,
                ),
            )
            first = int(shift == 1 and any(span.start == 0 for span in spans))
            student, teacher = (
                _answer(row, span, shift, *side) for span, side in zip(spans, sides, strict=True)
            )
            total = total + _row_distance(student, teacher, alignment, shift, first)
    return weight * total / max(len(student_logits), 1)


def align_byte_offsets(
    student_offsets: Sequence[Sequence[int]], teacher_offsets: Sequence[Sequence[int]]
) -> tuple[list[list[int]], list[list[int]]]:
    """Groups of both sides' tokens that cover the same bytes of one text, as short as can be.

    Both lists are walked at once, and a group is closed where tokens of both sides end at the same byte. What is left
    at the end forms a last group, unless one side has nothing left.

    Args:
        student_offsets, teacher_offsets: the ``(start, end)`` of each token, in bytes; ends never fall.

    Returns:
        Equally many groups of token positions for student and teacher.

    Raises:
        ValueError: an end falls, or lies before its start.
    """
    student, teacher = _ends("student", student_offsets), _ends("teacher", teacher_offsets)
    groups: list[tuple[list[int], list[int]]] = [([], [])]
    i = j = 0
    while i < len(student) and j < len(teacher):
        ahead = student[i] - teacher[j]
        if ahead <= 0:
            groups[-1][0].append(i)
            i += 1
        if ahead >= 0:
            groups[-1][1].append(j)
            j += 1
        if ahead == 0:
            groups.append(([], []))
    groups[-1][0].extend(range(i, len(student)))
    groups[-1][1].extend(range(j, len(teacher)))
    whole = [group for group in groups if all(group)]
    return [group[0] for group in whole], [group[1] for group in whole]


def _ends(side: str, offsets: Sequence[Sequence[int]]) -> list[int]:
    last, ends = 0, []
    for position, (start, end) in enumerate(offsets):
        if end < max(start, last):
            raise ValueError(
                f"{side} token {position} has the byte offsets ({start}, {end}) after an end at {last}; offsets must "
                "rise along the answer"
            )
        last = end
        ends.append(end)
    return ends


def _span(target: Tensor, side: str, row: int, skip_eos: bool, ignore_index: int) -> range:
    """Positions of a row's answer."""
    positions = (target != ignore_index).nonzero().flatten().tolist()
    if positions and positions[-1] - positions[0] + 1 != len(positions):
        raise ValueError(
            f"row {row} of {side}_target has an answer in pieces, {len(positions)} labels between positions "
            f"{positions[0]} and {positions[-1]}; give each piece a row of its own"
        )
    size = max(len(positions) - int(skip_eos), 0)
    return range(positions[0], positions[0] + size) if size else range(0)


def _answer(
    row: int,
    span: range,
    shift: int,
    logits: tuple[Tensor, ...],
    target: Tensor,
    ids: Tensor | None,
    offsets: Tensor | None,
    temperature: float | int,
) -> Answer:
    # The first token of a row has no logits that predict it; its own stand in, and the caller leaves it out.
    places = torch.tensor([max(position - shift, 0) for position in span], device=target.device)
    tokens = slice(span.start, span.stop)
    return Answer(
        tempered(logits[row][places], temperature).log_softmax(-1),
        (target if ids is None else ids)[row, tokens],
        None if offsets is None else offsets[row, tokens],
    )


def _row_distance(student: Answer, teacher: Answer, alignment: str, shift: int, first: int) -> Tensor:
    if alignment == "bytes":
        assert student.offsets is not None
        assert teacher.offsets is not None
        groups = align_byte_offsets(student.offsets.tolist(), teacher.offsets.tolist())
    else:
        singles = [[position] for position in range(min(len(student.ids), len(teacher.ids)))]
        groups = singles, singles
    if len(groups[0]) <= first:
        return student.log_probs.flatten()[:0].sum()
    ordered = [
        _sorted_vectors(side, groups_of[first:], shift)
        for side, groups_of in zip((student, teacher), groups, strict=True)
    ]
    width = max(vectors.shape[1] for vectors in ordered)
    padded = [F.pad(vectors, (0, width - vectors.shape[1])) for vectors in ordered]
    return (padded[0] - padded[1]).abs().sum(-1).mean()


def _sorted_vectors(side: Answer, groups: list[list[int]], shift: int) -> Tensor:
    """Probabilities at each group's anchor times those of its other tokens, ``[groups, vocabulary]``, sorted."""
    device, anchor = side.log_probs.device, -1 if shift else 0
    others = [
        (g, position) for g, group in enumerate(groups) for position in (group[:-1] if shift else group[1:])
    ]
    vectors = side.log_probs[torch.tensor([group[anchor] for group in groups], device=device)].exp()
    vectors = vectors.sort(-1, descending=True).values
    if not others:
        return vectors
    owner, position = torch.tensor(others, device=device).unbind(1)
    actual = side.log_probs[position].gather(1, side.ids[position, None].long())[:, 0].exp()
    factors = actual.clamp(min=_LEAST_PROBABILITY).log()
    return vectors * factors.new_zeros(len(groups)).index_add(0, owner, factors).exp()[:, None]


def _check_side(
    side: str, logits: Tensor, target: Tensor, ids: Tensor | None, offsets: Tensor | None, alignment: str
) -> None:
    if logits.dim() != 3:
        raise ValueError(f"{side}_logits must be [batch, length, vocabulary]; got {list(logits.shape)}")
    for name, given in (("target", target), ("ids", ids)):
        if given is not None and given.shape != logits.shape[:2]:
            raise ValueError(
                f"{side}_{name} must be {list(logits.shape[:2])}, as the logits; got {list(given.shape)}"
            )
    if alignment == "bytes" and (offsets is None or offsets.shape != (*logits.shape[:2], 2)):
        got = "none" if offsets is None else str(list(offsets.shape))
        raise ValueError(f"alignment by bytes needs {side}_byte_offsets {[*logits.shape[:2], 2]}; got {got}")
