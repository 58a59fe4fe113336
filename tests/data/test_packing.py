"""pack: every token once, no row too long, no room wasted that a whole piece would fill; answers are never split."""

from __future__ import annotations

import random
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tutelage.data import DataError
from tutelage.data.packing import Layout, pack

lengths = st.lists(st.integers(0, 40), min_size=1, max_size=40).filter(any).map(np.array)
longest = st.integers(2, 24)


def places(layout: Layout) -> list[list[tuple[int, int]]]:
    """(document, position) of each token, row by row."""
    pieces = list(zip(layout.document, layout.start, layout.length, strict=True))
    return [
        [(int(d), int(s) + k) for d, s, n in pieces[a:b] for k in range(n)]
        for a, b in zip(layout.first[:-1], layout.first[1:], strict=True)
    ]


def documents(counts: np.ndarray) -> Counter[tuple[int, int]]:
    return Counter((number, place) for number, count in enumerate(counts) for place in range(count))


@given(lengths, longest, st.sampled_from(["best_fit", "wrapped"]))
def test_every_token_stands_in_one_row_and_no_row_is_too_long(
    counts: np.ndarray, most: int, how: str
) -> None:
    layout = pack(counts, most, how)
    rows = places(layout)
    assert Counter(place for row in rows for place in row) == documents(counts)
    assert all(1 <= len(row) <= most for row in rows)
    assert layout.lost == 0
    assert layout.fill == pytest.approx(counts.sum() / (len(rows) * most))


@given(lengths, longest)
def test_best_fit_keeps_documents_whole_and_leaves_no_two_rows_that_fit_in_one(
    counts: np.ndarray, most: int
) -> None:
    layout = pack(counts, most, "best_fit")
    pieces = np.bincount(layout.document, minlength=len(counts))
    assert (pieces == -(-counts // most)).all()
    filled = sorted(map(len, places(layout)))
    assert len(filled) == 1 or filled[0] + filled[1] > most


@given(lengths, longest)
def test_wrapped_rows_are_the_documents_joined_and_cut(counts: np.ndarray, most: int) -> None:
    joined = [(number, place) for number, count in enumerate(counts) for place in range(count)]
    expected = [joined[start : start + most] for start in range(0, len(joined), most)]
    assert places(pack(counts, most, "wrapped")) == expected


@given(lengths, longest)
def test_without_packing_a_row_is_a_documents_beginning(counts: np.ndarray, most: int) -> None:
    layout = pack(counts, most, "none")
    expected = [
        [(number, k) for k in range(min(count, most))] for number, count in enumerate(counts) if count
    ]
    assert places(layout) == expected
    assert layout.lost == counts.sum() - sum(map(len, expected))


@given(lengths, longest, st.sampled_from(["best_fit", "wrapped", "none"]), st.randoms())
def test_only_documents_of_one_group_share_a_row(
    counts: np.ndarray, most: int, how: str, draw: random.Random
) -> None:
    groups = np.array([draw.randrange(3) for _ in counts])
    layout = pack(counts, most, how, groups)
    for row in places(layout):
        assert len({groups[document] for document, _ in row}) == 1
    for group in set(groups[counts > 0].tolist()):
        alone = pack(np.where(groups == group, counts, 0), most, how)
        mine = [row for row in places(layout) if groups[row[0][0]] == group]
        assert mine == places(alone)


@given(lengths, longest, st.sampled_from(["best_fit", "wrapped", "none"]))
def test_it_is_the_same_every_time(counts: np.ndarray, most: int, how: str) -> None:
    assert places(pack(counts, most, how)) == places(pack(counts, most, how))


@given(lengths, longest, st.sampled_from(["best_fit", "wrapped", "none"]), st.randoms())
def test_of_documents_with_answers_each_row_holds_beginnings_that_reach_into_what_is_learnt(
    counts: np.ndarray, most: int, how: str, draw: random.Random
) -> None:
    learnt = np.array([draw.randint(min(1, count), count) for count in counts.tolist()])
    standing = [number for number, count in enumerate(counts) if learnt[number] < min(count, most)]
    if not standing:
        with pytest.raises(DataError, match=r"nothing counts in any document|begins after data\.max_length"):
            pack(counts, most, how, learnt=learnt)
        return
    layout = pack(counts, most, how, learnt=learnt)
    expected = Counter((number, place) for number in standing for place in range(min(counts[number], most)))
    assert Counter(place for row in places(layout) for place in row) == expected
    assert len(layout.document) == len(standing)
    assert all(1 <= len(row) <= most for row in places(layout))
    assert layout.lost == counts[learnt < counts].sum() - expected.total()


def test_wrapped_begins_a_row_with_a_document_that_would_cross_its_end() -> None:
    counts = np.array([3, 4, 9, 1, 2])
    layout = pack(counts, 8, "wrapped", learnt=np.array([1, 1, 1, 1, 1]))
    assert [sorted({number for number, _ in row}) for row in places(layout)] == [[0, 1], [2], [4]]
    assert layout.lost == 1


def test_documents_of_which_nothing_is_learnt_are_refused() -> None:
    counts = np.array([5, 9])
    with pytest.raises(DataError, match="nothing counts in any document"):
        pack(counts, 8, "best_fit", learnt=counts)
    with pytest.raises(DataError, match=r"begins after data\.max_length, 8 tokens; raise it"):
        pack(counts, 8, "best_fit", learnt=np.array([5, 8]))


def test_rows_of_many_short_documents_are_nearly_full() -> None:
    counts = np.random.default_rng(0).integers(5, 300, 20_000)
    assert pack(counts, 512, "best_fit").fill > 0.99


def test_no_tokens_or_an_unknown_way_is_refused() -> None:
    with pytest.raises(DataError, match="every document is empty"):
        pack(np.zeros(3, dtype=np.int64), 8, "best_fit")
    with pytest.raises(DataError, match="'tight' is unknown; allowed: best_fit, wrapped, none"):
        pack(np.ones(3, dtype=np.int64), 8, "tight")
