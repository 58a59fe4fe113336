"""How numbers are written: shares as percent, counts with SI prefixes, times in the unit a reader thinks in."""

from __future__ import annotations

import math
import re
from collections.abc import Callable

NBSP = "\u00a0"
MINUS = "\u2212"
ABSENT = "–"
"""Shown where a value was never recorded. A value that was recorded and is no number reads ``NaN`` or ``∞``."""

LABELS = {
    "accuracy": "Accuracy",
    "top5": "Top-5 accuracy",
    "calibration_error": "Calibration error",
    "agreement": "Agreement with the teacher",
    "loss": "Loss",
    "mse": "Mean squared error",
    "mae": "Mean absolute error",
    "rmse": "Root mean squared error",
    "r2": "R²",
    "f1": "F1",
}
SHARES = {
    "accuracy",
    "top5",
    "calibration_error",
    "agreement",
    "f1",
    "precision",
    "recall",
    "rate",
    "share",
    "forgetting",
}
ERRORS = {"loss", "error", "mse", "mae", "rmse", "forgetting", "perplexity"}
_RAISED = str.maketrans("0123456789-", "⁰¹²³⁴⁵⁶⁷⁸⁹⁻")
_GROUPED = re.compile(r"^(?P<base>[^\[\]]+)\[(?P<group>.+)\]$", re.DOTALL)


def number(value: object) -> float | None:
    """The value as a finite float, or none: also for booleans, text, NaN and infinities."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        result = float(value)
    except OverflowError:
        return None
    return result if math.isfinite(result) else None


def unwritable(value: object) -> str:
    """What stands in the place of a value that is no finite number."""
    if isinstance(value, float):
        return "NaN" if math.isnan(value) else f"{MINUS if value < 0 else ''}∞"
    return ABSENT


def signed(text: str) -> str:
    return text.replace("-", MINUS)


def percent(value: object, digits: int = 2) -> str:
    """A share (0..1) as percent: ``91.25%``."""
    share = number(value)
    return unwritable(value) if share is None else signed(f"{100 * share:.{digits}f}%")


def points(value: object, digits: int = 2) -> str:
    """A difference of shares in percentage points, always with its sign: ``+1.25``."""
    share = number(value)
    if share is None:
        return unwritable(value)
    text = f"{100 * share:+.{digits}f}"
    return signed(text if float(text) else text.lstrip("+-"))


def plain(value: object, digits: int = 4) -> str:
    """A number without a unit, with so many significant digits."""
    amount = number(value)
    if amount is None:
        return unwritable(value)
    if amount == int(amount) and abs(amount) < 10_000_000:
        return signed(grouped(int(amount)))
    text = f"{amount:.{digits}g}"
    mantissa, _, exponent = text.partition("e")
    if exponent:
        text = f"{mantissa}{NBSP}×{NBSP}10{str(int(exponent)).translate(_RAISED)}"
    return signed(text)


def grouped(count: int) -> str:
    """An integer with its thousands apart: ``50 000``."""
    return f"{count:,}".replace(",", "\u202f")


def count(value: object) -> str:
    """A number of rows, epochs or steps in full."""
    amount = number(value)
    return unwritable(value) if amount is None else signed(grouped(round(amount)))


def si(value: object) -> str:
    """A count with three significant digits and an SI prefix: ``1.23 M``."""
    amount = number(value)
    if amount is None:
        return unwritable(value)
    for scale, prefix in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(amount) >= scale * 0.9995:
            return signed(f"{_three_digits(amount / scale)}{NBSP}{prefix}")
    return signed(f"{amount:.0f}" if amount == int(amount) else _three_digits(amount))


def _three_digits(amount: float) -> str:
    size = abs(amount)
    return f"{amount:.{2 if size < 9.995 else 1 if size < 99.95 else 0}f}"


def milliseconds(value: object) -> str:
    amount = number(value)
    if amount is None:
        return unwritable(value)
    return f"{amount / 1000:.2f}{NBSP}s" if amount >= 9995 else f"{amount:.3g}{NBSP}ms"


def duration(value: object) -> str:
    """Seconds as a clock would be read aloud: ``42.0 s``, ``3 min 12 s``, ``2 h 05 min``."""
    seconds = number(value)
    if seconds is None:
        return unwritable(value)
    if seconds < 59.95:
        return f"{seconds:.2g}{NBSP}s" if seconds < 1 else f"{seconds:.1f}{NBSP}s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes}{NBSP}min {rest:02d}{NBSP}s"
    hours, minutes = divmod(minutes, 60)
    return f"{grouped(hours)}{NBSP}h {minutes:02d}{NBSP}min"


COSTS: dict[str, tuple[str, Callable[[object], str]]] = {
    "parameters": ("Parameters", si),
    "flops": ("FLOPs per row", si),
    "latency_ms": ("Latency per row", milliseconds),
}
"""What a model costs, by its key in ``result.json``: the cost's name, and how it is written."""


def p_value(value: object) -> str:
    p = number(value)
    if p is None:
        return unwritable(value)
    return "< 0.001" if p < 0.001 else f"{p:.3f}" if p < 0.1 else f"{p:.2f}"


def p_clause(p: float) -> str:
    """``p = 0.043``, ``p < 0.001``."""
    return f"p {p_value(p)}" if p < 0.001 else f"p = {p_value(p)}"


def times(value: object) -> str:
    """A ratio: ``6.0×``."""
    ratio = number(value)
    if ratio is None:
        return unwritable(value)
    return f"{ratio:.{2 if ratio < 2 else 1 if ratio < 100 else 0}f}×"


def split_group(metric: str) -> tuple[str, str | None]:
    """``accuracy[sex=1]`` → (``accuracy``, ``sex=1``); a metric over all rows has no group."""
    match = _GROUPED.match(metric)
    return (match["base"], match["group"]) if match else (metric, None)


def metric_label(metric: str) -> str:
    base, group = split_group(metric)
    label = LABELS.get(base) or base.replace("_", " ")
    label = label[:1].upper() + label[1:]
    return label if group is None else f"{label}, {group}"


def in_sentence(metric: str) -> str:
    """The metric's label as it stands inside a sentence."""
    label = metric_label(metric)
    return (
        label
        if label[:2].isupper() or label[1:2].isdigit() or label[1:2] == "²"
        else label[:1].lower() + label[1:]
    )


def is_share(metric: str) -> bool:
    """Whether values of the metric are shares in [0, 1], written as percent."""
    base = split_group(metric)[0]
    return base in SHARES or not SHARES.isdisjoint(re.split(r"[^a-z0-9]+", base.lower()))


def lower_is_better(metric: str) -> bool:
    base = split_group(metric)[0]
    return base in ERRORS or not ERRORS.isdisjoint(re.split(r"[^a-z0-9]+", base.lower()))


def metric_value(metric: str, value: object, digits: int = 2) -> str:
    if is_share(metric):
        return percent(value, digits)
    amount = number(value)
    if amount is None or amount == 0 or not 1e-4 <= abs(amount) < 1e4:
        return plain(value)
    return signed(f"{amount:#.4g}".rstrip("."))


def metric_difference(metric: str, value: object, digits: int = 2) -> str:
    """A difference of two values of one metric, signed; shares in percentage points (the unit is not written)."""
    if is_share(metric):
        return points(value, digits)
    amount = number(value)
    if amount is None:
        return unwritable(value)
    return f"+{plain(amount)}" if amount > 0 else plain(amount)
