"""Samples written as LLaVA JSON, `messages` JSONL, Parquet or WebDataset tars, and read again as they were.

Every format has texts with markers: `<image>` and `<video>` for the media of the record, `<ref-object><bbox>` for the
regions in its `objects`. `meta` becomes JSON: dates stand there as ISO 8601 writes them, and decimals as their digits,
as texts. What is written gets its name when it is whole, and is removed if something goes wrong.
"""

from __future__ import annotations

import io
import json
import os
import tarfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import date, time
from decimal import Decimal
from itertools import chain, islice
from pathlib import Path
from typing import Any, Literal, TypeAlias

from PIL import Image as Pillow

from isthmus.data.attached import FOREIGN, IMAGE, MARKERS, NAMED, REGION, VIDEO
from isthmus.data.media import FORMATS, open_image
from isthmus.files import replacing
from isthmus.types import Box, ConfigError, DataError, Image, Part, Sample, Text, Turn, Video

To: TypeAlias = Literal["llava", "messages", "parquet", "webdataset"]
SHARD = 1000
"""Samples of one tar."""
BATCH = 256
"""Rows that Parquet is given at once."""
ROLES = {"user": "human", "assistant": "gpt", "system": "system"}

Keep: TypeAlias = Callable[[Image | Video, str], str]
"""Keeps a medium, and says under which name; the second argument is a name that nothing else has."""


