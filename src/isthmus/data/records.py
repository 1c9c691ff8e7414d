"""A user's data as samples that are read one by one from where they stand in it.

Everything is checked once. What is kept of that is where each record starts and ends, beside the other caches, so
opening data again takes milliseconds, and memory holds no sample that is not being used. Records that are joined from
several places are kept as a copy.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Iterator
from hashlib import blake2b
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any, BinaryIO, cast

from isthmus.assets import home
from isthmus.data import containers, formats, indexes, jsons, video
from isthmus.data.faults import SHOWN, Fault, readable, refuse
from isthmus.data.folders import called
from isthmus.data.indexes import Chosen, Index, Part
from isthmus.data.jsons import Place
from isthmus.data.media import open_image
from isthmus.files import replacing
from isthmus.types import ConfigError, DataError, Image, Sample, Video

SEEN = 8
"""Frames by which a video is judged whose reader chooses their number."""
READING = 7
"""Raised when the same files are read as other samples than before, or other samples are held out."""
HASHED = 1 << 30
"""Bytes of a file that is read whole to know whether its content has changed."""


class Records:
    """The samples of a part of a file or folder.

    Args:
        part: one picture in fifty is `held out` with all that is said of it, and of samples without any one in fifty
            (see `_lot`); the others are `kept`; `all` is both. A handful of samples leaves nothing to hold out:
            both parts are then the whole file.

    Raises:
        ConfigError: a part is to be trained on, and the data hold several splits of their publisher's; or those that
            `rows` names are not there.
        DataError: a record is faulty, unless such are to be skipped; the first faults and their number are named. Or
            something cannot be read, or what is known of it cannot be kept.
    """

    def __init__(self, form: formats.Form, part: Part = "all"):
        self.form = form
        self.container = form.opened()
        with readable(form.path):
            self._index, self.copy = _kept(form, self.container)
        self.skipped, self.splits = self._index.skipped, self._index.splits
        if part != "all" and form.options.rows is None and len(self.splits) > 1:
            likely = min(self.splits, key=lambda name: not name.startswith("train"))
            remedy = f"say which to train on: options: {{rows: {likely}}}, or a list of several"
            raise ConfigError(f"{form.path} holds the splits {', '.join(self.splits)}", remedy)
        self._chosen = Chosen(self._index, part)

    def __len__(self) -> int:
        return len(self._chosen)

    def __getitem__(self, number: int) -> Sample:
        place, part = self._index.place(self._chosen[number])
        with readable(self.form.path):
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
    """What is wrong with the pictures and videos of a sample, if anything."""
    for medium in record.sample.media:
        try:
            if isinstance(medium, Image):
                open_image(medium.source)
            elif isinstance(medium, Video):
                video.decoded(medium.source, medium.frames or SEEN, medium.span)
        except DataError as error:
            return Fault(record.line, record.sample.id, error.cause, error.remedy, record.file)
    return None


def stamp(form: formats.Form, container: containers.Container) -> str:
    """Sixteen hex digits that change whenever the files do, or how they are read."""
    with readable(form.path):
        states = [(str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns) for file in container.files()]
    told = (states, str(form.images and form.images.resolve()), form.options.model_dump_json(), version("isthmus"))
    return hashlib.sha256(repr((READING, *told)).encode()).hexdigest()[:16]


def content(form: formats.Form, container: containers.Container) -> str:
    """Hex digits that change with what the files are called and hold, wherever they lie and whenever they were written.

    Files beyond `HASHED` bytes are known by their size.
    """
    digest = hashlib.sha256()
    with readable(form.path):
        for path in container.files():
            size = path.stat().st_size
            digest.update(os.fsencode(f"{called(path, form.path)} {size} "))
            if size <= HASHED:
                with path.open("rb") as file:
                    digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()[:16]


def _kept(form: formats.Form, container: containers.Container) -> tuple[Index, Path | None]:
    """What reading everything through tells, from the cache if it was read before; and the copy, if one is needed."""
    if not form.path.exists():
        refuse(form.path, [found for found in formats.each(form) if isinstance(found, Fault)], 0)
    cached = home() / "indexes" / f"{stamp(form, container)}.index"
    copy = cached.with_suffix(".jsonl") if container.copied else None
    if copy is None or copy.is_file():
        with contextlib.suppress(OSError, ValueError):  # none yet, or a damaged one
            index = indexes.load(cached)
            _used(cached, copy)
            return index, copy
    with contextlib.ExitStack() as open_files:
        told = None if copy is None else open_files.enter_context(_replaced(copy))
        try:
            stream = open_files.enter_context(_replaced(cached))
        except OSError:  # a cache, not a promise
            stream = cast(BinaryIO, open_files.enter_context(TemporaryFile()))
        _read(form, indexes.Writer(stream), told)
        return indexes.load(stream), copy


def _read(form: formats.Form, rows: indexes.Writer, copy: BinaryIO | None) -> None:
    """Read everything once; write the rows of the index, and the records if they are to be copied."""
    faults, at = list[Fault](), 0
    skip = form.options.faults == "skip"
    for container, place, raw in formats.scan(form):
        stands = place
        if copy is not None and not isinstance(raw, Exception):
            written = containers.copied(raw).encode()
            stands, at = Place(place.shard, place.line, at, at + len(written) - 1), at + len(written)
            copy.write(written)
        for one in formats.parsed(raw, place, container, form):
            fault = damaged(one) if skip and isinstance(one, formats.Record) else None
            fault = one if isinstance(one, Fault) else fault
            if fault is not None:
                rows.skipped += 1
                faults += [fault] * (not skip or len(faults) < SHOWN)
            elif isinstance(one, formats.Record):
                rows.add(stands, one.part, _lot(one.sample, form.folder))
            if not isinstance(one, Fault) and one.split is not None:
                rows.splits[one.split] = None
    if not faults:
        formats.confirm(form, rows.splits)
    refuse(form.path, [] if skip and rows.samples else faults, rows.samples)
    rows.finish()


def _used(*files: Path | None) -> None:
    """Note that files were of use now: `isthmus data clean` goes by that."""
    with contextlib.suppress(OSError):  # somebody else's
        for file in filter(None, files):
            os.utime(file)


def _lot(sample: Sample, folder: Path) -> int:
    """The lot by which a sample may be held out: a hash of its first medium's path below `folder`, of its bytes, or
    without a medium of the id.

    So all that is said of a picture is on the same side, wherever the data lie.
    """
    key: str | bytes = sample.id
    for medium in sample.media[:1]:
        source = medium.source.clip.source if isinstance(medium.source, video.Frame) else medium.source
        if isinstance(source, bytes):
            key = source
        elif isinstance(source, str | Path):
            path = Path(source)
            key = (path.relative_to(folder) if path.is_relative_to(folder) else path).as_posix()
    told = key.encode("utf-8", "replace") if isinstance(key, str) else key
    return int.from_bytes(blake2b(told, digest_size=4).digest())


@contextlib.contextmanager
def _replaced(file: Path) -> Iterator[BinaryIO]:
    """A file to write and read, put in its place once it is whole."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with replacing(file) as part, part.open("w+b") as stream:
        yield stream
