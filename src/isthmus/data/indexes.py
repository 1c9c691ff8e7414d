"""Where every record of a user's data stands: numbers that are written to a file as records are read, and then mapped.

A file is eight-byte integers: a row that says what follows, a row per sample, the numbers of those held out, and the
names of the publisher's splits. So neither reading a million records through nor opening them again takes memory that
grows with their number, but for eight bytes of each that is held out.
"""

from __future__ import annotations

import json
from array import array
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Literal, TypeAlias

import numpy as np

from isthmus.data.jsons import Place

COLUMNS = 5
"""Of a row: shard, line, first byte, the byte behind the last, and which of the record's samples it is."""
LOTS = 1 << 32
LARGEST = 0.1
"""The share of a small set that may be held out by its smallest lot."""
MARK = 0x495354484D5553
"""The first number of a file; it spells the project's name."""

Part: TypeAlias = Literal["all", "kept", "held out"]


@dataclass(frozen=True)
class Index:
    """What is known of data from reading it through.

    Attributes:
        rows: [samples, COLUMNS], in the order of the data.
        held_out: the numbers of the samples that are held out, ascending.
        skipped: how many faulty records were left out.
        splits: the publisher's splits that the data show, also those of which nothing is taken.
    """

    rows: np.ndarray
    held_out: np.ndarray
    skipped: int
    splits: tuple[str, ...] = ()

    def place(self, number: int) -> tuple[Place, int]:
        """Where a sample's record stands, and which of its samples it is."""
        shard, line, start, end, part = self.rows[number].tolist()
        return Place(shard, line, start, end), part


class Chosen:
    """The numbers of a part of the samples. Where nothing is held out, both parts are all of them."""

    def __init__(self, index: Index, part: Part) -> None:
        held, samples = index.held_out, len(index.rows)
        self.part: Part = "all" if len(held) in (0, samples) else part
        self._held = held
        self._before = held - np.arange(len(held))
        """How many samples that are kept stand before each that is not."""
        self._size = {"all": samples, "kept": samples - len(held), "held out": len(held)}[self.part]

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, place: int) -> int:
        place = range(self._size)[place]
        if self.part == "held out":
            return int(self._held[place])
        if self.part == "kept":
            return place + int(np.searchsorted(self._before, place, side="right"))
        return place


class Writer:
    """Writes an index to a stream while data are read through."""

    def __init__(self, stream: BinaryIO) -> None:
        self.samples = self.skipped = 0
        self.splits: dict[str, None] = {}
        self._stream, self._held = stream, array("q")
        self._least, self._spare = LOTS, array("q")  # the samples of the smallest lot
        stream.write(bytes(8 * COLUMNS))  # the first row is known at the end

    def add(self, place: Place, part: int, lot: int) -> None:
        """Enter a sample; of the lots from 0 to `LOTS`, the lowest fiftieth is held out."""
        if lot < LOTS // 50:
            self._held.append(self.samples)
        if lot < self._least:
            self._least, self._spare = lot, array("q")
        if lot == self._least:
            self._spare.append(self.samples)
        self.samples += 1
        self._stream.write(array("q", (place.shard, place.line, place.start, place.end, part)).tobytes())

    def finish(self) -> None:
        """Write the end. Chance may spare all of a small set: its smallest lot is held out then, if it is not much."""
        if not self._held and len(self._spare) <= self.samples * LARGEST:
            self._held = self._spare
        self._stream.write(self._held.tobytes())
        names = json.dumps(list(self.splits)).encode()
        self._stream.write(names.ljust(-(-len(names) // 8) * 8))
        self._stream.seek(0)
        self._stream.write(array("q", (MARK, self.samples, len(self._held), self.skipped, 0)).tobytes())
        self._stream.flush()


def load(file: Path | BinaryIO) -> Index:
    """An index from what a `Writer` has finished; its numbers stay in the file.

    Raises:
        OSError: there is none.
        ValueError: it is damaged.
    """
    numbers = np.memmap(file, np.int64, "r")
    if len(numbers) < COLUMNS or numbers[0] != MARK:
        raise ValueError("not an index")
    samples, held, skipped = numbers[1:4].tolist()
    end = COLUMNS * (1 + samples)
    if min(samples, held) < 0 or len(numbers) <= end + held:
        raise ValueError("an index that was cut")
    splits = tuple(json.loads(numbers[end + held :].tobytes()))
    rows, held_out = numbers[COLUMNS:end].reshape(samples, COLUMNS), np.array(numbers[end : end + held])
    return Index(rows, held_out, skipped, splits)
