"""Packing: every sample once, within the limits, and close to the fewest rows."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from isthmus.data.pack import pack
from isthmus.types import DataError

SAMPLES = st.lists(st.tuples(st.integers(1, 50), st.integers(0, 3)), max_size=60)


@given(SAMPLES, st.integers(50, 120), st.one_of(st.none(), st.integers(3, 6)))
def test_every_sample_once_and_within_the_limits(samples, max_length, max_images):
    lengths, images = [s[0] for s in samples], [s[1] for s in samples]
    rows = pack(lengths, images, max_length, max_images)
    assert sorted(index for row in rows for index in row) == list(range(len(samples)))
    for row in rows:
        assert row and sum(lengths[index] for index in row) <= max_length
        assert max_images is None or sum(images[index] for index in row) <= max_images


@given(st.lists(st.integers(1, 100), min_size=1, max_size=80))
def test_rows_are_close_to_the_fewest(lengths):
    rows = pack(lengths, [0] * len(lengths), 100)
    fewest = -(-sum(lengths) // 100)
    assert fewest <= len(rows) <= 2 * fewest  # fitted, any two rows together hold more than one row could


@given(SAMPLES.filter(bool), st.integers(1, 70))
def test_there_are_as_many_rows_as_asked_for_and_none_is_empty(samples, least):
    lengths, images = [s[0] for s in samples], [s[1] for s in samples]
    rows = pack(lengths, images, 80, 4, least)
    assert len(rows) >= min(least, len(samples)) and all(rows)
    assert sorted(index for row in rows for index in row) == list(range(len(samples)))
    assert all(sum(lengths[i] for i in row) <= 80 and sum(images[i] for i in row) <= 4 for row in rows)


def test_rows_are_level():
    lengths = [10 + index * 7919 % 190 for index in range(64)]
    sums = [sum(lengths[index] for index in row) for row in pack(lengths, [0] * 64, 2048)]
    assert min(sums) > 0.97 * max(sums)


def test_by_hand():
    # Descending 7 6 4 3 2: 7 and 6 open rows, 4 and 3 fill them, 2 opens a third; levelled, 7 | 6 2 | 4 3.
    assert pack([2, 3, 4, 6, 7], [0] * 5, 10) == [[4], [3, 0], [2, 1]]
    # 6 5 | 5 4 as fitted; levelled, 6 4 | 5 5.
    assert pack([6, 5, 5, 4], [0] * 4, 11) == [[0, 3], [1, 2]]
    # 4 4 | 3 3 2 fill two rows of 8 exactly, dealt out they would be 4 3 2 | 4 3: the rows stay as they were fitted.
    assert pack([4, 4, 3, 3, 2], [0] * 5, 8) == [[0, 1], [2, 3, 4]]
    assert pack([5, 4], [2, 1], 10, max_images=2) == [[0], [1]]
    assert pack([], [], 10) == []
    assert pack([5, 1, 1], [0] * 3, 10, least=2) == [[0], [1, 2]]
    assert pack([4, 4, 3, 3, 2], [0] * 5, 8, least=3) == [[0, 4], [1], [2, 3]]
    assert pack([5, 1], [0] * 2, 10, least=7) == [[0], [1]]


def test_what_fits_no_row_is_refused():
    with pytest.raises(DataError, match="sample 1 has 11 tokens"):
        pack([1, 11], [0, 0], 10)
    with pytest.raises(DataError, match="sample 0 has 3 pictures"):
        pack([1], [3], 10, max_images=2)
