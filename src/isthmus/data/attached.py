"""What a record brings along beside its words: pictures, videos and regions, and where they may come from."""

from __future__ import annotations

import base64
import binascii
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from os.path import normpath
from pathlib import Path, PurePath
from typing import Any, Literal, TypeAlias
from urllib.parse import unquote, urlsplit

import numpy as np
from PIL import Image as Pillow
from torch import Tensor

from isthmus.data import slips
from isthmus.data.faults import Wrong
from isthmus.data.media import upright_size
from isthmus.types import Box, DataError, Drawn, Image, Part, Source, Text, Video

IMAGE, VIDEO, REGION, NAMED = "<image>", "<video>", "<bbox>", "<ref-object>"
"""What stands in a text for the record's next picture, video, region, and the words of a region."""
MARKERS = (IMAGE, VIDEO, REGION, NAMED)
FOREIGN = re.compile(r"<audio>|<img>[^<]*</img>")
"""Other toolkits' markers, which would be learnt as words here."""
LISTS = {IMAGE: ("picture", "images", "image"), VIDEO: ("video", "videos", "video")}
"""What a marker stands for, and the keys of a record that list it."""
NETWORK = ("http://", "https://", "ftp://")
SLACK = 0.01
"""So far outside its picture a region may reach, as a share of the picture's side, and is cut: annotators round."""

Unit: TypeAlias = Literal["pixels", "thousandths", "shares"]
"""What the numbers of a region count: pixels of the picture, thousandths of its sides, or shares of them (0 to 1)."""


@dataclass(frozen=True)
class Shelf:
    """Where a file's pictures are.

    Args:
        folder: relative paths start from here.
        confined: nothing outside of it is read: no absolute path, no way out by `..`.
        held: pictures that came with the record, by name.
        unit: of regions that do not say theirs.
    """

    folder: Path
    confined: bool
    unit: Unit
    held: Mapping[str, bytes] = field(default_factory=dict)

    def find(self, given: Any, what: str = "picture") -> Path | bytes:
        """The file that a record names, or the bytes that it brings.

        Raises:
            Wrong: there is none, or it lies where it must not.
        """
        if isinstance(given, Mapping) and isinstance(given.get("paths"), list):  # names in use: the one that is there
            given = next(filter(self._there, given["paths"]), next(iter(given["paths"]), None))
        elif isinstance(given, Mapping):  # as `datasets` and Parquet hold pictures
            given = given.get("bytes") or given.get("path")
        if isinstance(given, bytes):
            return given
        if not isinstance(given, str) or not given:
            raise Wrong(f"a {what} is not named by a text", "write its path")
        if given in self.held:
            return self.held[given]
        if given.startswith("file://"):
            given = unquote(urlsplit(given).path)
        if given.startswith(NETWORK):
            raise Wrong(f"{given[:80]} lies on the network", f"download it into the {what}s folder and write its path")
        if given.startswith("data:"):
            return _data_url(given)
        return self._file(given, what)

    def _file(self, given: str, what: str) -> Path:
        relative = PurePath(given)
        if self.confined and (relative.is_absolute() or PurePath(normpath(given)).parts[:1] == ("..",)):
            raise Wrong(f"{given} lies outside the images folder", "write a path below it")
        if not self._there(given):
            remedy = "check the path and the images folder"
            raise Wrong(f"no {what} {given} in {self.folder}", remedy, missing=given)
        return self.folder / relative

    def _there(self, given: Any) -> bool:
        try:
            return isinstance(given, str) and (self.folder / given).is_file()
        except OSError:  # such as a name that is too long
            return False


