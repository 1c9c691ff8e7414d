"""Users' own files: LLaVA's JSON and OpenAI-style `messages`, every fault with its line, its id and a remedy.

A file is a JSON array of records or one record per line. A record is LLaVA's
`{id, image | images, conversations: [{from, value}]}` or `{messages: [{role, content}], images}`; `<image>` in a text
is where the next of the record's pictures goes, and `content` may also be a list of text and image parts.
"""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from os.path import normpath
from pathlib import Path, PurePath
from typing import Any, TypeAlias

from PIL import Image as Pillow

from isthmus.types import DataError, Drawn, Image, Part, Role, Sample, Source, Text, Turn

MARKER = "<image>"
ROLES: dict[str, Role] = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
}
SHOWN = 3
"""So many faults are spelled out when a file is refused."""
NETWORK = ("http://", "https://", "ftp://")


@dataclass(frozen=True)
class Fault:
    """What is wrong with one record, where it starts, and how to repair it. `line` counts from 1."""

    line: int
    id: str
    message: str
    remedy: str

    def __str__(self) -> str:
        name = f" ({self.id})" if self.id else ""
        return f"line {self.line}{name}: {self.message}"


def load(path: Path, images: Path | None = None) -> list[Sample]:
    """All conversations of a file. Relative picture paths start from `images`, or from the file's own folder.

    With `images` given, pictures lie below it: no absolute paths, no way out by `..`.

    Raises:
        DataError: any record is faulty; the first faults and their number are named.
    """
    found = list(each(path, images))
    samples = [record.sample for record in found if isinstance(record, Record)]
    refuse(path, [fault for fault in found if isinstance(fault, Fault)], len(samples))
    return samples


def refuse(path: Path, faults: Sequence[Fault], samples: int) -> None:
    """Raise what is wrong with a file, if anything.

    Raises:
        DataError: it has faults, or no sample.
    """
    if faults:
        shown = "; ".join(map(str, faults[:SHOWN]))
        more = f" … {len(faults)} faults in all" if len(faults) > SHOWN else ""
        raise DataError(f"{path}: {shown}{more}", f"{faults[0].remedy}; `isthmus data check` lists every fault")
    if not samples:
        raise DataError(f"{path}: holds no conversation", "give it at least one record")


def check(path: Path, images: Path | None = None) -> list[Fault]:
    """Every faulty record of a file, in order; empty where `load` would succeed."""
    return [found for found in each(path, images) if isinstance(found, Fault)]


def turns(messages: Sequence[Mapping[str, Any]]) -> tuple[Turn, ...]:
    """OpenAI-style messages in memory as turns; an image part may hold any `Source`, and the last turn may be open.

    Raises:
        DataError: an unknown role or part, or turns that do not alternate.
    """
    try:
        said = tuple(_message(message, _InMemory()) for message in _list(messages, "messages"))
        _check_order(said)
    except _Wrong as wrong:
        raise DataError(wrong.message, wrong.remedy) from None
    return said


@dataclass(frozen=True)
class Record:
    """A sample, the line where it starts (from 1), and the bytes of the file that it takes."""

    sample: Sample
    line: int
    start: int
    end: int


class _Wrong(Exception):
    """One fault of the record at hand."""

    def __init__(self, message: str, remedy: str) -> None:
        super().__init__(message)
        self.message, self.remedy = message, remedy


_Place: TypeAlias = tuple[int, int, int, Any]
"""Line, first byte, byte behind the last, and the record or what is wrong with it."""


# ---------------------------------------------------------------------------------------------- files to records


def each(path: Path, images: Path | None) -> Iterator[Record | Fault]:
    """What is right and what is wrong with a file, record by record."""
    for line, start, end, record in _records(path):
        name = ""
        try:
            if isinstance(record, _Wrong):
                raise record
            name = _id(record, f"{path.stem}:{line}")
            yield Record(_sample(record, name, line, path, images), line, start, end)
        except _Wrong as wrong:
            yield Fault(line, name, wrong.message, wrong.remedy)


def one(raw: bytes, line: int, path: Path, images: Path | None) -> Sample:
    """The sample of a record that `each` has found there before.

    Raises:
        DataError: it is not there any more.
    """
    try:
        record = json.loads(raw)
        return _sample(record, _id(record, f"{path.stem}:{line}"), line, path, images)
    except (ValueError, _Wrong) as error:
        raise DataError(
            f"{path}: line {line} is not what it was when the file was opened ({error})",
            "leave the file alone, restart",
        ) from None


