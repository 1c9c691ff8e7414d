"""What the files hold that samples only name: pictures, videos and sounds on the disk, as digits that tell a change.

A file is known by its size and its ends. Most of what looking costs, some tenths of a second per thousand, is reading
the records that name them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path

from isthmus.config import Source, check
from isthmus.data import sets, video
from isthmus.types import Medium, Sample

END = 1 << 14
"""Bytes that are read at either end of a file."""
MOST = 10_000
"""Samples that are looked at; of more, as many evenly spread."""


def digits(samples: Sequence[Sample]) -> str | None:
    """Sixteen hex digits that change with the files that samples show; None where they show none."""
    step = max(1, -(-len(samples) // MOST))
    named = (_file(medium) for place in range(0, len(samples), step) for medium in samples[place].media)
    files = dict.fromkeys(file for file in named if file is not None)
    if not files:
        return None
    digest = hashlib.sha256()
    for file in files:
        digest.update(_ends(file))
    return digest.hexdigest()[:16]


def of(source: Source, seed: int) -> str | None:
    """The same of all that is trained on and held out of a source; of generated sets, None."""
    found = [
        digits(sets.open_set(part, seed))
        for leaf in _leaves(source)
        for part in (leaf, leaf.but(split="val", limit=None))[: 2 if leaf.split == "train" else 1]
    ]
    told = "".join(one for one in found if one is not None)
    return hashlib.sha256(told.encode()).hexdigest()[:16] if told else None


def _leaves(source: Source) -> Iterator[Source]:
    """The files and folders that a source reads, its own and those of the sets that it is made of."""
    if source.name not in sets.EMBEDDED or source.images is not None:
        yield source
    elif source.name in sets.MADE_OF:
        for each in check(sets.MADE_OF[source.name], source.options, source.name).of:
            yield from _leaves(each.but(split=source.split))


def _file(medium: Medium) -> Path | None:
    """Where a medium lies, unless it is drawn or came with its record."""
    source = medium.source.clip.source if isinstance(medium.source, video.Frame) else medium.source
    return Path(source) if isinstance(source, str | Path) else None


def _ends(file: Path) -> bytes:
    """A file's size and what stands at its ends; of one that cannot be read, that it cannot."""
    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            head = stream.read(END)
            stream.seek(max(len(head), size - END))
            return hashlib.sha256(b"%d %s" % (size, head + stream.read(END))).digest()
    except OSError:
        return b"none"
