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
    assert fewest <= len(rows) <= 2 * fewest  # any two rows together hold more than one row could
    assert sum(sum(lengths[index] for index in row) <= 50 for row in rows) <= 1


def test_by_hand():
    # Descending 7 6 4 3 2: 7 opens, 6 opens, 4 fits 6 exactly, 3 fits 7 exactly, 2 opens.
    assert pack([2, 3, 4, 6, 7], [0] * 5, 10) == [[4, 1], [3, 2], [0]]
    assert pack([5, 4], [2, 1], 10, max_images=2) == [[0], [1]]
    assert pack([], [], 10) == []


def test_what_fits_no_row_is_refused():
    with pytest.raises(DataError, match="sample 1 has 11 tokens"):
        pack([1, 11], [0, 0], 10)
    with pytest.raises(DataError, match="sample 0 has 3 pictures"):
        pack([1], [3], 10, max_images=2)
