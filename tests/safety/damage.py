"""Values and bytes as no program of ours would write them, for Hypothesis to draw."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

Path = tuple[str | int, ...]

SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**70), 2**70),
    st.floats(),
    st.text(max_size=8),
    st.sampled_from(["", "..", "../../x", "\ud800", "a\0b", "digits", "kd", "1e5", "inf", "9" * 60]),
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=6), inner, max_size=3)
    ),
    max_leaves=6,
)
"""Whatever JSON holds, and NaN and infinities, which Python's JSON holds too."""


def places(value: Any, path: Path = ()) -> Iterator[Path]:
    """Paths of everything inside a value of mappings and lists."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in inner:
        yield (*path, key)
        yield from places(item, (*path, key))


@st.composite
def altered(draw: st.DrawFn, value: Any) -> Any:
    """The value with one to three places replaced, taken away or added to."""
    value = copy.deepcopy(value)
    for _ in range(draw(st.integers(1, 3))):
        found = list(places(value))
        if not found:
            return draw(VALUES)
        *path, last = draw(st.sampled_from(found))
        inner = value
        for key in path:
            inner = inner[key]
        how = draw(st.sampled_from(["replace", "remove", "add"]))
        if how == "replace":
            inner[last] = draw(VALUES)
        elif how == "remove":
            del inner[last]
        elif isinstance(inner, dict):
            inner[draw(st.text(max_size=6))] = draw(VALUES)
        else:
            inner.insert(0, draw(VALUES))
    return value


@st.composite
def damaged(draw: st.DrawFn, content: bytes) -> bytes:
    """Bytes with some changed, cut off, put in or repeated; at times the same as before."""
    how = draw(st.sampled_from(["flip", "cut", "insert", "repeat", "zero", "other"]))
    at = draw(st.integers(0, max(0, len(content) - 1)))
    if how == "flip" and content:
        bit = draw(st.integers(0, 7))
        return content[:at] + bytes([content[at] ^ (1 << bit)]) + content[at + 1 :]
    if how == "cut":
        return content[:at]
    if how == "insert":
        return content[:at] + draw(st.binary(min_size=1, max_size=16)) + content[at:]
    if how == "repeat":
        return content + content[at:]
    if how == "zero":
        length = draw(st.integers(1, 64))
        return content[:at] + b"\0" * length + content[at + length :]
    return draw(st.binary(max_size=64))


CHECKS = [HealthCheck.too_slow, HealthCheck.function_scoped_fixture, HealthCheck.data_too_large]
SECONDS = timedelta(seconds=20)
"""For one example: nothing hangs."""


def fuzzed(test: Callable[..., None], examples: int, **strategies: Any) -> tuple[Any, Any]:
    """A quick test and a slow one of the same property."""
    drawn = given(**strategies)
    quick = settings(max_examples=examples, derandomize=True, deadline=SECONDS, suppress_health_check=CHECKS)
    slow = settings(max_examples=30 * examples, deadline=SECONDS, suppress_health_check=CHECKS)
    return quick(drawn(test)), pytest.mark.slow(slow(drawn(test)))


RECIPE: dict[str, Any] = {
    "version": 1,
    "task": "classification",
    "data": {"path": "digits", "validation": 0.2, "views": [{"name": "crop", "padding": 1}], "columns": []},
    "teacher": {"big": {"model": "digits:mlp-16", "options": {"head_bias": True}}},
    "student": {"model": "digits:mlp-8", "mean": [0.5], "std": [0.5]},
    "method": [{"name": "kd", "temperature": 2.0}, "nkd"],
    "train": {
        "epochs": 2,
        "batch_size": 8,
        "optimizer": {"name": "sgd", "lr": 0.1},
        "schedule": {"name": "cosine"},
    },
    "evaluation": {"metrics": ["accuracy"]},
    "output": {"dir": "runs/x", "trackers": []},
    "compare": {"methods": ["kd", {"name": "nkd"}], "seeds": [0, 1]},
}
"""One that is valid, with something in most of its parts."""
