"""What is remembered is bounded in number and in bytes, and the oldest goes first."""

from __future__ import annotations

from isthmus.data.recent import Recent, held
from isthmus.types import Image, Sample, Turn, Video


def test_the_oldest_is_forgotten_first() -> None:
    made: list[int] = []
    recent = Recent(lambda key: made.append(key) or -key, most=2)  # type: ignore[func-returns-value]
    assert [recent(key) for key in (1, 2, 1, 3, 1, 2)] == [-1, -2, -1, -3, -1, -2]
    assert made == [1, 2, 3, 2]


def test_bytes_have_no_more_room_than_they_are_given() -> None:
    made: list[int] = []
    recent = Recent(lambda key: made.append(key) or bytes(key), most=100, weigh=len, room=10)  # type: ignore[func-returns-value]
    for key in (4, 5, 4, 5, 3, 4, 11, 3):
        assert recent(key) == bytes(key)
    assert made == [4, 5, 3, 4, 11, 3]


def test_a_sample_holds_the_bytes_that_it_brings() -> None:
    assert held(Sample((Turn.say("user", Image(b"1234"), Video(b"567"), Image("a.png"), "text"),))) == 7