class InMemory:
    """Media are part of the messages themselves, and `<image>` in a text is a text."""

    def text(self, text: str) -> list[Part]:
        return [Text(text)] if text else []

    def next(self, marker: str, place: Any = None) -> Part:
        raise Wrong("an image part holds no picture", "give a path, bytes, a data URL or an open picture")

    def picture(self, given: Any) -> Source:
        if isinstance(given, str) and given.startswith("data:"):
            return _data_url(given)
        if isinstance(given, np.ndarray | Tensor):
            return Image(given).source  # type: ignore[arg-type]
        if not isinstance(given, str | Path | bytes | Pillow.Image | Drawn):
            raise Wrong("an image part holds no picture", "give a path, bytes, a data URL or an open picture")
        return given

    def video(self, given: Any) -> Video:
        source = given.get("path") if isinstance(given, Mapping) else given
        if not isinstance(source, str | Path | bytes):
            raise Wrong("a video part holds no video", "give a path or bytes")
        return Video(source, span=_span(given))

    def region(self, item: Mapping[str, Any]) -> Box:
        slips.refuse(item, slips.REGION)
        return _box(item.get("box"), item.get("label", ""), item.get("unit", "shares"), None)


class Attached:
    """A record's media and regions, handed out one per marker in its texts."""

    def __init__(self, record: Mapping[str, Any], shelf: Shelf) -> None:
        if any(isinstance(one, str | bytes | Mapping) for one in _several(record, "audios", "audio")):
            raise Wrong("the record brings sound, which is not read", "leave it out")
        self.shelf = shelf
        self.last: Source | None = None
        """The latest picture: the one that regions are in."""
        find: dict[str, Callable[[Any], Image | Video]] = {
            IMAGE: lambda given: Image(self.picture(given)),
            VIDEO: self.video,
        }
        self._listed = {
            marker: [find[marker](given) for given in _several(record, *keys)] for marker, (_, *keys) in LISTS.items()
        }
        self._regions = _Objects.of(record.get("objects"), shelf.unit)
        self._placed = {IMAGE: 0, VIDEO: 0, REGION: 0, NAMED: 0}

    def text(self, text: str) -> list[Part]:
        """The text cut at its markers; that they are as many as what they stand for is checked at the end.

        Raises:
            Wrong: it holds another toolkit's marker.
        """
        if foreign := FOREIGN.search(text):
            remedy = f"list pictures in images, and write {IMAGE} for each; leave records with sound out"
            raise Wrong(f"{foreign[0][:80]} would be learnt as a word", remedy)
        parts: list[Part] = []
        words = [word for word in _cut(text, MARKERS) if word]
        label = ""
        for word, following in zip(words, [*words[1:], ""]):
            if word in (IMAGE, VIDEO):
                parts.append(self._medium(word))
            elif word == NAMED:
                name = self._regions.name(self._next(NAMED))
                label = name if following == REGION else ""
                parts += [] if label else [Text(name)]
            elif word == REGION:
                parts.append(replace(self._box(self._next(REGION)), label=label))
                label = ""
            else:
                parts.append(Text(word))
        return parts

    def check_counts(self) -> None:
        """Raise where markers and what they stand for do not match.

        Raises:
            Wrong: with both counts.
        """
        for marker, listed in self._listed.items():
            placed, (what, key, _) = self._placed[marker], LISTS[marker]
            if placed != len(listed):
                more = f"list what it stands for in {key}, or spell the word otherwise"
                fewer = "most often at the start of the first question, which options: {prepend: true} does"
                raise Wrong(
                    f"{placed} {marker} in the text, {len(listed)} {what}s",
                    f"write {marker} once per {what}, where it belongs; {more if placed > len(listed) else fewer}",
                )
        self._regions.check(self._placed[REGION], self._placed[NAMED])

    def next(self, marker: str, place: Any = None) -> Part:
        """The record's next picture or video, which a part of content may stand for as a marker in a text does.

        Raises:
            Wrong: it is to be another than the next, by its number.
        """
        if place is not None and place != self._placed[marker]:
            raise Wrong(f"a part is number {str(place)[:20]} of {LISTS[marker][1]}, out of order", "list them in order")
        return self._medium(marker)

    def unplaced(self) -> list[Part]:
        """The record's pictures and videos, of each kind of which none has been handed out."""
        return [self._medium(marker) for marker, some in self._listed.items() if not self._placed[marker] for _ in some]

    def picture(self, given: Any) -> Path | bytes:
        found = self.shelf.find(given)
        self.last = found
        return found

    def video(self, given: Any) -> Video:
        return Video(self.shelf.find(given, "video"), span=_span(given))

    def region(self, item: Mapping[str, Any]) -> Box:
        """A region that is a part of a message's content."""
        slips.refuse(item, slips.REGION)
        return _box(item.get("box"), item.get("label", ""), item.get("unit", self.shelf.unit), self.last)

    def _next(self, marker: str) -> int:
        self._placed[marker] += 1
        return self._placed[marker] - 1

    def _medium(self, marker: str) -> Part:
        listed, place = self._listed[marker], self._next(marker)
        part = listed[place] if place < len(listed) else Image(b"")
        self.last = part.source
        return part

    def _box(self, place: int) -> Box:
        if place >= len(self._regions.boxes):
            return Box((0, 0, 0, 0))
        xyxy, unit, picture = self._regions.box(place)
        pictures = self._listed[IMAGE]
        source = self.last if picture is None else pictures[picture].source if picture < len(pictures) else None
        return _box(xyxy, "", unit, source)


