"""Files, held against the student that they were made from."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tutelage.engine.types import Inputs
from tutelage.export.errors import CheckFailedError
from tutelage.export.subject import Subject

Run = Callable[[Any], Tensor]

TOLERANCE = 1e-4
"""Largest difference of a float file's logits, as a share of the largest logit (of 1, where that is smaller)."""
LEAST_SIGNAL = {"int8": 12.0, "int4": 6.0}
"""Decibels of logits over rounding errors that a quantised file must keep: its answers have an error of at most a
quarter of their size, or half of it."""


def check(name: str, subject: Subject, run: Run, expected: Tensor | None = None) -> dict[str, Any]:
    """Hold a file against logits, on one row and on many.

    Args:
        run: rows to logits, by the file.
        expected: logits of the subject's rows; left out: the student's own.

    Returns:
        ``rows``, ``largest_difference``, and ``agreement``: the share of rows (of tokens) with the same most
        probable class.

    Raises:
        CheckFailedError: logits differ by more than rounding.
    """
    expected = subject.expected if expected is None else expected
    found = _answers(name, subject, run)
    difference = float((found - expected).abs().max())
    allowed = TOLERANCE * max(1.0, float(expected.abs().max()))
    if difference > allowed:
        raise CheckFailedError(
            f"{name}: its logits differ from the student's by up to {difference:.3g} on {subject.rows_are}; allowed: "
            f"{allowed:.3g}; nothing was written. Try another format, and please report the model"
        )
    return {
        "rows": len(expected),
        "largest_difference": difference,
        "agreement": _agreement(found, expected),
    }


def check_quantised(name: str, subject: Subject, run: Run, to: str) -> dict[str, Any]:
    """The same for a quantised file, which may differ; ``signal_db`` says by how much.

    Raises:
        CheckFailedError: too little is left of the student's logits.
    """
    expected = subject.expected
    found = _answers(name, subject, run)
    spread = expected - expected.mean(0)
    error = (found - expected).square().sum()
    signal = float(10 * torch.log10(spread.square().sum() / error.clamp_min(1e-30)))
    if not signal >= LEAST_SIGNAL[to]:
        raise CheckFailedError(
            f"{name}: rounding drowns the student's answers on {subject.rows_are} (signal {signal:.1f} dB, at least "
            f"{LEAST_SIGNAL[to]:g} is needed); nothing was written. Train with train.quantize={to}, or take "
            f"{'int8' if to == 'int4' else 'a float format'}"
        )
    return {
        "rows": len(expected),
        "largest_difference": float((found - expected).abs().max()),
        "agreement": _agreement(found, expected),
        "signal_db": signal,
    }


def _answers(name: str, subject: Subject, run: Run) -> Tensor:
    rows = subject.inputs if subject.reads_text else subject.rows
    with torch.no_grad():
        found, alone = run(rows), run(_first(rows))
    if found.shape != subject.expected.shape or alone.shape != found[:1].shape:
        raise CheckFailedError(
            f"{name} gives logits {list(found.shape)} and {list(alone.shape)} for {len(subject.expected)} rows and "
            f"one, not {list(subject.expected.shape)}; nothing was written"
        )
    if not bool(torch.isfinite(found).all()):
        raise CheckFailedError(f"{name} gives logits that are not finite; nothing was written")
    return found


def _first(rows: Inputs) -> Inputs:
    if isinstance(rows, Tensor):
        return rows[:1]
    return {name: tensor[:1] for name, tensor in rows.items()}


def _agreement(found: Tensor, expected: Tensor) -> float | None:
    if expected.dim() < 2 or expected.shape[-1] < 2:
        return None
    return float((found.argmax(-1) == expected.argmax(-1)).float().mean())
