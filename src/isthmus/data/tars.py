"""WebDataset's tars: files of one sample stand side by side under one name; nothing is ever extracted.

Headers are walked by hand, so that a member can neither claim more than there is nor bring more than a sample's worth
into memory; links, devices, sparse files and names that lead elsewhere are faults.
"""

from __future__ import annotations

import tarfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import PurePosixPath
from typing import Any, BinaryIO

from isthmus.data import jsons
from isthmus.data.faults import Wrong
from isthmus.data.jsons import Place, Shards, opened
from isthmus.data.media import PICTURES

BLOCK = tarfile.BLOCKSIZE
MOST_FILES = 256
"""Of one sample."""
MOST_BYTES = 256 << 20
"""Of all files of one sample."""
MOST_HEADER = 64 << 10
"""Of a long name or of attributes."""
LONGEST_NAME = 200
"""In messages."""
MEMBERS = "<members>"
"""The key under which a sample's files go along with its record."""
VIDEOS = frozenset({"mp4", "webm", "mkv", "avi", "mov"})
LAYOUTS = frozenset({"conversations", "messages", "texts", "text_list", "task", "question", "regions", "qas"})
"""A sample's JSON that has one of these is a record; otherwise it is notes beside a caption."""


@dataclass(frozen=True)
class _Member:
    """A file in a tar: where its headers start, its contents, and the next header."""

    name: str
    start: int
    data: int
    size: int
    wrong: Wrong | None

    @property
    def end(self) -> int:
        return self.data + -(-self.size // BLOCK) * BLOCK

    @property
    def key(self) -> str:
        """What files of one sample have in common: the path up to the first dot of its last part."""
        path = PurePosixPath(self.name)
        return str(path.parent / path.name.partition(".")[0])

    @property
    def ending(self) -> str:
        return PurePosixPath(self.name).name.partition(".")[2].lower()


class Tars(Shards):
    """Samples in one tar or several."""

    def scan(self) -> Iterator[tuple[Place, Any]]:
        for shard, path in enumerate(self.paths):
            with opened(path) as stream:
                for line, group in enumerate(_groups(_members(stream)), start=1):
                    place = Place(shard, line, group[0].start, group[-1].end)
                    yield place, _record(stream, group)

    def read(self, place: Place) -> Any:
        with self.paths[place.shard].open("rb") as stream:
            stream.seek(place.start)
            part = BytesIO(stream.read(min(place.end - place.start, MOST_BYTES + MOST_FILES * MOST_HEADER)))
        return _record(part, list(_members(part)))

    def held(self, raw: Any) -> Mapping[str, bytes]:
        return raw[MEMBERS]


def _groups(members: Iterator[_Member]) -> Iterator[list[_Member]]:
    group: list[_Member] = []
    for member in members:
        if group and (member.key != group[0].key or len(group) > MOST_FILES):
            yield group
            group = []
        group.append(member)
    if group:
        yield group


def _record(stream: BinaryIO, group: Sequence[_Member]) -> Any:
    """The record of a sample's files, or what is `Wrong` with them."""
    try:
        files = _files(stream, group)
        record = _described(files, PurePosixPath(group[0].key).name)
    except Wrong as wrong:
        return wrong
    named = {name: data for member, data in zip(group, files.values()) for name in _names(member)}
    return {"id": group[0].key, **record, MEMBERS: named}


def _names(member: _Member) -> tuple[str, ...]:
    return member.name, PurePosixPath(member.name).name, member.ending


def _files(stream: BinaryIO, group: Sequence[_Member]) -> dict[str, bytes]:
    """A sample's files by their endings."""
    if len(group) > MOST_FILES or sum(member.size for member in group) > MOST_BYTES:
        raise Wrong(f"{_shown(group[0].key)} has too many files, or too large ones", "split it")
    found: dict[str, bytes] = {}
    for member in group:
        if member.wrong is not None:
            raise member.wrong
        if member.ending in found:
            raise Wrong(f"{_shown(member.name)} is there twice", "remove one of the two")
        stream.seek(member.data)
        found[member.ending] = stream.read(member.size)
    return found


def _described(files: Mapping[str, bytes], key: str) -> dict[str, Any]:
    """A record from a sample's JSON or text, with its pictures and videos where it names none."""
    notes = jsons.parse(files["json"]) if "json" in files else {}
    if isinstance(notes, Wrong):
        raise notes
    if not isinstance(notes, dict):
        raise Wrong(f"{key}.json is not an object", "write one record")
    if not notes.keys() & LAYOUTS:
        notes = {"caption": _caption(files, notes, key)}
    pictures = [ending for ending in files if f".{ending}".endswith(PICTURES)]
    videos = [ending for ending in files if ending in VIDEOS]
    if not notes.keys() & {"image", "images", "video", "videos"}:
        notes |= (
            {"images" if len(pictures) > 1 else "image": pictures if len(pictures) > 1 else pictures[0]}
            if pictures
            else {}
        )
        notes |= {"video": videos[0]} if videos else {}
    return notes


def _caption(files: Mapping[str, bytes], notes: Mapping[str, Any], key: str) -> Any:
    if "txt" in files:
        try:
            return files["txt"].decode("utf-8-sig").strip()
        except UnicodeDecodeError:
            raise Wrong(f"{key}.txt is not UTF-8", "save the text as UTF-8") from None
    for name in ("caption", "text"):
        if name in notes:
            return notes[name]
    raise Wrong(f"{key} has neither a text nor a record", f"add {key}.txt or {key}.json")


# ---------------------------------------------------------------------------------------------- headers


def _members(stream: BinaryIO) -> Iterator[_Member]:
    """Every file of a tar; what cannot be walked on from is the last one, and wrong."""
    stream.seek(0, 2)
    length, at = stream.tell(), 0
    start, attributes = 0, dict[str, str]()
    while at + BLOCK <= length:
        stream.seek(at)
        block = stream.read(BLOCK)
        if not block.strip(b"\0"):
            return
        try:
            header = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
        except tarfile.HeaderError:
            yield _stop(start, at, "the archive is damaged here")
            return
        size, data = int(attributes.get("size", header.size)), at + BLOCK
        if not 0 <= size <= length - data:
            yield _stop(start, at, f"{_shown(header.name)} claims more than the archive holds")
            return
        at = data + -(-size // BLOCK) * BLOCK
        if header.type in (tarfile.XHDTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK):
            if size > MOST_HEADER:
                yield _stop(start, at, "a header is longer than any name")
                return
            attributes |= _attributes(header.type, stream.read(size))
            continue
        name = attributes.get("path", header.name)
        if header.type not in (tarfile.DIRTYPE, tarfile.XGLTYPE):
            clean = name.encode("utf-8", "replace").decode()
            yield _Member(clean, start, data, size, _complaint(header, clean, attributes))
        start, attributes = at, {}


def _attributes(kind: bytes, raw: bytes) -> dict[str, str]:
    """What an extended header says of the next file: its `path`, `size`, and whether it is `sparse`."""
    if kind != tarfile.XHDTYPE:
        key = "path" if kind == tarfile.GNUTYPE_LONGNAME else "linkpath"
        return {key: raw.rstrip(b"\0").decode("utf-8", "surrogateescape")}
    found: dict[str, str] = {}
    while raw:
        digits, _, rest = raw.partition(b" ")
        length = int(digits) if digits.isdigit() and len(digits) < 7 else 0
        if not len(digits) + 1 < length <= len(raw):
            break
        key, _, value = raw[len(digits) + 1 : length - 1].decode("utf-8", "surrogateescape").partition("=")
        if key == "path" or (key == "size" and value.isdecimal() and len(value) < 16):
            found[key] = value
        elif key.startswith("GNU.sparse"):
            found["sparse"] = value
        raw = raw[length:]
    return found


def _complaint(header: tarfile.TarInfo, name: str, attributes: Mapping[str, str]) -> Wrong | None:
    if header.type not in (tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.CONTTYPE) or "sparse" in attributes:
        return Wrong(f"{_shown(name)} is a link, a device or sparse, not a file", "pack the file itself")
    parts = PurePosixPath(name).parts
    if not parts or parts[0] == "/" or ".." in parts or "\0" in name or "\\" in name:
        return Wrong(f"{_shown(name)} leads out of the archive", "pack files under plain relative names")
    return None


def _stop(start: int, at: int, message: str) -> _Member:
    return _Member(f"{at}.damaged", start, at, 0, Wrong(message, "download or pack the archive again"))


def _shown(name: str) -> str:
    return name.encode("utf-8", "replace").decode()[:LONGEST_NAME]