@dataclass(frozen=True)
class _Objects:
    """ms-swift's `objects`: `bbox`, the words `ref`, `bbox_type`, and `image_id` where pictures are several."""

    boxes: Sequence[Any] = ()
    names: Sequence[Any] = ()
    unit: Unit = "pixels"
    pictures: Sequence[Any] = ()

    @classmethod
    def of(cls, given: Any, unit: Unit) -> _Objects:
        if given is None:
            return cls()
        given = full(given) if isinstance(given, Mapping) else {"bbox": None}
        lists = {key: given.get(key, []) for key in ("bbox", "ref", "image_id")}
        if not all(isinstance(one, list) for one in lists.values()):
            raise Wrong("objects does not hold lists", 'write {"ref": ["a dog"], "bbox": [[x1, y1, x2, y2]]}')
        units: dict[Any, Unit] = {None: unit, "real": "pixels", "norm1": "shares"}
        kind = given.get("bbox_type")
        if not isinstance(kind, str | None) or kind not in units:
            raise Wrong(f"unknown bbox_type {str(kind)[:40]!r}", "write real (pixels) or norm1 (shares of the sides)")
        return cls(lists["bbox"], lists["ref"], units[kind], lists["image_id"])

    def name(self, place: int) -> str:
        name = self.names[place] if place < len(self.names) else ""
        if not isinstance(name, str):
            raise Wrong("a ref of objects is not a text", "write the words that the region shows")
        return name

    def box(self, place: int) -> tuple[Any, Unit, int | None]:
        picture = self.pictures[place] if place < len(self.pictures) else None
        if not isinstance(picture, int | None):
            raise Wrong("an image_id of objects is not a number", "write which picture, from 0")
        return self.boxes[place], self.unit, picture

    def check(self, regions: int, names: int) -> None:
        for marker, placed, listed in ((REGION, regions, self.boxes), (NAMED, names, self.names)):
            if placed != len(listed):
                raise Wrong(
                    f"{placed} {marker} in the text, {len(listed)} in objects",
                    f"write {marker} once per {'bbox' if marker == REGION else 'ref'}, in their order",
                )


def _span(given: Any) -> tuple[float, float] | None:
    """The seconds of a video that are meant, where a record says `{"path": …, "span": [start, end]}`."""
    said = given.get("span") if isinstance(given, Mapping) else None
    if said is None:
        return None
    try:
        start, end = (float(number) for number in said)
    except (TypeError, ValueError):
        start, end = 0.0, 0.0
    if not 0 <= start < end < math.inf:
        raise Wrong(f"the span of a video is no stretch of time: {str(said)[:60]}", "write [start, end] in seconds")
    return start, end