def _records(path: Path) -> Iterator[_Place]:
    """Every record, or what is wrong there."""
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})", "check the path and its permissions") from None
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        yield line, 0, 0, _Wrong(f"byte {error.start} is not UTF-8", "save the file as UTF-8")
        return
    mark = len(raw) - len(text.encode())  # of the byte order
    yield from _array(text, mark) if text.lstrip().startswith("[") else _lines(text, mark)


def _lines(text: str, start: int) -> Iterator[_Place]:
    # Not splitlines(): a JSON string may hold other line separators than \n as they are.
    for line, record in enumerate(text.split("\n"), start=1):
        end = start + len(record.encode())
        if record.strip():
            yield line, start, end, _parse(record)
        start = end + 1


def _parse(record: str) -> Any:
    try:
        return json.loads(record)
    except (ValueError, RecursionError) as error:
        return _not_json(error)


def _array(text: str, end: int) -> Iterator[_Place]:
    """The records of a JSON array with the line at which each starts."""
    decoder = json.JSONDecoder()
    at = _skip(text, text.index("[") + 1)
    line, counted = 1, 0
    while text[at : at + 1] != "]":
        line, start = line + text.count("\n", counted, at), end + len(text[counted:at].encode())
        counted = at
        try:
            record, at = decoder.raw_decode(text, at)
        except (ValueError, RecursionError) as error:
            yield line, 0, 0, _not_json(error)
            return
        end = start + len(text[counted:at].encode())
        yield line, start, end, record
        line, counted = line + text.count("\n", counted, at), at
        at = _skip(text, at)
        if text[at : at + 1] == ",":
            at = _skip(text, at + 1)
        elif text[at : at + 1] != "]":
            wrong = _Wrong("no comma or ] after this record", "repair the JSON")
            yield line + text.count("\n", counted, at), 0, 0, wrong
            return


def _skip(text: str, at: int) -> int:
    while text[at : at + 1] in (" ", "\t", "\r", "\n"):
        at += 1
    return at


def _not_json(error: Exception) -> _Wrong:
    cause = error.msg if isinstance(error, json.JSONDecodeError) else "nested too deeply, or a number too long"
    return _Wrong(f"not JSON ({cause})", "write one JSON array of records, or one record per line")


# ---------------------------------------------------------------------------------------------- records to samples


def _id(record: Any, default: str) -> str:
    if not isinstance(record, dict):
        raise _Wrong("the record is not an object", 'write {"conversations": …} or {"messages": …}')
    name = record.get("id", default)
    if not isinstance(name, str | int):
        raise _Wrong("the id is neither a text nor a number", "write a text")
    return str(name)


def _sample(record: dict[str, Any], name: str, line: int, path: Path, images: Path | None) -> Sample:
    pictures = _Listed(record, path, images)
    if "conversations" in record:
        said = tuple(_said(item, pictures) for item in _list(record["conversations"], "conversations"))
    elif "messages" in record:
        said = tuple(_message(message, pictures) for message in _list(record["messages"], "messages"))
    else:
        raise _Wrong("the record has neither conversations nor messages", "see the two forms in the documentation")
    pictures.check_counts()
    _check_order(said)
    _check_answers(said)
    meta = record.get("meta", {})
    if not isinstance(meta, dict):
        raise _Wrong("meta is not an object", 'write {"meta": {…}}')
    return Sample(said, name, {**meta, "file": str(path), "line": line})


class _InMemory:
    """Pictures are part of the messages themselves, and `<image>` in a text is a text."""

    def text(self, text: str) -> list[Part]:
        return [Text(text)] if text else []

    def picture(self, given: Any) -> Source:
        if isinstance(given, str) and given.startswith("data:"):
            return _data_url(given)
        if not isinstance(given, str | Path | bytes | Pillow.Image | Drawn):
            raise _Wrong("an image part holds no picture", "give a path, bytes, a data URL or an open picture")
        return given


