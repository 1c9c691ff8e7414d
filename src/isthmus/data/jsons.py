"""JSON files as numbered records: one per line, an array of them, or one object whose tables are walked.

A key that is there twice, and says two things, is a fault: Python would take the latter in silence.

Lines are read one after the other, so a file of any size takes the memory of its longest line. Arrays and objects are
held in memory while they are read through.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal, TypeAlias

from isthmus.data.faults import Wrong
from isthmus.types import DataError

MARK = b"\xef\xbb\xbf"
"""Of the byte order; some editors write it."""
HEAD = 1 << 16
"""So many bytes tell what most files hold."""
NOTHING: tuple[Any, ...] = (None, "", [], {})
"""What is as good as not there."""


@dataclass(frozen=True)
class Place:
    """Where a record starts: in which file, at which line (from 1), and between which bytes."""

    shard: int
    line: int
    start: int = 0
    end: int = 0


class Shards:
    """What lies in one file or several, and is read from its place in them."""

    copied = False

    def __init__(self, paths: Sequence[Path]) -> None:
        self.paths = paths

    def files(self) -> Sequence[Path]:
        return self.paths

    def name(self, place: Place) -> str:
        return str(self.paths[place.shard])


@dataclass(frozen=True)
class Cell:
    """A value and the line where it starts; of a member of an object, also its key."""

    line: int
    value: Any
    key: str = ""


Shape: TypeAlias = Literal["lines", "array", "object", "spread"]


def shape(path: Path) -> Shape:
    """How a file holds its records: its first lines tell. A `.jsonl` is spread whose first record goes over several.

    Raises:
        DataError: it cannot be read.
    """
    with opened(path) as stream:
        full = (line for line in stream if line.removeprefix(MARK).strip())
        first, second = (next(full, b"").removeprefix(MARK).strip() for _ in range(2))
    if first.startswith(b"["):
        return "array"
    if not first.startswith(b"{"):
        return "lines"
    if path.suffix == ".jsonl":
        return "spread" if second.startswith(b'"') and not _is_json(first) else "lines"
    return "object" if not second or not (second.startswith(b"{") or _is_json(first)) else "lines"


def _is_json(line: bytes) -> bool:
    try:
        json.loads(line)
    except (ValueError, RecursionError):
        return False
    return True


def places(path: Path) -> Iterator[tuple[Place, Any]]:
    """Every record of lines or of an array, or what is `Wrong` there; of an object, that as a record.

    Raises:
        DataError: the file cannot be read.
    """
    shaped = shape(path)
    if shaped == "lines":
        yield from _lines(path)
        return
    if shaped == "spread":
        remedy = "write each on one line (`jq -c .` does), or all in [ ] with commas between, as a .json"
        yield Place(0, 1), Wrong("a record goes over several lines, and a .jsonl has one per line", remedy)
        return
    text, mark = _text(path)
    if isinstance(text, Cell):
        yield Place(0, text.line), text.value
    elif shaped == "object":
        yield from _whole(text, mark)
    else:
        yield from _array(text, mark)


def root(path: Path) -> list[Cell]:
    """A whole file of one object or array: its members or items; a member that is an array holds a list of `Cell`.

    A cell is `Wrong` whose key is there twice and says two things, and so is the last one where the file is damaged.
    """
    text, mark = _text(path)
    if isinstance(text, Cell):
        return [text]
    if text.lstrip().startswith("["):
        return [Cell(place.line, value) for place, value in _array(text, mark)]
    walk = _Walk(text, text.index("{") + 1)
    members: dict[str, Cell] = {}
    try:
        for _ in walk.until("}"):
            cell = walk.member()
            members[cell.key] = _one_of(members.get(cell.key), cell)
        walk.end()
    except Wrong as wrong:
        return [*members.values(), Cell(walk.line, wrong)]
    return list(members.values())


def beginning(path: Path) -> tuple[list[Cell], bool]:
    """As `root`, of the file's first bytes alone: what stands there whole; and whether that is all of the file.

    Of an array that is cut the items before the cut are there.
    """
    with opened(path) as stream:
        raw = stream.read(len(MARK) + HEAD)
    text = raw.decode("utf-8-sig", "ignore")
    closing = "]" if text.lstrip().startswith("[") else "}"
    walk = _Walk(text, text.find("[" if closing == "]" else "{") + 1)
    found: list[Cell] = []
    try:
        for _ in walk.until(closing):
            line, key = walk.line, "" if closing == "]" else walk.key()
            if not key or walk.here != "[":
                found.append(Cell(line, walk.value(), key))
                continue
            items: list[Cell] = []
            found.append(Cell(line, items, key))
            items.extend(walk.items())
    except Wrong:
        return found, False
    return found, True


def _one_of(before: Cell | None, cell: Cell) -> Cell:
    """Of two members of one key the one that holds something, or what is wrong where both do, and not the same."""
    if before is None or plain(before) in NOTHING:
        return cell
    if plain(cell) in (*NOTHING, plain(before)):
        return before
    return Cell(cell.line, _twice(cell.key), cell.key)


def plain(cell: Cell) -> Any:
    """Its value, of an array the items' values."""
    return [item.value for item in cell.value] if isinstance(cell.value, list) else cell.value


def parse(record: bytes | str) -> Any:
    """A record's value, or what is `Wrong` with it."""
    try:
        return DECODER.decode(record.decode() if isinstance(record, bytes) else record)
    except UnicodeDecodeError:
        return _not_utf8()
    except Wrong as wrong:
        return wrong
    except (ValueError, RecursionError) as error:
        return not_json(error)


