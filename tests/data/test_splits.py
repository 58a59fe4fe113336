"""Which rows are held out: disjoint, stable, and refused with numbers where there are too few."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from tutelage.data import DataError
from tutelage.data.splits import Chosen, choose_rows, permutation
from tutelage.recipe.schema import DataConfig


def choose(sizes: dict[str, int] | int, **options: Any) -> Chosen:
    sizes = {"train": sizes} if isinstance(sizes, int) else sizes
    return choose_rows(DataConfig(path="somewhere", **options), sizes)


def ids(chosen: Chosen) -> dict[str, list[int]]:
    return {part: rows.ids.tolist() for part, rows in chosen.parts().items()}


part_size = st.one_of(st.none(), st.integers(1, 30), st.floats(0.01, 0.6))


@given(rows=st.integers(2, 200), validation=part_size, test=part_size, seed=st.integers(0, 9))
def test_every_row_is_in_one_part(rows, validation, test, seed):
    try:
        found = ids(choose(rows, validation=validation, test=test, seed=seed))
    except DataError:
        assume(False)
    everything = [row for part in found.values() for row in part]
    assert sorted(everything) == list(range(rows))
    assert all(part == sorted(part) and part for part in found.values())
    for part, wanted in (("validation", validation), ("test", test)):
        if wanted is not None:
            assert len(found[part]) == (wanted if isinstance(wanted, int) else round(wanted * rows))


@given(limit=st.integers(1, 59), larger=st.integers(1, 60), seed=st.integers(0, 9))
def test_a_larger_limit_keeps_the_same_rows_and_more(limit, larger, seed):
    assume(limit < larger)
    options = {"validation": 0.25, "test": 15, "seed": seed}
    few, many = (ids(choose(100, limit=n, **options)) for n in (limit, larger))
    assert set(few["train"]) < set(many["train"])
    assert few["validation"] == many["validation"]
    assert few["test"] == many["test"]
    assert len(few["train"]) == limit


def test_the_test_rows_do_not_depend_on_the_validation_rows():
    assert (
        ids(choose(100, validation=10, test=20))["test"] == ids(choose(100, validation=0.5, test=20))["test"]
    )
    assert ids(choose(100, seed=1))["validation"] != ids(choose(100, seed=2))["validation"]


def test_named_splits_are_taken_whole():
    found = choose({"train": 50, "dev": 7, "test": 9}, validation="dev")
    assert found.validation.split == "dev"
    assert ids(found) == {"train": list(range(50)), "validation": list(range(7)), "test": list(range(9))}


def test_test_is_used_where_it_exists_unless_it_has_another_part():
    assert choose({"train": 50, "test": 9}).test.split == "test"
    assert choose({"train": 50, "test": 9}, test=5).test.split == "train"
    assert choose({"train": 50, "test": 9}, validation="test").test is None
    assert choose({"train": 5, "test": 90}, train="test").test is None
    assert choose({"train": 50, "test": 9}, validation=None).validation is None


def test_evaluation_limit_takes_rows_from_all_over_a_split():
    found = choose({"train": 2000, "test": 1000}, validation=300, evaluation_limit=200)
    assert len(found.validation.ids) == len(found.test.ids) == 200
    assert 350 < np.mean(found.test.ids) < 650
    assert set(found.validation.ids) < set(choose({"train": 2000}, validation=300).validation.ids)
    assert len(found.train.ids) == 1700
    assert len(choose({"train": 50, "test": 9}, evaluation_limit=30).test.ids) == 9


def test_the_permutation_is_pinned():
    """A teacher trained last year must not have seen this year's test rows."""
    assert permutation(10, 0, "train").tolist() == [3, 8, 1, 4, 2, 5, 0, 6, 7, 9]
    first, second = permutation(50_000, 0, "train"), permutation(50_000, 0, "test")
    assert sorted(first.tolist()) == list(range(50_000))
    assert (first == second).mean() < 0.001


@pytest.mark.parametrize(
    ("sizes", "options", "message"),
    [
        (50, {"limit": 46}, r"data.limit is 46, but 45 rows are left.*50 of 'train', 5 held out"),
        (50, {"validation": 0.001}, r"data.validation is 0.001: of 50 rows of 'train' that is none.*0.02"),
        (50, {"validation": 50}, r"50 of the 50 rows left of 'train' would leave none to train on"),
        (50, {"validation": 0.5, "test": 0.5}, r"data.validation is 0.5: 25 of the 25 rows left"),
        ({"train": 0}, {}, r"the split 'train' of somewhere has no rows"),
        ({"train": 9, "dev": 0}, {"validation": "dev"}, r"'dev' of somewhere has no rows"),
        (
            {"train": 9, "dev": 3},
            {"validation": "val"},
            r"no validation split 'val'; the data has train, dev",
        ),
        ({"training": 9}, {}, r"no train split 'train'; the data has training; set data.train"),
        (9, {"validation": "train"}, r"data.validation is 'train', the training split itself"),
        ({"train": 9, "dev": 3}, {"validation": "dev", "test": "dev"}, r"both the split 'dev'"),
    ],
)
def test_errors_give_the_numbers(sizes, options, message):
    with pytest.raises(DataError, match=message):
        choose(sizes, **options)
