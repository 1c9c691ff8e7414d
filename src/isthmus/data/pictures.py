"""Bare pictures: the files of a folder, or what other sets show, without a word of what they say about it."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b
from itertools import accumulate
from pathlib import Path
from typing import Annotated

from pydantic import Field, model_validator

from isthmus.config import Frozen, OneSource, Source
from isthmus.data.faults import readable
from isthmus.data.folders import below
from isthmus.types import DataError, Image, Sample, Turn

ENDINGS = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".webp")


class PictureOptions(Frozen):
    """Options of `pictures`."""

    of: Annotated[tuple[OneSource, ...], Field(min_length=1)] = (
        Source(name="naming"),
        Source(name="scenes", options={"kinds": ["caption"]}),
    )
    """Sets whose samples are shown, every one once, without questions and answers; a source with `images` has that
    folder's pictures instead."""

    @model_validator(mode="after")
    def _plain(self) -> PictureOptions:
        if any(source.name in ("documents", "pictures") or source.weight != 1 for source in self.of):
            raise ValueError("pictures are those of other sets, each of their samples once; give no weights in `of`")
        if any(source.tags or source.route is not None for source in self.of):
            raise ValueError("pictures are shown without what belongs to them; give no tags or route in `of`")
        return self


@dataclass(frozen=True)
class Pictures:
    """The shelves' samples one after another."""

    shelves: tuple[Sequence[Sample], ...]
    """The opened sets of `options.of`."""

    def __len__(self) -> int:
        return sum(map(len, self.shelves))

    def sample(self, index: int) -> Sample:
        """
        Raises:
            DataError: the sample shows nothing.
        """
        starts = [0, *accumulate(map(len, self.shelves))]
        shelf = bisect_right(starts, index) - 1
        one = self.shelves[shelf][index - starts[shelf]]
        if not one.media:
            raise DataError(f"sample {one.id} shows no picture", "name sets in which every sample shows one")
        tags = {"tags": one.meta["tags"]} if "tags" in one.meta else {}  # of its record, for a tagger that reads them
        return Sample((Turn("user", one.media),), f"pictures/{one.id}", {"kind": "picture", "cluster": one.id, **tags})


def files(folder: Path, split: str) -> list[Path]:
    """Picture files below a folder, in the order of their names: one in fifty, by its name, is held out as `val`, and
    `test` is all of them. A handful leaves nothing to hold out: both parts are then the whole folder.

    Raises:
        DataError: there is no picture, or no such folder.
    """
    with readable(folder):
        found = sorted(file for file in below(folder) if file.suffix.lower() in ENDINGS)
    if not found:
        raise DataError(f"{folder} holds no picture", f"name a folder with files that end in {', '.join(ENDINGS)}")
    held = {file for file in found if _hash(file.relative_to(folder).as_posix()) % 50 == 0}
    parts = {"train": [file for file in found if file not in held], "val": [file for file in found if file in held]}
    return parts.get(split) or found


def shown(file: Path) -> Sample:
    """A file as a sample."""
    return Sample((Turn("user", (Image(file),)),), f"pictures/{file}", {"kind": "picture", "cluster": str(file)})


def _hash(name: str) -> int:
    return int.from_bytes(blake2b(name.encode(), digest_size=8).digest())
