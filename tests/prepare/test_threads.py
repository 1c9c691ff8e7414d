"""Work side by side: in order, no further ahead than there are threads, and the cores are shared out."""

from __future__ import annotations

import pytest
import torch

from isthmus.prepare import threads
from isthmus.types import DataError


def test_batches_are_drawn_one_per_thread_ahead_and_no_further():
    """All pixels of a large set would not fit into memory."""
    drawn, most, cores = [], 0, torch.get_num_threads()
    for number, result in enumerate(threads.side_by_side(lambda item: drawn.append(item) or item, range(30))):
        assert result == number
        most = max(most, len(drawn))
        drawn.pop(0)
    assert number == 29 and most <= cores + 1 and torch.get_num_threads() == cores


def test_threads_share_the_cores_and_begin_nothing_after_a_failure(monkeypatch):
    monkeypatch.setattr(threads.torch, "get_num_threads", lambda: 4)
    given, begun = [], []
    monkeypatch.setattr(threads.torch, "set_num_threads", given.append)

    def work(item: int) -> None:
        begun.append(item)
        raise DataError("no picture", "leave it out")

    with pytest.raises(DataError):
        list(threads.side_by_side(work, range(100)))
    assert len(begun) <= 2 * 4 and set(given) == {1, 4} and given[-1] == 4
    given.clear()
    assert list(threads.side_by_side(lambda item: item, [7])) == [7] and given == [4, 4], "one batch has all cores"
