"""Figures in few characters."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

SHARES = {"accuracy", "balanced_accuracy", "top5", "agreement", "calibration_error"}
"""Metrics between 0 and 1, shown in percent."""


def metric(name: str, value: float | None, *, signed: bool = False) -> str:
    """A metric: percent where it is a share, else four digits."""
    if value is None:
        return "-"
    sign = "+" if signed else ""
    return f"{100 * value:{sign}.1f}" if name in SHARES else f"{value:{sign}.4g}"


def interval(name: str, figure: Mapping[str, Any] | None, *, signed: bool = False) -> str:
    """``mean [low, high]`` from a mapping with these keys; an interval that one run cannot have is left out."""
    if figure is None or figure.get("mean") is None:
        return "-"
    mean, low, high = (
        metric(name, figure.get(key), signed=signed and key == "mean") for key in ("mean", "low", "high")
    )
    return mean if figure.get("low") is None else f"{mean} [{low}, {high}]"


def amount(value: float | None) -> str:
    """A count with a unit: 1.23 M."""
    if value is None:
        return "-"
    for size, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.3g} {unit}"
    return f"{value:.3g}"


def milliseconds(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g} ms"


def duration(seconds: float | None) -> str:
    """Seconds, minutes or hours."""
    if seconds is None:
        return "-"
    if seconds < 120:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.1f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
