"""What was made last is kept at hand: as many results as are worth it, and no more bytes than there is room for."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

from isthmus.types import Medium, Sample

Key = TypeVar("Key", bound=Hashable)
Value = TypeVar("Value")


class Recent(Generic[Key, Value]):
    """A function that remembers its latest results.

    Args:
        make: the function.
        most: results that are remembered.
        weigh: bytes that a result holds, and `room` for those of all of them.
    """

    def __init__(
        self, make: Callable[[Key], Value], most: int, weigh: Callable[[Value], int] = lambda value: 0, room: int = 0
    ) -> None:
        self._make, self._most, self._weigh, self._room = make, most, weigh, room
        self._known: OrderedDict[Key, Value] = OrderedDict()
        self._weight = 0

    def __call__(self, key: Key) -> Value:
        if key in self._known:
            self._known.move_to_end(key)
            return self._known[key]
        value = self._known[key] = self._make(key)
        self._weight += self._weigh(value)
        while len(self._known) > self._most or self._weight > self._room:
            self._weight -= self._weigh(self._known.popitem(last=False)[1])
        return value


def held(sample: Sample) -> int:
    """Bytes of the pictures and videos that a sample brings along, as those of tars and tables do."""
    return sum(map(weight, sample.media))


def weight(medium: Medium) -> int:
    """Bytes that a medium brings along; none where it names a file."""
    return len(medium.source) if isinstance(medium.source, bytes) else 0
