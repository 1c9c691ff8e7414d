"""Whole samples into rows of limited length: best-fit decreasing, which needs at most about 11/9 of the fewest rows."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence

from isthmus.types import DataError


def pack(
    lengths: Sequence[int], images: Sequence[int], max_length: int, max_images: int | None = None
) -> list[list[int]]:
    """Indices of samples by row. A sample is never split; each goes where it leaves the least room.

    Args:
        lengths: tokens of each sample.
        images: media of each sample.
        max_length: tokens that a row holds.
        max_images: media that a row holds; None is no limit.

    Raises:
        DataError: a sample alone is too long or has too many media.
    """
    for index, (length, seen) in enumerate(zip(lengths, images, strict=True)):
        if length > max_length:
            raise DataError(f"sample {index} has {length} tokens, a row holds {max_length}", "raise max_length")
        if max_images is not None and seen > max_images:
            raise DataError(f"sample {index} has {seen} pictures, a row holds {max_images}", "raise max_images")
    rows: list[list[int]] = []
    pictures: list[int] = []
    room: list[tuple[int, int]] = []  # (tokens left, row), ascending: the tightest fit comes first
    for index in sorted(range(len(lengths)), key=lambda index: (-lengths[index], index)):
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
