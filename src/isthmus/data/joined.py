"""Tables in JSON files that are joined (see `tables`), and what a file of one object may be besides: one record."""

from __future__ import annotations

import mmap
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from isthmus.data import jsons, layouts, tables
from isthmus.data.copied import Several
from isthmus.data.faults import Wrong
from isthmus.data.jsons import Cell, Place
from isthmus.data.layouts import Name
from isthmus.types import ConfigError

WORDS = re.compile(
    rb'"(?:conversations|messages|completion|chosen|task|texts?|text_list|txt|TEXT|captions?|caption_str|questions?|query'
    rb'|regions|qas|objects|videoid|annotations|sentences)"'
)
"""Keys of which every record and every table has one; no file without is read through to see what it holds."""


def may_be_tables(path: Path) -> bool:
    """Whether a file is one object, or looks like RefCOCO's array of references."""
    shape = jsons.shape(path)
    if shape == "array":
        with path.open("rb") as stream:
            return b'"ref_id"' in stream.read(4096)
    return shape == "object"


def record(path: Path) -> tables.Row | None:
    """The line and the one record that a file is; None where it holds something else, tables for one."""
    if jsons.shape(path) != "object":
        return None
    place, found = next(jsons.places(path))
    return (place.line, found) if isinstance(found, Wrong) or layouts.is_record(found) else None


def holds_samples(path: Path) -> bool:
    """Whether a file plainly holds samples, rather than notes about the files beside it.

    Its beginning tells it, or that none of the words is there which samples have; any other file is read through.
    """
    shape = jsons.shape(path)
    if shape not in ("array", "object"):
        _, first = next(jsons.places(path), (None, None))
        return isinstance(first, dict) and layouts.known(first)
    cells, whole = jsons.beginning(path)
    if _are_samples(path, cells):
        return True
    decided = whole or (shape == "array" and cells) or not _worded(path)
    return not decided and _are_samples(path, jsons.root(path))


def _are_samples(path: Path, cells: Sequence[Cell]) -> bool:
    """Whether these are the members of tables or of one record, or items of which the first is a record."""
    sound = {cell.key or str(number): cell for number, cell in enumerate(cells) if not isinstance(cell.value, Wrong)}
    first = {key: jsons.plain(cell) for key, cell in sound.items()}
    if jsons.shape(path) == "array":
        first = first["0"] if isinstance(first.get("0"), dict) else {}
    return layouts.known(first) or (may_be_tables(path) and tables.of(sound, None) is not None)


def _worded(path: Path) -> bool:
    """Whether a word is there without which nothing is a sample."""
    with path.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as content:
        return WORDS.search(content) is not None


class Joined(Several):
    """Tables in JSON files, each by itself or with the one beside (see `tables`)."""

    def __init__(self, paths: Sequence[Path], format: Name | None, beside: Path | None) -> None:
        super().__init__(paths[0], paths)
        self.format, self.beside = format, beside

    def files(self) -> Sequence[Path]:
        return self.paths if self.beside is None else [*self.paths, self.beside]

    def scan(self) -> Iterator[tuple[Place, Any]]:
        for shard, path in enumerate(self.paths):
            for line, row in self._rows(path):
                yield Place(shard, line), row

    def _rows(self, path: Path) -> Iterator[tables.Row]:
        members, bad = _members(path)
        table = tables.of(members, self.format)
        if table is None:
            yield from bad or [_no_tables(path, members)]
            return
        if table.beside and self.beside is None:
            raise ConfigError(
                f"{path} needs a second file: {table.beside}", "name it (options: {beside: …}, -s beside=…)"
            )
        second, also_bad = _members(self.beside) if self.beside is not None else ({}, [])
        try:
            rows = table.rows(members, second)
        except tables.MALFORMED as error:
            if not bad and not also_bad:
                cause = error.args[0] if isinstance(error, KeyError) else "an item that is no object"
                yield 1, Wrong(f"a table is missing or malformed: {cause}", "compare the file with the publisher's")
            rows = iter(())
        yield from tables.guarded(rows, 1)
        yield from (*bad, *also_bad)


def _no_tables(path: Path, members: tables.Tables) -> tables.Row:
    """The record of a file that is no tables, or what is wrong with it."""
    if (one := record(path)) is not None:
        return one
    keys = ", ".join(list(members)[:8])
    remedy = "name the file of questions or captions; records of your own stand in one array, [ … ]"
    return 1, Wrong(f"tables of no known layout (they have {keys})", remedy)


def _members(path: Path) -> tuple[tables.Tables, list[tables.Row]]:
    """A file's members by key or number, and what is wrong with others, or after them."""
    cells = {cell.key or str(number): cell for number, cell in enumerate(jsons.root(path))}
    bad = [_named(cell) for cell in cells.values() if isinstance(cell.value, Wrong)]
    return {key: cell for key, cell in cells.items() if not isinstance(cell.value, Wrong)}, bad


def _named(cell: Cell) -> tables.Row:
    return cell.line, Wrong(cell.value.message, cell.value.remedy, cell.key)
