"""Counter-based numbers are numpy's, and a row's do not depend on its company."""

from __future__ import annotations

import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from tutelage.engine.philox import Counter

ID = st.integers(0, 2**63 - 1)


def counter(rows: int = 128, **changes: int) -> Counter:
    return Counter(np.arange(rows) * 977, np.full(rows, 3), **{"seed": 42, **changes})


@given(
    index=ID,
    view=ID,
    seed=ID,
    salt=ID,
    stream=st.integers(0, 9),
    count=st.sampled_from([1, 8, 255, 257, 600]),
)
def test_words_are_those_of_numpys_philox(index, view, seed, salt, stream, count):
    drawn = Counter(np.array([5, index]), np.array([9, view]), seed, salt, stream).words(count)
    reference = np.random.Philox(
        counter=np.array([0, index, view, stream], dtype=np.uint64),
        key=np.array([seed, salt], dtype=np.uint64),
    )
    np.testing.assert_array_equal(drawn[1], reference.random_raw(count))


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 5, 7), (3, 32, 32)])
@pytest.mark.parametrize("kind", ["uniform_field", "normal_field"])
def test_a_rows_field_does_not_depend_on_the_other_rows(kind, shape):
    whole = counter()
    fields = getattr(whole, kind)(shape)
    rows = np.random.default_rng(0).permutation(128)
    for cut in (1, 3, 17, 128):
        part = Counter(whole.index[rows[:cut]], whole.view[rows[:cut]], 42)
        np.testing.assert_array_equal(getattr(part, kind)(shape), fields[rows[:cut]])


def test_uniform_numbers_are_uniform_and_normal_ones_normal():
    uniform = counter(2000).uniform(8)
    assert uniform.min() >= 0
    assert uniform.max() < 1
    assert stats.kstest(uniform.ravel(), "uniform").pvalue > 0.01
    assert stats.kstest(counter(2000).uniform_field((5,)).ravel(), "uniform").pvalue > 0.01
    assert stats.kstest(counter(2000).normal_field((7,)).ravel(), "norm").pvalue > 0.01


def test_seed_salt_stream_and_view_each_give_other_numbers():
    draws = [counter().uniform(4)]
    draws += [counter(**change).uniform(4) for change in ({"seed": 1}, {"salt": 1}, {"stream": 1})]
    draws.append(Counter(counter().index, counter().view + 1, 42).uniform(4))
    for i, first in enumerate(draws):
        for second in draws[i + 1 :]:
            assert abs(np.corrcoef(first.ravel(), second.ravel())[0, 1]) < 0.15


def test_eight_numbers_for_128_rows_are_quick():
    rows, best = counter(), float("inf")
    for _ in range(50):
        start = time.perf_counter()
        rows.uniform(8)
        best = min(best, time.perf_counter() - start)
    assert best < 1e-3  # 0.16 ms where nothing else runs


def test_no_rows_give_no_numbers():
    none = counter(0)
    assert none.uniform(8).shape == (0, 8)
    assert none.normal_field((3, 4)).shape == (0, 3, 4)
