"""What a fused loss takes: teachers in their forms, and what is refused before the first product."""

from __future__ import annotations

import torch
from torch import Tensor

from tutelage.functional.analytic import Divergence, ForwardKL, Interpolated, OfLogits
from tutelage.functional.fused_products import Side
from tutelage.functional.fused_rows import DenseRows, Rows, SampledRows, TopKRows
from tutelage.functional.fused_tokens import Tokens, check_side
from tutelage.functional.heads import Head, Sampled, TopK

__all__: list[str] = []

Teacher = tuple[Tensor, Head] | Tensor | TopK | Sampled
"""Hidden states ``[..., width]`` with their head, logits ``[..., vocabulary]``, or a sparse form ``[..., k]``."""


def taught_rows(
    tokens: Tokens,
    teacher: Teacher,
    divergence: Divergence | OfLogits,
    *,
    temperature: float | int = 1.0,
    label_share: float | int = 0.0,
) -> Rows:
    """What is done to a few of these tokens where there is a teacher.

    Raises:
        ValueError: the teacher has other rows or another vocabulary than the student, or this divergence cannot be had
            from it. Ids of entries are looked at on the CPU alone.
    """
    common = (tokens.vocabulary, tokens.target, label_share)
    if isinstance(teacher, TopK | Sampled):
        divergence = _checked_sparse(teacher, divergence, temperature)
        leading = tokens.leading
        for name, values in vars(teacher).items():
            _check_rows(
                f"the teacher's {name}", values.shape if name == "tail" else values.shape[:-1], leading
            )
        _check_entries(teacher, tokens)
        flat = [values.detach().flatten(0, len(leading) - 1) for values in vars(teacher).values()]
        if isinstance(teacher, Sampled):
            return SampledRows(*common, Sampled(*flat))
        return TopKRows(*common, TopK(*flat), divergence)
    if tokens.vocabulary.group is not None and not isinstance(divergence, Divergence):
        raise ValueError("a callable divergence needs whole rows; over a process group take one by name")
    side = dense_side(tokens, teacher)
    finite = isinstance(side, Side) and side.bias is None and tokens.side.bias is None
    return DenseRows(*common, side, divergence, temperature, finite)


def dense_side(tokens: Tokens, teacher: tuple[Tensor, Head] | Tensor) -> Side | Tensor:
    """A dense teacher of these tokens, its rows laid flat.

    Raises:
        ValueError: it has other rows or another vocabulary.
    """
    rows = teacher if isinstance(teacher, Tensor) else teacher[0]
    entries = teacher.shape[-1] if isinstance(teacher, Tensor) else len(teacher[1].weight)
    _check_rows("the teacher", rows.shape[:-1], tokens.leading)
    if entries != tokens.vocabulary.size:
        raise ValueError(
            f"student and teacher have vocabularies of {tokens.vocabulary.size} and {entries} entries; cut heads that "
            "are padded to the tokenizer's size, and use uld_loss for two tokenizers"
        )
    flat = rows.detach().flatten(0, -2)
    if isinstance(teacher, Tensor):
        return flat
    check_side("teacher", *teacher)
    return Side(flat, teacher[1])


def _checked_sparse(
    teacher: TopK | Sampled, divergence: Divergence | OfLogits, temperature: float | int
) -> Divergence:
    """The divergence, if it can be had from a sparse teacher."""
    if temperature != 1:
        raise ValueError(
            f"a stored top-k or sampled teacher is known at temperature 1 alone; got {temperature}; "
            "store dense logits, or leave the temperature at 1"
        )
    if not isinstance(divergence, Divergence):
        raise ValueError(
            "a callable divergence needs the teacher's whole rows; these are stored top-k or sampled"
        )
    if isinstance(teacher, TopK) and isinstance(divergence, Interpolated):
        raise ValueError(
            "taid mixes the logits of every entry, and a top-k teacher has but some: store dense logits"
        )
    if isinstance(teacher, Sampled) and not isinstance(divergence, ForwardKL):
        raise ValueError(
            f"a sampled teacher gives the cross-entropy of forward_kl alone; got {type(divergence).__name__}; "
            "store top-k or dense logits"
        )
    return divergence


def _check_entries(teacher: TopK | Sampled, tokens: Tokens) -> None:
    """A sparse teacher has as many values as ids, which are of the vocabulary wherever a token counts."""
    name, values = (
        ("log_probs", teacher.log_probs) if isinstance(teacher, TopK) else ("weights", teacher.weights)
    )
    ids = teacher.ids
    if ids.shape != values.shape:
        raise ValueError(
            f"the teacher's ids and {name} must have one entry each; got {ids.shape[-1]} and {values.shape[-1]} a row"
        )
    if ids.device.type != "cpu":
        return  # to look at them would wait for the device
    ids = ids.flatten(0, -2) if tokens.counted is None else ids.flatten(0, -2)[tokens.counted]
    if not ids.numel():
        return
    low, high = (int(value) for value in ids.aminmax())
    if low < 0 or high >= tokens.vocabulary.total:
        raise ValueError(
            f"the teacher's ids name the entry {low if low < 0 else high}; the student's vocabulary has 0 to "
            f"{tokens.vocabulary.total - 1}: give a teacher of the same tokeniser"
        )


def _check_rows(name: str, given: torch.Size, leading: torch.Size) -> None:
    if given != leading:
        raise ValueError(f"{name} must have the student's rows, {list(leading)}; got {list(given)}")
