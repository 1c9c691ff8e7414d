"""A user's data as samples that are read one by one from where they stand in it.

Everything is checked once. What is kept of that is where each record starts and ends, beside the other caches, so
opening data again takes milliseconds, and memory holds no sample that is not being used. Records that are joined from
several places are kept as a copy.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from array import array
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from hashlib import blake2b
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal, TextIO

import numpy as np

from isthmus.assets import home
from isthmus.data import containers, formats, jsons
from isthmus.data.faults import SHOWN, Fault, refuse
from isthmus.data.jsons import Place
from isthmus.data.media import open_image
from isthmus.types import DataError, Image, Sample

SHARD, LINE, START, END, PART, HELD_OUT = range(6)
"""Columns of an index."""


class Records:
    """The samples of a part of a file or folder.

    Args:
        part: one sample in fifty, chosen by its id, is `held out`; the others are `kept`; `all` is both. A handful
            of samples leaves nothing to hold out: both parts are then the whole file.

    Raises:
        DataError: a record is faulty, unless such are to be skipped; the first faults and their number are named.
    """

    def __init__(self, form: formats.Form, part: Literal["all", "kept", "held out"] = "all"):
        self.form = form
        self.container = form.opened()
        kept = _kept(form, self.container)
        self.copy, index, self.skipped = kept.copy, kept.index, kept.skipped
        if part != "all":
            chosen = index[index[:, HELD_OUT] == (part == "held out")]
            index = chosen if len(chosen) else index
        self._index = index

    def __len__(self) -> int:
        return len(self._index)

    def __getitem__(self, number: int) -> Sample:
        shard, line, start, end, part, _ = self._index[number].tolist()
        place = Place(shard, line, start, end)
        return formats.sample(self._raw(place), place, part, self.container, self.form)

    def _raw(self, place: Place) -> Any:
        if self.copy is None:
            return self.container.read(place)
        with self.copy.open("rb") as stream:
            stream.seek(place.start)
            return jsons.parse(stream.read(place.end - place.start))


def found(form: formats.Form) -> Iterator[formats.Record | Fault]:
    """What `each` finds, with the pictures opened: what `isthmus data check` tells."""
    for one in formats.each(form):
        fault = damaged(one) if isinstance(one, formats.Record) else None
        yield fault or one


def damaged(record: formats.Record) -> Fault | None:
    """What is wrong with the pictures of a sample, if anything."""
    for medium in record.sample.media:
        if isinstance(medium, Image):
            try:
                open_image(medium.source)
            except DataError as error:
                file = str(record.sample.meta["file"])
                return Fault(record.line, record.sample.id, error.cause, error.remedy, file)
    return None


def stamp(form: formats.Form, container: containers.Container) -> str:
    """Sixteen hex digits that change whenever the files do, or how they are read."""
    states = [(str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns) for file in container.files()]
    told = (states, str(form.images and form.images.resolve()), form.options.model_dump_json(), version("isthmus"))
    return hashlib.sha256(repr(told).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class _Kept:
    """What is known of data from reading it through: [samples, 6] numbers, a copy if need be, how many were skipped."""

    index: np.ndarray
    copy: Path | None
    skipped: int


def _kept(form: formats.Form, container: containers.Container) -> _Kept:
    """From the cache, or from reading everything."""
    if not form.path.exists():
        return _read(form, None)  # which says what is wrong
    cached = home() / "indexes" / f"{stamp(form, container)}.npy"
    copy = cached.with_suffix(".jsonl") if container.copied else None
    if copy is None or copy.is_file():
        with contextlib.suppress(OSError, ValueError, EOFError):  # none yet, or a damaged one
            index = np.load(cached, mmap_mode="r", allow_pickle=False)
            return _Kept(index[1:], copy, int(index[0, 0]))
    if copy is None:
        kept = _read(form, None)
    else:
        copy.parent.mkdir(parents=True, exist_ok=True)
        kept = _replaced(copy, lambda part: _copied(form, part))
    index = np.concatenate([[[kept.skipped] * (HELD_OUT + 1)], kept.index])
    with contextlib.suppress(OSError):  # a cache, not a promise
        cached.parent.mkdir(parents=True, exist_ok=True)
        _replaced(cached, lambda part: _save(part, index))
    return _Kept(kept.index, copy, kept.skipped)


def _copied(form: formats.Form, file: Path) -> _Kept:
    with file.open("w", encoding="utf-8", newline="") as stream:
        return _read(form, stream)


def _save(file: Path, index: np.ndarray) -> None:
    with file.open("wb") as stream:  # numpy would add an ending of its own
        np.save(stream, index)


def _read(form: formats.Form, copy: TextIO | None) -> _Kept:
    """Read everything once; the rows of the index, and the records if they are to be copied."""
    rows, faults, skipped, at = array("q"), list[Fault](), 0, 0
    skip = form.options.faults == "skip"
    for container, place, raw in formats.scan(form):
        start, end = place.start, place.end
        if copy is not None and not isinstance(raw, Exception):
            start, at = at, at + len(written := containers.copied(raw).encode())
            end = at - 1
            copy.write(written.decode())
        for one in formats.parsed(raw, place, container, form):
            fault = damaged(one) if skip and isinstance(one, formats.Record) else None
            fault = one if isinstance(one, Fault) else fault
            if fault is not None:
                skipped += 1
                faults += [fault] * (not skip or len(faults) < SHOWN)
            elif isinstance(one, formats.Record):
                rows.extend((place.shard, place.line, start, end, one.part, _held_out(one.sample.id)))
    index = np.array(rows, np.int64).reshape(-1, HELD_OUT + 1)
    refuse(form.path, [] if skip and len(index) else faults, len(index))
    return _Kept(index, None, skipped)


def _held_out(name: str) -> bool:
    return blake2b(name.encode("utf-8", "replace")).digest()[0] < 256 // 50


def _replaced(file: Path, write: Callable[[Path], Any]) -> Any:
    """Write a file beside its place, then put it there; what `write` returned."""
    part = file.with_name(f".{os.getpid()}-{file.name}")
    try:
        made = write(part)
        part.replace(file)
    finally:
        part.unlink(missing_ok=True)
    return made
