"""Samples written as LLaVA JSON, `messages` JSONL, Parquet or WebDataset tars, and read again as they were.

Every format has texts with markers: `<image>` and `<video>` for the media of the record, `<ref-object><bbox>` for the
regions in its `objects`.
"""

from __future__ import annotations

import io
import json
import os
import tarfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any, Literal, TextIO, TypeAlias

from PIL import Image as Pillow

from isthmus.data.attached import IMAGE, NAMED, REGION, VIDEO
from isthmus.data.media import FORMATS, open_image
from isthmus.types import Box, ConfigError, DataError, Image, Part, Sample, Text, Video

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
        ConfigError: something is there already, or what writes it is not installed.
        DataError: a sample holds what files cannot say.
    """
    if out.exists():
        raise ConfigError(f"{out} is there already", "name another place, or remove it")
    out.parent.mkdir(parents=True, exist_ok=True)
    return WRITERS[to](samples, out)


@dataclass(frozen=True)
class _Written:
    """A sample as a record, apart from how its messages are called."""

    said: Sequence[tuple[str, str]]
    """Role and text with markers."""
    media: dict[str, list[str]]
    objects: dict[str, Any] | None

    def record(self, sample: Sample) -> dict[str, Any]:
        messages = [{"role": role, "content": text} for role, text in self.said]
        return {"id": sample.id, "messages": messages, **self.beside(sample)}

    def llava(self, sample: Sample) -> dict[str, Any]:
        images = self.media["images"]
        single: dict[str, Any] = {"image": images[0]} if len(images) == 1 else {}
        beside = {key: value for key, value in self.beside(sample).items() if not (single and key == "images")}
        conversations = [{"from": ROLES[role], "value": text} for role, text in self.said]
        return {"id": sample.id, **single, "conversations": conversations, **beside}

    def beside(self, sample: Sample) -> dict[str, Any]:
        media = {key: names for key, names in self.media.items() if names}
        meta = {key: value for key, value in sample.meta.items() if key not in ("file", "line")}
        return {
            **media,
            **({"objects": self.objects} if self.objects else {}),
            **({"meta": meta} if meta else {}),
        }


def _written(sample: Sample, keep: Keep, name: str) -> _Written:
    media: dict[str, list[str]] = {"images": [], "videos": []}
    regions: list[Box] = []

    def spelled(part: Part) -> str:
        if isinstance(part, Image | Video):
            listed = media["images" if isinstance(part, Image) else "videos"]
            listed.append(keep(part, f"{name}.{len(media['images']) + len(media['videos'])}"))
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
    if sample.branches or sample.pair:
        raise DataError(f"sample {sample.id}: files hold one conversation per record", "give each one a sample")
    said = [(turn.role, "".join(map(spelled, turn.parts))) for turn in sample.turns]
    refs = [box.label for box in regions if box.label]
    objects = {"ref": refs, "bbox": [list(box.xyxy) for box in regions], "bbox_type": "norm1"} if regions else None
    return _Written(said, media, objects)


def _refuse_markers(sample: Sample) -> None:
    """A marker that somebody wrote as a word would be read as a picture or region."""
    parts = [part for turn in sample.turns for part in turn.parts]
    regions = any(isinstance(part, Box) for part in parts)
    videos = any(isinstance(part, Video) for part in parts)
    meant = (IMAGE, *((VIDEO,) if videos else ()), *((REGION, NAMED) if regions else ()))
    for part in parts:
        for marker in meant:
            if isinstance(part, Text) and marker in part.text:
                raise DataError(f"sample {sample.id}: a text holds the word {marker}", "write it in another way")


# ---------------------------------------------------------------------------------------------- JSON


def _llava(samples: Iterable[Sample], out: Path) -> int:
    count = 0
    with _whole(out) as stream:
        stream.write("[")
        for sample in samples:
            stream.write(",\n" if count else "\n")
            json.dump(_written(sample, _beside(out), f"{count:09d}").llava(sample), stream, ensure_ascii=False)
            count += 1
        stream.write("\n]\n")
    return count


def _messages(samples: Iterable[Sample], out: Path) -> int:
    count = 0
    with _whole(out) as stream:
        for sample in samples:
            json.dump(_written(sample, _beside(out), f"{count:09d}").record(sample), stream, ensure_ascii=False)
            stream.write("\n")
            count += 1
    return count


@contextmanager
def _whole(out: Path) -> Iterator[TextIO]:
    """A text file that appears when it is finished."""
    part = out.with_name(f".{os.getpid()}-{out.name}")
    try:
        with part.open("w", encoding="utf-8", newline="\n") as stream:
            yield stream
        part.replace(out)
    finally:
        part.unlink(missing_ok=True)


def _beside(out: Path) -> Keep:
    """Media on the disk stay there; what came from elsewhere is put into a folder beside the file."""

    def keep(medium: Image | Video, name: str) -> str:
        if isinstance(medium.source, str | Path):
            return os.path.relpath(Path(medium.source).resolve(), out.parent.resolve())
        data, ending = _bytes(medium)
        folder = out.parent / f"{out.stem}_files"
        folder.mkdir(exist_ok=True)
        (folder / f"{name}.{ending}").write_bytes(data)
        return f"{folder.name}/{name}.{ending}"

    return keep


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
    features = datasets.Features(
        {
            "id": text,
            "messages": datasets.List({"role": text, "content": text}),
            "images": datasets.List(datasets.Image(decode=False)),
            "objects": {
                "ref": datasets.List(text),
                "bbox": datasets.List(datasets.List(datasets.Value("float64"))),
                "bbox_type": text,
            },
        }
    )
    schema, count, rows = features.arrow_schema, 0, iter(samples)
    with parquet.ParquetWriter(out, schema) as writer:
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
    return {**{key: record.get(key) for key in ("id", "messages", "objects")}, "images": files}


def _webdataset(samples: Iterable[Sample], out: Path) -> int:
    out.mkdir()
    count, rows = 0, iter(samples)
    for first in rows:
        shard = chain([first], islice(rows, SHARD - 1))
        with tarfile.open(out / f"{count // SHARD:06d}.tar", "w", format=tarfile.USTAR_FORMAT) as archive:
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
    add(f"{name}.json", json.dumps(record, ensure_ascii=False).encode())


WRITERS: dict[str, Callable[[Iterable[Sample], Path], int]] = {
    "llava": _llava,
    "messages": _messages,
    "parquet": _parquet,
    "webdataset": _webdataset,
}
"""By format."""
ENDINGS: dict[str, To] = {".json": "llava", ".jsonl": "messages", ".parquet": "parquet", "": "webdataset"}
"""The format that a path's ending stands for; a folder is of tars."""