def corners(numbers: Any) -> tuple[float, float, float, float]:
    """Four finite numbers.

    Raises:
        Wrong: it is something else.
    """
    try:
        x1, y1, x2, y2 = (float(number) for number in numbers)
    except (TypeError, ValueError):
        raise Wrong(f"a region is not four numbers: {str(numbers)[:60]}", "write [x1, y1, x2, y2]") from None
    if not all(map(math.isfinite, (x1, y1, x2, y2))):
        raise Wrong("a region holds a number that is not finite", "write [x1, y1, x2, y2]")
    return x1, y1, x2, y2


def shares(numbers: Any, width: float, height: float) -> tuple[float, float, float, float]:
    """Corners in a picture of this size as shares of its sides; what reaches out a little is cut.

    Raises:
        Wrong: no region of the picture.
    """
    x1, y1, x2, y2 = (number / side for number, side in zip(corners(numbers), (width, height, width, height)))
    if x1 > x2 or y1 > y2:
        raise Wrong(f"the region {numbers} ends before it begins", "write [x1, y1, x2, y2], left and top first")
    if min(x1, y1) < -SLACK or max(x2, y2) > 1 + SLACK:
        size = f"{width:g} × {height:g}" if (width, height) not in ((1, 1), (1000, 1000)) else f"0 to {width:g}"
        raise Wrong(
            f"the region {numbers} lies outside {size}",
            "correct it, or say what its numbers count (options: {boxes: pixels | thousandths | shares})",
        )
    x1, y1, x2, y2 = (min(max(number, 0.0), 1.0) for number in (x1, y1, x2, y2))
    if (x1 == x2) != (y1 == y2):
        raise Wrong(f"the region {numbers} has no {'width' if x1 == x2 else 'height'}", "correct it, or remove it")
    return x1, y1, x2, y2


def _box(numbers: Any, label: Any, unit: Any, picture: Source | None) -> Box:
    if not isinstance(label, str):
        raise Wrong("a region's label is not a text", "write the words that it shows")
    width, height = _scale(unit, picture)
    if unit == "pixels" and max(width, height) > 1 and all(abs(number) <= 1 for number in corners(numbers)):
        remedy = "if these are shares of the sides, say so (options: {boxes: shares}, or norm1 as its bbox_type)"
        raise Wrong(f"the region {numbers} is one pixel of {width:g} × {height:g} at most", remedy)
    return Box(shares(numbers, width, height), label)


def _scale(unit: Any, picture: Source | None) -> tuple[float, float]:
    """What a whole side is, of each direction."""
    if unit == "pixels":
        if picture is None or picture == b"":
            raise Wrong("a region comes before its picture", "put the picture first, or count in shares (0 to 1)")
        try:
            return upright_size(picture)
        except DataError as error:
            raise Wrong(error.cause, error.remedy) from None
    scales = {"shares": 1.0, "thousandths": 1000.0}
    if unit not in scales:
        raise Wrong(f"unknown unit {str(unit)[:40]!r}", "write pixels, thousandths or shares")
    return scales[unit], scales[unit]


def _several(record: Mapping[str, Any], *keys: str) -> list[Any]:
    """What stands under the first of the keys that holds something; one thing alone is a list of it."""
    given: Any = next((record[key] for key in keys if record.get(key) not in (None, "", [], ())), [])
    return list(given) if isinstance(given, list | tuple) else [given]


def full(record: Mapping[str, Any]) -> dict[str, Any]:
    """A record without what is null in it, which is what tables write where a row has not what others have."""
    return {key: value for key, value in record.items() if value is not None}


def _cut(text: str, markers: Sequence[str]) -> list[str]:
    """The text's pieces, markers among them."""
    pieces = [text]
    for marker in markers:
        pieces = [
            part
            for piece in pieces
            for place, between in enumerate([piece] if piece in markers else piece.split(marker))
            for part in ([marker] * bool(place) + [between])
        ]
    return pieces


def _data_url(given: str) -> bytes:
    header, comma, payload = given.partition(",")
    try:
        if not comma or not header.endswith(";base64"):
            raise ValueError
        return base64.b64decode(payload, validate=True)
    except (ValueError, binascii.Error):
        raise Wrong("a data URL is not base64", "write data:image/png;base64,…") from None
