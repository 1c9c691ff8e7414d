"""A user's file as samples that are read one by one from where they stand in it.

The whole file is checked once. What is kept of that is where each record starts and ends, beside the other caches, so
opening a file again takes milliseconds, and memory holds no sample that is not being used.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Callable
from hashlib import blake2b
from importlib.metadata import version
from pathlib import Path
from typing import Literal

import numpy as np

from isthmus.assets import home
from isthmus.data import formats
from isthmus.types import Sample

LINE, START, END, HELD_OUT = range(4)
"""Columns of an index."""


class Records:
    """The samples of a part of a file.

    Args:
        part: one sample in fifty, chosen by its id, is `held out`; the others are `kept`; `all` is both. A handful
            of samples leaves nothing to hold out: both parts are then the whole file.

    Raises:
        DataError: a record is faulty; the first faults and their number are named.
    """

    def __init__(self, path: Path, images: Path | None, part: Literal["all", "kept", "held out"]):
        self.path, self.images = path, images
        index = _index(path, images)
        if part != "all":
            chosen = index[index[:, HELD_OUT] == (part == "held out")]
            index = chosen if len(chosen) else index
        self._index = index

    def __len__(self) -> int:
        return len(self._index)

    def __getitem__(self, number: int) -> Sample:
        line, start, end, _ = self._index[number].tolist()
        with self.path.open("rb") as stream:  # workers must not share a position in the file
            stream.seek(start)
            return formats.one(stream.read(end - start), line, self.path, self.images)


def stamp(path: Path, images: Path | None) -> str:
    """Sixteen hex digits that change whenever the file does."""
    state = path.stat()
    told = (str(path.resolve()), str(images and images.resolve()), state.st_size, state.st_mtime_ns, version("isthmus"))
    return hashlib.sha256(repr(told).encode()).hexdigest()[:16]


def _index(path: Path, images: Path | None) -> np.ndarray:
    """[samples, 4] numbers, from the cache or from reading all of the file."""
    if not path.is_file():
        return _read(path, images)  # which says what is wrong
    cached = home() / "indexes" / f"{stamp(path, images)}.npy"
    with contextlib.suppress(OSError, ValueError, EOFError):  # none yet, or a damaged one
        return np.load(cached, mmap_mode="r", allow_pickle=False)
    index = _read(path, images)
    with contextlib.suppress(OSError):  # a cache, not a promise
        _replace(cached, lambda part: np.save(part, index))
    return index


def _read(path: Path, images: Path | None) -> np.ndarray:
    rows: list[tuple[int, int, int, int]] = []
    faults: list[formats.Fault] = []
    for found in formats.each(path, images):
        if isinstance(found, formats.Fault):
            faults.append(found)
        else:
            rows.append((found.line, found.start, found.end, _held_out(found.sample.id)))
    formats.refuse(path, faults, len(rows))
    return np.array(rows, np.int64)


def _held_out(name: str) -> bool:
    return blake2b(name.encode()).digest()[0] < 256 // 50


def _replace(file: Path, write: Callable[[Path], None]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_name(f".{os.getpid()}-{file.name}")
    write(part)
    part.replace(file)