def write(samples: Iterable[Sample], out: Path, to: To) -> int:
    """Write samples, and say how many.

    Raises:
        ConfigError: something is there already, its name would not be read again, or what writes it is not installed.
        DataError: a sample holds what files cannot say.
    """
    ending = next(ending for ending, format in ENDINGS.items() if format == to)
    if ending and out.suffix != ending:
        raise ConfigError(f"{out} would not be read again as {to}", f"name it {out.with_suffix(ending)}")
    if not ending and out.suffix == ".tar":
        raise ConfigError(f"{out} is one file, and {to} is a folder of tars", f"name it {out.with_suffix('')}")
    refuse_taken(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    return WRITERS[to](samples, out)


def refuse_taken(place: Path) -> None:
    """Nothing is written over.

    Raises:
        ConfigError: something is there already.
    """
    if place.exists():
        raise ConfigError(f"{place} is there already", "name another place, or remove it")


@dataclass(frozen=True)
class _Written:
    """A sample as a record, apart from how its messages are called."""

    said: Sequence[tuple[str, str, dict[str, int]]]
    """Role, text with markers, and the weight 0 of an answer that is not learnt."""
    other: Sequence[tuple[str, str, dict[str, int]]]
    """The same of the pair's other ending."""
    media: dict[str, list[str]]
    objects: dict[str, Any] | None

    def record(self, sample: Sample) -> dict[str, Any]:
        return {"id": sample.id, "messages": _messages_of(self.said), **self.beside(sample)}

    def llava(self, sample: Sample) -> dict[str, Any]:
        images = self.media["images"]
        single: dict[str, Any] = {"image": images[0]} if len(images) == 1 else {}
        beside = {key: value for key, value in self.beside(sample).items() if not (single and key == "images")}
        conversations = [{"from": ROLES[role], "value": text, **weight} for role, text, weight in self.said]
        return {"id": sample.id, **single, "conversations": conversations, **beside}

    def beside(self, sample: Sample) -> dict[str, Any]:
        media = {key: names for key, names in self.media.items() if names}
        meta = {key: value for key, value in sample.meta.items() if key not in ("file", "line")}
        return {
            **media,
            **({"rejected": _messages_of(self.other)} if self.other else {}),
            **({"objects": self.objects} if self.objects else {}),
            **({"meta": meta} if meta else {}),
        }


def _written(sample: Sample, keep: Keep, name: str) -> _Written:
    media: dict[str, list[Any]] = {"images": [], "videos": []}
    regions: list[Box] = []

    def spelled(part: Part) -> str:
        if isinstance(part, Image | Video):
            listed = media["images" if isinstance(part, Image) else "videos"]
            path = keep(part, f"{name}.{len(media['images']) + len(media['videos'])}")
            cut = isinstance(part, Video) and part.span is not None
            listed.append({"path": path, "span": list(part.span)} if cut else path)  # type: ignore[union-attr,arg-type]
            return IMAGE if isinstance(part, Image) else VIDEO
        if isinstance(part, Box):
            regions.append(part)
            return (NAMED if part.label else "") + REGION
        if isinstance(part, Text):
            return part.text
        raise DataError(
            f"sample {sample.id}: files cannot hold a {type(part).__name__.lower()}", "leave this sample out"
        )

    _refuse_markers(sample)
    if sample.branches:
        raise DataError(f"sample {sample.id}: files hold one conversation per record", "give each one a sample")
    said, other = (
        [(turn.role, "".join(map(spelled, turn.parts)), _weight(turn, sample)) for turn in ending]
        for ending in (sample.turns, sample.pair or ())
    )
    refs = [box.label for box in regions if box.label]
    objects = {"ref": refs, "bbox": [list(box.xyxy) for box in regions], "bbox_type": "norm1"} if regions else None
    return _Written(said, other, media, objects)


def _messages_of(said: Sequence[tuple[str, str, dict[str, int]]]) -> list[dict[str, Any]]:
    return [{"role": role, "content": text, **weight} for role, text, weight in said]


def _weight(turn: Turn, sample: Sample) -> dict[str, int]:
    given = [isinstance(part, Text) and part.given for part in turn.parts]
    if turn.role != "assistant" or not any(given):
        return {}
    if not all(given):
        raise DataError(f"sample {sample.id}: files cannot hold an answer that is learnt in part", "leave it out")
    return {"weight": 0}


def marker_in(text: str) -> str:
    """A marker that somebody wrote as a word, which would be read as a picture or region, or not at all."""
    foreign = FOREIGN.search(text)
    return next((marker for marker in MARKERS if marker in text), foreign[0] if foreign else "")


def _refuse_markers(sample: Sample) -> None:
    for turn in (*sample.turns, *(sample.pair or ())):
        for part in turn.parts:
            marker = marker_in(part.text) if isinstance(part, Text) else ""
            if marker:
                raise DataError(f"sample {sample.id}: a text holds the word {marker[:80]}", "write it in another way")


# ---------------------------------------------------------------------------------------------- JSON


def _json(record: Any, sample: Sample) -> str:
    """JSON with its letters as they are, but for halves of surrogate pairs: no file holds them, and JSON spells them.

    Raises:
        DataError: `meta` holds what JSON has no word for, bytes say.
    """

    def spelled(value: Any) -> str:
        if isinstance(value, date | time):
            return value.isoformat()
        if isinstance(value, Decimal):
            return str(value)
        cause = f"sample {sample.id}: its meta holds a value of type {type(value).__name__}, which JSON cannot say"
        raise DataError(cause, "write it as a text, or leave it out of meta")

    text = json.dumps(record, ensure_ascii=False, default=spelled)
    return text.encode(errors="backslashreplace").decode()


def _llava(samples: Iterable[Sample], out: Path) -> int:
    count = 0
    with replacing(out) as part, _beside(out) as keep, part.open("w", encoding="utf-8", newline="\n") as stream:
        stream.write("[")
        for sample in samples:
            stream.write(",\n" if count else "\n")
            stream.write(_json(_written(sample, keep, f"{count:09d}").llava(sample), sample))
            count += 1
        stream.write("\n]\n")
    return count


def _messages(samples: Iterable[Sample], out: Path) -> int:
    count = 0
    with replacing(out) as part, _beside(out) as keep, part.open("w", encoding="utf-8", newline="\n") as stream:
        for sample in samples:
            stream.write(_json(_written(sample, keep, f"{count:09d}").record(sample), sample) + "\n")
            count += 1
    return count


@contextmanager
def _beside(out: Path) -> Iterator[Keep]:
    """Media on the disk stay there; what came from elsewhere is put into a folder beside the file."""
    folder = out.with_name(f"{out.stem}_files")
    with replacing(folder) as part:

        def keep(medium: Image | Video, name: str) -> str:
            if isinstance(medium.source, str | Path):
                return os.path.relpath(Path(medium.source).resolve(), out.parent.resolve())
            data, ending = _bytes(medium)
            refuse_taken(folder)
            part.mkdir(exist_ok=True)
            (part / f"{name}.{ending}").write_bytes(data)
            return f"{folder.name}/{name}.{ending}"

        yield keep


def _bytes(medium: Image | Video) -> tuple[bytes, str]:
    """A medium's file, and its ending."""
    source = medium.source
    if isinstance(source, str | Path):
        path = Path(source)
        return path.read_bytes(), path.suffix.removeprefix(".").lower() or "bin"
    if isinstance(source, bytes):
        return source, "mp4" if isinstance(medium, Video) else _format(source)
    stream = io.BytesIO()
    open_image(source).save(stream, "PNG")
    return stream.getvalue(), "png"


def _format(data: bytes) -> str:
    with Pillow.open(io.BytesIO(data), formats=FORMATS) as picture:
        return (picture.format or "png").lower().replace("jpeg", "jpg")


# ---------------------------------------------------------------------------------------------- Parquet, tars


def _parquet(samples: Iterable[Sample], out: Path) -> int:
    try:
        import datasets
        import pyarrow
        from pyarrow import parquet
    except ModuleNotFoundError:
        raise ConfigError("Parquet needs the package datasets", "pip install 'isthmus[data]'") from None
    text = datasets.Value("string")
    said = datasets.List({"role": text, "content": text, "weight": datasets.Value("int8")})
    features = datasets.Features(
        {
            "id": text,
            "messages": said,
            "rejected": said,
            "images": datasets.List(datasets.Image(decode=False)),
            "objects": {
                "ref": datasets.List(text),
                "bbox": datasets.List(datasets.List(datasets.Value("float64"))),
                "bbox_type": text,
            },
            "meta": text,
        }
    )
    schema, count, rows = features.arrow_schema, 0, iter(samples)
    with replacing(out) as part, parquet.ParquetWriter(part, schema) as writer:
        while batch := [_row(sample, f"{count + place:09d}") for place, sample in enumerate(islice(rows, BATCH))]:
            writer.write_table(pyarrow.Table.from_pylist(batch, schema))
            count += len(batch)
    return count


def _row(sample: Sample, name: str) -> dict[str, Any]:
    files: list[dict[str, Any]] = []

    def keep(medium: Image | Video, name: str) -> str:
        if isinstance(medium, Video):
            raise DataError(f"sample {sample.id}: Parquet holds no videos", "write messages or webdataset")
        data, ending = _bytes(medium)
        files.append({"bytes": data, "path": f"{name}.{ending}"})
        return name

    record = _written(sample, keep, name).record(sample)
    told = {key: record.get(key) for key in ("id", "messages", "rejected", "objects")}
    try:
        json.dumps(told, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        cause = f"sample {sample.id}: half a surrogate pair stands outside its meta, which Parquet cannot hold"
        raise DataError(cause, "write the whole character, or another format") from None
    return {**told, "images": files, "meta": _json(record["meta"], sample) if "meta" in record else None}


def _webdataset(samples: Iterable[Sample], out: Path) -> int:
    count, rows = 0, iter(samples)
    with replacing(out) as part:
        part.mkdir()
        for first in rows:
            shard = chain([first], islice(rows, SHARD - 1))
            with tarfile.open(part / f"{count // SHARD:06d}.tar", "w", format=tarfile.USTAR_FORMAT) as archive:
                for sample in shard:
                    _pack(archive, sample, f"{count:09d}")
                    count += 1
    return count


def _pack(archive: tarfile.TarFile, sample: Sample, name: str) -> None:
    def add(file: str, data: bytes) -> None:
        info = tarfile.TarInfo(file)
        info.size = len(data)
        archive.addfile(info, io.BytesIO(data))

    def keep(medium: Image | Video, name: str) -> str:
        data, ending = _bytes(medium)
        add(f"{name}.{ending}", data)
        return f"{name}.{ending}"

    record = _written(sample, keep, name).record(sample)
    add(f"{name}.json", _json(record, sample).encode())


WRITERS: dict[str, Callable[[Iterable[Sample], Path], int]] = {
    "llava": _llava,
    "messages": _messages,
    "parquet": _parquet,
    "webdataset": _webdataset,
}
"""By format."""
ENDINGS: dict[str, To] = {".json": "llava", ".jsonl": "messages", ".parquet": "parquet", "": "webdataset"}
"""The format that a path's ending stands for; a folder is of tars."""