def once(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    """An object of its members; of two of one key the one that holds something.

    Raises:
        Wrong: both do, and not the same.
    """
    made = dict(pairs)
    if len(made) == len(pairs):
        return made
    made = {}
    for key, value in pairs:
        before = made.get(key)
        if before in NOTHING:
            made[key] = value
        elif value not in NOTHING and value != before:
            raise _twice(key)
    return made


DECODER = json.JSONDecoder(object_pairs_hook=once)


def _twice(key: str) -> Wrong:
    return Wrong(f"the key {key[:40]!r} is there twice, and says two things", "keep one; several pictures are a list")


def not_json(error: Exception) -> Wrong:
    cause = error.msg if isinstance(error, json.JSONDecodeError) else "nested too deeply, or a number too long"
    return Wrong(f"not JSON ({cause})", "write one JSON array of records, or one record per line")


def _not_utf8() -> Wrong:
    return Wrong("not UTF-8", "save the file as UTF-8")


def opened(path: Path) -> BinaryIO:
    """The file for reading bytes.

    Raises:
        DataError: it cannot be read.
    """
    try:
        return path.open("rb")
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})", "check the path and its permissions") from None


def _lines(path: Path) -> Iterator[tuple[Place, Any]]:
    # Only \n ends a line: a JSON string may hold other line separators as they are.
    start = 0
    with opened(path) as stream:
        for line, raw in enumerate(stream, start=1):
            bare = raw.removeprefix(MARK) if line == 1 else raw
            if bare.strip():
                end = start + len(raw)
                yield Place(0, line, end - len(bare), end - raw.endswith(b"\n")), parse(bare)
            start += len(raw)


def _text(path: Path) -> tuple[str | Cell, int]:
    """A file's text and the bytes before it, or what is wrong with it."""
    with opened(path) as stream:
        raw = stream.read()
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        return Cell(raw.count(b"\n", 0, error.start) + 1, _not_utf8()), 0
    return text, len(MARK) * raw.startswith(MARK)


def _array(text: str, end: int) -> Iterator[tuple[Place, Any]]:
    """The records of a JSON array with the line at which each starts."""
    walk = _Walk(text, text.index("[") + 1)
    counted = 0
    try:
        for _ in walk.until("]"):
            start = end + len(text[counted : walk.at].encode())
            line, begin = walk.line, walk.at
            record = walk.value()
            end, counted = start + len(text[begin : walk.at].encode()), walk.at
            yield Place(0, line, start, end), record
        walk.end()
    except Wrong as wrong:
        yield Place(0, walk.line), wrong


def _whole(text: str, mark: int) -> Iterator[tuple[Place, Any]]:
    """The one object of a file as a record."""
    begin = text.index("{")
    walk = _Walk(text, begin)
    line, start = walk.line, mark + len(text[:begin].encode())
    try:
        record = walk.value()
        end = start + len(text[begin : walk.at].encode())
        walk.end()
        yield Place(0, line, start, end), record
    except Wrong as wrong:
        yield Place(0, walk.line), wrong


class _Walk:
    """Goes through a JSON text value by value, and knows the line."""

    def __init__(self, text: str, at: int) -> None:
        self.text, self.at = text, at
        self._line, self._counted = 1, 0

    @property
    def line(self) -> int:
        self._line += self.text.count("\n", self._counted, self.at)
        self._counted = self.at
        return self._line

    def until(self, closing: str) -> Iterator[None]:
        """Once per element, until the bracket is passed; the caller reads the element.

        Raises:
            Wrong: there is neither a comma nor the bracket.
        """
        self.skip()
        while self.here != closing:
            yield
            self.skip()
            if self.here == ",":
                self.at += 1
                self.skip()
            elif self.here != closing:
                raise Wrong(f"no comma or {closing} after this record", "repair the JSON")
        self.at += 1

    def end(self) -> None:
        """Raises `Wrong` where the text goes on: whole files that were put one behind the other, say."""
        self.skip()
        if self.here:
            remedy = "keep one array or object per file, or write one record per line"
            raise Wrong("something stands behind the closing bracket", remedy)

    def value(self) -> Any:
        """What stands here, or what is `Wrong` with it where the text goes on behind it.

        Raises:
            Wrong: it is not JSON, and nobody knows where it ends.
        """
        try:
            try:
                value, self.at = DECODER.raw_decode(self.text, self.at)
            except Wrong as wrong:
                value, self.at = wrong, json.JSONDecoder().raw_decode(self.text, self.at)[1]
        except (ValueError, RecursionError) as error:
            raise not_json(error) from None
        return value

    def member(self) -> Cell:
        """A key and its value; of an array, the list of its items."""
        line, key = self.line, self.key()
        return Cell(line, self.value() if self.here != "[" else list(self.items()), key)

    def key(self) -> str:
        """A key, up to its value.

        Raises:
            Wrong: there is none.
        """
        key = self.value()
        self.skip()
        if self.here != ":" or not isinstance(key, str):
            raise Wrong("no key and colon here", "repair the JSON")
        self.at += 1
        self.skip()
        return key

    def items(self) -> Iterator[Cell]:
        """Those of the array that begins here."""
        self.at += 1
        for _ in self.until("]"):
            yield Cell(self.line, self.value())

    @property
    def here(self) -> str:
        return self.text[self.at : self.at + 1]

    def skip(self) -> None:
        while self.here in (" ", "\t", "\r", "\n") and self.here:
            self.at += 1
