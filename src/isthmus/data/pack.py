"""Whole samples into few rows of limited length, and those as equal as can be, so that they pad little in a batch.

Best-fit decreasing finds how many rows are needed, at most about 11/9 of the fewest; dealing the samples out again,
longest first and each to the emptiest row, then levels them.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence

from isthmus.types import DataError


def pack(
    lengths: Sequence[int], images: Sequence[int], max_length: int, max_images: int | None = None, least: int = 1
) -> list[list[int]]:
    """Indices of samples by row. A sample is never split, and no row is empty.

    Args:
        lengths: tokens of each sample.
        images: media of each sample.
        max_length: tokens that a row holds.
        max_images: media that a row holds; None is no limit.
        least: rows that there must be, if there are as many samples.

    Raises:
        DataError: a sample alone is too long or has too many media.
    """
    for index, (length, seen) in enumerate(zip(lengths, images, strict=True)):
        if length > max_length:
            raise DataError(f"sample {index} has {length} tokens, a row holds {max_length}", "raise max_length")
        if max_images is not None and seen > max_images:
            raise DataError(f"sample {index} has {seen} pictures, a row holds {max_images}", "raise max_images")
    rows = _fitted(lengths, images, max_length, max_images)
    level = _levelled(lengths, images, max_length, max_images, max(len(rows), min(least, len(lengths))))
    if level is not None:
        return level
    while len(rows) < min(least, len(lengths)):
        fullest = max(range(len(rows)), key=lambda row: len(rows[row]))
        rows.append(rows[fullest][1::2])
        rows[fullest] = rows[fullest][::2]
    return rows


def _longest_first(lengths: Sequence[int]) -> list[int]:
    return sorted(range(len(lengths)), key=lambda index: (-lengths[index], index))


def _fitted(lengths: Sequence[int], images: Sequence[int], max_length: int, max_images: int | None) -> list[list[int]]:
    """Few rows: each sample goes where it leaves the least room."""
    rows: list[list[int]] = []
    pictures: list[int] = []
    room: list[tuple[int, int]] = []  # (tokens left, row), ascending: the tightest fit comes first
    for index in _longest_first(lengths):
        place = bisect_left(room, (lengths[index], -1))
        while max_images is not None and place < len(room) and pictures[room[place][1]] + images[index] > max_images:
            place += 1
        if place < len(room):
            left, row = room.pop(place)
        else:
            left, row = max_length, len(rows)
            rows.append([])
            pictures.append(0)
        rows[row].append(index)
        pictures[row] += images[index]
        insort(room, (left - lengths[index], row))
    return rows


def _levelled(
    lengths: Sequence[int], images: Sequence[int], max_length: int, max_images: int | None, count: int
) -> list[list[int]] | None:
    """`count` rows of similar length: each sample goes to the emptiest row that it fits; None where it fits none."""
    rows: list[list[int]] = [[] for _ in range(count)]
    tokens, pictures = [0] * count, [0] * count
    for index in _longest_first(lengths):
        held = [pictures[row] + images[index] for row in range(count)]
        fitting = [row for row in range(count) if max_images is None or held[row] <= max_images]
        row = min(fitting, key=tokens.__getitem__, default=None)
        if row is None or tokens[row] + lengths[index] > max_length:
            return None
        rows[row].append(index)
        tokens[row] += lengths[index]
        pictures[row] += images[index]
    return rows
