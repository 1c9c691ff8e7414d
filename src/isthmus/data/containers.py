"""What holds records: JSON, JSONL and their shards, tables of several files, CSV, folders, tars, Parquet.

A container is read through once, in order (`scan`), and afterwards record by record, from where each stands (`read`):
so shuffling and resuming cost nothing, memory holds what is being used, and no process waits at the end of a shard.
Containers that are joined from several places cannot be read that way; `Records` keeps a copy of their samples.
"""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from isthmus.data import jsons, tables, tsv
from isthmus.data.copied import Copied
from isthmus.data.faults import Wrong
from isthmus.data.jsons import Cell, Place, Shards
from isthmus.data.layouts import Name
from isthmus.data.media import PICTURES
from isthmus.types import ConfigError, DataError

NUMBERED = re.compile(r"(?<=.)#\d+$")
"""Flickr's mark of a picture's n-th caption, behind the picture's name."""
TABULAR = {".csv": ",", ".tsv": "\t", ".token": "\t"}
"""Endings of delimited text and what delimits it, unless its first line says otherwise."""
ENDINGS = (".json", ".jsonl", ".tar", ".parquet", ".arrow", *TABULAR)
"""Of files that can be named as a data set."""


class Container(Protocol):
    """A file or folder of records."""

    copied: bool
    """Its records cannot be read again from where they stand."""

    def files(self) -> Sequence[Path]:
        """What its records depend on, but for pictures and videos that they name."""

    def scan(self) -> Iterator[tuple[Place, Any]]:
        """Every record in order, or what is `Wrong` there."""

    def read(self, place: Place) -> Any:
        """A record that `scan` found."""

    def name(self, place: Place) -> str:
        """The file of a record."""

    def held(self, raw: Any) -> Mapping[str, bytes]:
        """Files that came with a record."""


def opened(path: Path, format: Name | None = None, beside: Path | None = None) -> Container:
    """The container at a path.

    Raises:
        DataError: there is none, or it is of no known kind.
        ConfigError: what reads it is not installed.
    """
    if path.is_dir():
        return _folder(path)
    if path.suffix == ".tar":
        return _tars([path])
    if path.suffix in (".parquet", ".arrow"):
        return _rows([path])
    if path.suffix in TABULAR:
        return tsv.Questions(path) if tsv.fits(path) else Delimited(path)
    if format in tables.TABLES or (format is None and path.is_file() and _is_tables(path)):
        return Joined(path, format, beside)
    if beside is not None:
        raise ConfigError(f"{path} needs no second file beside it", "leave `beside` away, or name the format")
    return Lines([path])


def _folder(path: Path) -> Container:
    """A folder of shards of one kind, a folder that `datasets` saved, or one of pictures."""
    if (path / "state.json").is_file() or (path / "dataset_info.json").is_file():
        return _rows([path])
    found = {ending: sorted(path.glob(f"*{ending}")) for ending in (".tar", ".parquet", ".jsonl", ".json")}
    if found[".tar"]:
        return _tars(found[".tar"])
    if found[".parquet"]:
        return _rows(found[".parquet"])
    for name in ("metadata.csv", "metadata.tsv"):
        if (path / name).is_file():
            return Delimited(path / name)
    if found[".jsonl"] or found[".json"]:
        return Lines(found[".jsonl"] or found[".json"])
    return Pictures(path)


def _tars(paths: Sequence[Path]) -> Container:
    from isthmus.data.tars import Tars

    return Tars(paths)


def _rows(paths: Sequence[Path]) -> Container:
    try:
        from isthmus.data.arrow import Rows
    except ModuleNotFoundError:
        raise ConfigError(f"{paths[0]} needs the package datasets", "pip install 'isthmus[data]'") from None
    return Rows(paths)


class Lines(Shards):
    """JSON: one record per line, or an array of them; of one file or several shards."""

    def scan(self) -> Iterator[tuple[Place, Any]]:
        for shard, path in enumerate(self.paths):
            for place, raw in jsons.places(path):
                yield Place(shard, place.line, place.start, place.end), raw

    def read(self, place: Place) -> Any:
        with self.paths[place.shard].open("rb") as stream:  # workers must not share a position in the file
            stream.seek(place.start)
            return jsons.parse(stream.read(place.end - place.start))

    def held(self, raw: Any) -> Mapping[str, bytes]:
        return {}


class Joined(Copied):
    """Tables in one JSON file or two (see `tables`)."""

    def __init__(self, path: Path, format: Name | None, beside: Path | None) -> None:
        super().__init__(path)
        self.format, self.beside = format, beside

    def files(self) -> Sequence[Path]:
        return [self.path] if self.beside is None else [self.path, self.beside]

    def scan(self) -> Iterator[tuple[Place, Any]]:
        for line, row in self._rows():
            yield Place(0, line), row

    def _rows(self) -> Iterator[tables.Row]:
        members, broken = _members(self.path)
        table = tables.of(members, self.format)
        if table is None and broken is not None:
            yield broken.line, broken.value
            return
        if table is None:
            yield (
                1,
                Wrong("these tables are of no known layout", "write records as an array, or one per line; or see docs"),
            )
            return
        if table.beside and self.beside is None:
            raise ConfigError(
                f"{self.path} needs a second file: {table.beside}", "name it (options: {beside: …}, --beside …)"
            )
        second, also_broken = _members(self.beside) if self.beside is not None else ({}, None)
        try:
            rows = table.rows(members, second)
        except (KeyError, TypeError, AttributeError) as error:
            if broken is None and also_broken is None:
                cause = error.args[0] if isinstance(error, KeyError) else "an item that is no object"
                yield 1, Wrong(f"a table is missing or malformed: {cause}", "compare the file with the publisher's")
            rows = iter(())
        yield from tables.guarded(rows, 1)
        for cell in (broken, also_broken):
            if cell is not None:
                yield cell.line, cell.value


