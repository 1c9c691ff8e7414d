"""What holds records: JSON, JSONL and their shards, tables of several files, CSV, folders, tars, Parquet.

A container is read through once, in order (`scan`), and afterwards record by record, from where each stands (`read`):
so shuffling and resuming cost nothing, memory holds what is being used, and no process waits at the end of a shard.
Containers that are joined from several places cannot be read that way; `Records` keeps a copy of their samples.
"""

from __future__ import annotations

import csv
import functools
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from isthmus.data import joined, jsons, tables, tsv
from isthmus.data.copied import Copied, Several
from isthmus.data.copied import copied as copied
from isthmus.data.faults import Wrong
from isthmus.data.folders import below
from isthmus.data.jsons import Place, Shards
from isthmus.data.layouts import Name
from isthmus.data.media import PICTURES
from isthmus.types import ConfigError, DataError

NUMBERED = re.compile(r"(?<=.)#\d+$")
"""Flickr's mark of a picture's n-th caption, behind the picture's name."""
FLICKR = {"image_name": "image", "comment": "caption"}
"""Flickr30k's columns, where a table has both, and what they are."""
TABULAR = {".csv": ",", ".tsv": "\t", ".token": "\t"}
"""Endings of delimited text and what delimits it, unless its first line says otherwise."""
ENDINGS = (".json", ".jsonl", ".tar", ".parquet", ".arrow", *TABULAR)
"""Of files that can be named as a data set."""
FOREIGN = {
    (".gz", ".tgz", ".bz2", ".xz", ".zst", ".zip"): "unpack it first",
    (".p", ".pkl", ".pickle"): "a pickle is a program and not opened: write it as JSON where you trust it",
    (".txt",): "name captions by what they are: .csv with a line of names, .token as Flickr's, .jsonl",
}
"""What to do with files of other endings."""
SHARD = re.compile(r"(.+?)-\d{5}-of-\d{5}")
"""How Hugging Face names the files of a split."""
SPLIT = re.compile(r"(?:^|[-_. ])(train|training|validation|valid|val|dev|testing|test)(?:[-_. \d]|$)", re.IGNORECASE)
LISTS = ("metadata.jsonl", "metadata.csv", "metadata.tsv")
"""Of what the pictures of a folder show."""
PROBED = 8
"""Files of a folder that are looked into, to tell what it holds."""
UNSAID = frozenset({"images", "image", "imgs", "img", "pictures", "photos", "jpg", "jpeg", "png"})
"""Names of folders that do not say what their pictures show."""


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


@functools.lru_cache(maxsize=1024)
def split_of(path: str) -> str | None:
    """The publisher's split that a file or folder is, by its name: `train-00000-of-00009.parquet`, `val.json`."""
    name = Path(path)
    if name.suffix not in ENDINGS:
        return name.name if _is_split(name.name) else None
    found = SHARD.match(name.stem) or SPLIT.search(name.stem)
    return found[1] if found else None


def _is_split(name: str) -> bool:
    """Whether a folder is called as a split: `train`, `val2017`."""
    return SPLIT.fullmatch(name.rstrip("0123456789")) is not None


def opened(path: Path, format: Name | None = None, beside: Path | None = None) -> Container:
    """The container at a path.

    Raises:
        DataError: there is none, or it is of no known kind.
        ConfigError: what reads it is not installed, or a folder does not tell which of its files are meant.
    """
    if path.is_dir():
        return _folder(path, format, beside)
    if path.suffix not in ENDINGS and path.is_file():
        remedy = next((one for endings, one in FOREIGN.items() if path.suffix in endings), "name it by what it is")
        raise DataError(f"{path} does not end in {', '.join(ENDINGS)}", remedy)
    if path.suffix == ".tar":
        return _tars([path])
    if path.suffix in (".parquet", ".arrow"):
        return _rows([path])
    if path.suffix in TABULAR:
        return tsv.Questions(path) if tsv.fits(path) else Delimited(path)
    if format in tables.TABLES or (format is None and path.is_file() and joined.may_be_tables(path)):
        return joined.Joined([path], format, beside)
    if beside is not None:
        raise ConfigError(f"{path} needs no second file beside it", "leave `beside` away, or name the format")
    return Lines([path])