class _Listed:
    """The record's list of pictures, handed out one per `<image>`, and the rule of where pictures may lie."""

    def __init__(self, record: dict[str, Any], path: Path, images: Path | None) -> None:
        self.folder = path.parent if images is None else images
        self.confined = images is not None
        given = record.get("images", record.get("image"))
        listed = [] if given is None else given if isinstance(given, list) else [given]
        self.listed = [self.picture(picture) for picture in listed]
        self.placed = 0

    def text(self, text: str) -> list[Part]:
        """The text cut at `<image>`; that there are as many pictures is checked at the end, with both counts."""
        parts: list[Part] = []
        for index, piece in enumerate(text.split(MARKER)):
            if index:
                parts.append(Image(self.listed[self.placed] if self.placed < len(self.listed) else b""))
                self.placed += 1
            if piece:
                parts.append(Text(piece))
        return parts

    def check_counts(self) -> None:
        if self.placed != len(self.listed):
            remedy = (
                f"write {MARKER} once per picture, where it belongs (most often at the start of the first question)"
            )
            raise _Wrong(f"{self.placed} {MARKER} in the text, {len(self.listed)} pictures", remedy)

    def picture(self, given: Any) -> Path | bytes:
        """The file a record names, or the bytes of a data URL."""
        if not isinstance(given, str) or not given:
            raise _Wrong("a picture is not named by a text", "write its path")
        if given.startswith(NETWORK):
            raise _Wrong(f"{given[:80]} lies on the network", "download it into the images folder and write its path")
        if given.startswith("data:"):
            return _data_url(given)
        relative = PurePath(given)
        if self.confined and (relative.is_absolute() or PurePath(normpath(given)).parts[:1] == ("..",)):
            raise _Wrong(f"{given} lies outside the images folder", "write a path below it")
        found = self.folder / relative
        try:
            there = found.is_file()
        except OSError:  # such as a name that is too long
            there = False
        if not there:
            raise _Wrong(f"no picture {given} in {self.folder}", "check the path and the images folder")
        return found


def _data_url(given: str) -> bytes:
    header, comma, payload = given.partition(",")
    try:
        if not comma or not header.endswith(";base64"):
            raise ValueError
        return base64.b64decode(payload, validate=True)
    except (ValueError, binascii.Error):
        raise _Wrong("a data URL is not base64", "write data:image/png;base64,…") from None


def _said(item: Any, pictures: _Listed) -> Turn:
    """One turn of LLaVA's `conversations`."""
    if not isinstance(item, dict):
        raise _Wrong("a turn is not an object", 'write {"from": "human" | "gpt", "value": "…"}')
    return Turn(_role(item.get("from")), tuple(pictures.text(_text(item.get("value")))))


def _message(message: Any, pictures: _Listed | _InMemory) -> Turn:
    """One of `messages`."""
    if not isinstance(message, Mapping):
        raise _Wrong("a message is not an object", 'write {"role": "user" | "assistant", "content": …}')
    role, content = _role(message.get("role")), message.get("content")
    if isinstance(content, str):
        return Turn(role, tuple(pictures.text(content)))
    return Turn(role, tuple(part for item in _list(content, "content") for part in _parts(item, pictures)))


def _parts(item: Any, pictures: _Listed | _InMemory) -> Sequence[Part]:
    """One item of a message's content."""
    if not isinstance(item, Mapping):
        raise _Wrong("a part of content is not an object", 'write {"type": "text", "text": "…"}')
    if item.get("type") == "text":
        return pictures.text(_text(item.get("text")))
    if item.get("type") == "image":
        return [Image(pictures.picture(item.get("image")))]
    if item.get("type") == "image_url":
        url = item.get("image_url")
        return [Image(pictures.picture(url.get("url") if isinstance(url, Mapping) else url))]
    raise _Wrong(f"unknown part {str(item.get('type'))[:40]!r}", "parts are text, image and image_url")


def _text(given: Any) -> str:
    if not isinstance(given, str):
        raise _Wrong("a turn's text is not a text", "write a string")
    return given


def _role(given: Any) -> Role:
    if not isinstance(given, str) or given not in ROLES:
        raise _Wrong(f"unknown role {str(given)[:40]!r}", f"roles are {', '.join(ROLES)}")
    return ROLES[given]


def _list(given: Any, name: str) -> Sequence[Any]:
    if not isinstance(given, list | tuple):
        raise _Wrong(f"{name} is not a list", "write a JSON array")
    return given


def _check_order(said: tuple[Turn, ...]) -> None:
    body = said[1:] if said and said[0].role == "system" else said
    for index, turn in enumerate(body):
        expected = ("user", "assistant")[index % 2]
        if turn.role != expected:
            remedy = "start with the user, let user and assistant alternate, and put system first or nowhere"
            raise _Wrong(f"turns do not alternate: turn {index + 1} is {turn.role}, not {expected}", remedy)


def _check_answers(said: tuple[Turn, ...]) -> None:
    answers = [turn for turn in said if turn.role == "assistant"]
    if not answers:
        raise _Wrong("there is no assistant turn", "add the answer to be learnt, or remove the record")
    if any(not turn.text.strip() and not turn.media for turn in answers):
        raise _Wrong("an answer is empty", "write the answer, or remove its question and it")