class Delimited(Copied):
    """CSV and TSV with a line of names, and Flickr's `picture#number<tab>caption` without."""

    def scan(self) -> Iterator[tuple[Place, Any]]:
        try:
            with self.path.open(encoding="utf-8-sig", newline="") as stream:
                yield from self._rows(stream)
        except OSError as error:
            raise DataError(f"{self.path}: cannot be read ({error.strerror})", "check the path") from None
        except UnicodeDecodeError:
            yield Place(0, 1), Wrong("not UTF-8", "save the file as UTF-8")

    def _rows(self, stream: Any) -> Iterator[tuple[Place, Any]]:
        head = stream.readline()
        delimiter = next((mark for mark in "\t|;," if mark in head), TABULAR[self.path.suffix])
        stream.seek(0)
        rows = csv.reader(
            stream, delimiter=delimiter, quoting=csv.QUOTE_NONE if delimiter == "\t" else csv.QUOTE_MINIMAL
        )
        names = (
            ["image", "caption"]
            if NUMBERED.search(head.split(delimiter)[0])
            else [cell.strip() for cell in next(rows, [])]
        )
        line = rows.line_num + 1
        try:
            for row in rows:
                if any(cell.strip() for cell in row):
                    yield Place(0, line), self._record(names, row, line)
                line = rows.line_num + 1
        except csv.Error as error:
            yield Place(0, line), Wrong(f"not a table ({error})", "quote cells that hold a delimiter or a line's end")

    def _record(self, names: Sequence[str], row: Sequence[str], line: int) -> Any:
        if len(row) != len(names):
            return Wrong(
                f"{len(row)} cells under {len(names)} names", "quote cells that hold a delimiter or a line's end"
            )
        record: dict[str, Any] = {name: cell.strip() for name, cell in zip(names, row) if name != "comment_number"}
        for plain in ("image_name", "comment"):  # Flickr30k as a table
            if plain in record:
                record[{"image_name": "image", "comment": "caption"}[plain]] = record.pop(plain)
        if "image" in record:
            record["image"] = NUMBERED.sub("", record["image"])
        return {"id": f"{self.path.stem}:{line}", **record}


class Pictures(Copied):
    """A folder of pictures: each with a text of the same name, or in a folder that is named as what it shows."""

    def files(self) -> Sequence[Path]:
        every = (file for picture in self._pictures() for file in (picture, picture.with_suffix(".txt")))
        return [file for file in every if file.is_file()]

    def scan(self) -> Iterator[tuple[Place, Any]]:
        found = self._pictures()
        if not found:
            yield Place(0, 1), Wrong("neither samples nor pictures in this folder", "name a file, or another folder")
        for number, picture in enumerate(found, start=1):
            yield Place(0, number), self._record(picture)

    def _pictures(self) -> list[Path]:
        return sorted(one for one in self.path.rglob("*") if one.suffix.lower() in PICTURES)

    def _record(self, picture: Path) -> Any:
        name = picture.relative_to(self.path)
        if any("\ud800" <= letter <= "\udfff" for letter in str(name)):
            return Wrong("a file whose name is not UTF-8", f"rename {ascii(str(name))}")
        words = picture.with_suffix(".txt")
        if words.is_file():
            try:
                caption = words.read_text(encoding="utf-8-sig").strip()
            except UnicodeDecodeError:
                return Wrong(f"{words.name} is not UTF-8", "save it as UTF-8")
        elif len(name.parts) > 1:
            caption = name.parts[-2].replace("_", " ")
        else:
            return Wrong(f"nothing is said of {name}", f"write {words.name}, or put it in a folder with a name")
        return {"id": str(name), "image": str(name), "caption": caption}


def copied(record: Any) -> str:
    """A record as a line of a copy."""
    return json.dumps(record, ensure_ascii=False, separators=(",", ":")) + "\n"


def _is_tables(path: Path) -> bool:
    shape = jsons.shape(path)
    if shape == "array":
        with path.open("rb") as stream:
            return b'"ref_id"' in stream.read(4096)
    return shape == "object"


def _members(path: Path) -> tuple[tables.Tables, Cell | None]:
    """A file's members by key or number, and what is wrong after them."""
    cells = jsons.root(path)
    broken = next((cell for cell in cells if isinstance(cell.value, Wrong)), None)
    return {cell.key or str(number): cell for number, cell in enumerate(cells) if cell is not broken}, broken