def _folder(path: Path, format: Name | None, beside: Path | None) -> Container:
    """A folder of shards of one kind, one that `datasets` saved, pictures with a list of what they show, or without.

    Raises:
        ConfigError: it holds several things, or they lie deeper in it.
    """
    if (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():
        return _rows([path])
    if (path / "dataset_info.json").is_file():
        raise ConfigError(f"{path} holds LLaMA-Factory's list of files, dataset_info.json", "name one of these files")
    found = {ending: sorted(path.glob(f"*{ending}")) for ending in (".tar", ".parquet", ".jsonl", ".json")}
    if found[".tar"]:
        return _tars(found[".tar"])
    if found[".parquet"]:
        return _rows(found[".parquet"])
    lists = [one for name in LISTS if (one := path / name).is_file()]
    lines = [one for one in found[".jsonl"] if one not in lists]
    first = next(iter((*lists, *lines)), None)
    if first is None:
        lines = found[".json"]
    else:
        others = filter(joined.holds_samples, found[".json"][:PROBED])
        other = lines[0] if lists and lines else next(others, None)
        if other is not None:
            raise ConfigError(f"{path} holds {first.name} and {other.name}", "name the one that is meant")
    told = format is None and first is None
    likely = filter(joined.may_be_tables, lines[:PROBED] if told else [])
    table = next((one for one in likely if len(lines) == 1 or joined.record(one) is None), None)
    if lines and (format in tables.TABLES or table is not None):
        if table is not None and len(lines) > 1:
            remedy = "name one of them, or what they are, to have them read in turn (options: {format: …})"
            raise ConfigError(f"{path} holds several files, and {table.name} is one of tables", remedy)
        return joined.Joined(lines, format, beside)
    if lines:
        return Lines(lines)
    lists = lists or [one for name in LISTS for one in sorted(below(path)) if one.name == name]
    return Described(path, lists) if lists else _pictures(path)


def _pictures(path: Path) -> Container:
    """A folder of pictures that say themselves what they show.

    Raises:
        ConfigError: a file below it seems to say it.
    """
    container = Pictures(path)
    deep = sorted(one for one in below(path) if one.suffix in ENDINGS)
    if deep and container.silent():
        within = deep[0].relative_to(path)
        remedy = f"name {within} or its folder, and the folder of its pictures as images"
        raise ConfigError(f"{path} holds no records itself, and {within} lies below", remedy)
    return container


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


class Delimited(Copied):
    """CSV and TSV with a line of names, and Flickr's `picture#number<tab>caption` without.

    Args:
        stem: what the ids of rows start with that have none; the file's own by default.
    """

    def __init__(self, path: Path, stem: str = "") -> None:
        super().__init__(path)
        self.stem = stem or path.stem

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
        if {*FLICKR} <= {*names}:
            names = [FLICKR.get(name, name) for name in names]
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
        try:
            told = [(name, cell.strip()) for name, cell in zip(names, row) if name not in ("", "comment_number")]
            record = jsons.once(told)
        except Wrong as wrong:
            return wrong
        if "image" in record:
            record["image"] = NUMBERED.sub("", record["image"])
        return {**record, "id": record.get("id") or f"{self.stem}:{line}"}


class Described(Several):
    """A folder of pictures and, in it or in each split's folder, what they show: Hugging Face's `metadata.jsonl`."""

    def scan(self) -> Iterator[tuple[Place, Any]]:
        for shard, path in enumerate(self.paths):
            within = path.parent.relative_to(self.path)
            stem = (within / path.stem).as_posix()
            for place, raw in (Lines([path]) if path.suffix == ".jsonl" else Delimited(path, stem)).scan():
                if isinstance(raw, dict) and isinstance(raw.get("file_name"), str):
                    raw |= {"file_name": (within / raw["file_name"]).as_posix()} | _part(within)
                    raw |= {"id": f"{stem}:{place.line}"} if raw.get("id") is None else {}
                if isinstance(raw, Wrong):
                    raw.split = _part(within).get("split")
                yield Place(shard, place.line), raw


class Pictures(Copied):
    """A folder of pictures: each with a text of the same name, or in a folder that is named as what it shows."""

    def silent(self) -> bool:
        """Whether nothing says what the first picture shows, or there is none."""
        first = next(iter(self._pictures()), None)
        return first is None or isinstance(self._record(first), Wrong)

    def files(self) -> Sequence[Path]:
        every = (file for picture in self._pictures() for file in (picture, picture.with_suffix(".txt")))
        return [file for file in every if file.is_file()]

    def scan(self) -> Iterator[tuple[Place, Any]]:
        found = self._pictures()
        if not found:
            yield Place(0, 1), Wrong("neither samples nor pictures in this folder", "name a file, or another folder")
        for number, picture in enumerate(found, start=1):
            record = self._record(picture)
            if isinstance(record, Wrong):
                record.split = _part(picture.relative_to(self.path).parent).get("split")
            yield Place(0, number), record

    def _pictures(self) -> list[Path]:
        return sorted(one for one in below(self.path) if one.suffix.lower() in PICTURES)

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
        elif len(name.parts) > 1 and name.parts[-2].lower() not in UNSAID and not _is_split(name.parts[-2]):
            caption = name.parts[-2].replace("_", " ")
        else:
            return Wrong(f"nothing is said of {name}", f"write {words.name}, or put it in a folder with a name")
        return {"id": str(name), "image": str(name), "caption": caption, **_part(name.parent)}


def _part(folder: Path) -> dict[str, str]:
    """The split that a picture belongs to, by the folders in which it lies."""
    return {"split": folder.parts[0]} if folder.parts and _is_split(folder.parts[0]) else {}
