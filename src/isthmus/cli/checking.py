"""What `isthmus data check` prints: the first of alike faults, where missing pictures lie instead, repeated ids."""

from __future__ import annotations

import re
from array import array
from collections import Counter
from collections.abc import Iterator
from hashlib import blake2b
from os.path import isfile
from pathlib import Path

import numpy as np

from isthmus.data.faults import SHOWN, Fault
from isthmus.data.formats import Form, Record

VARIES = re.compile(r"\S*[\d/\\.]\S*|'[^']*'|\"[^\"]*\"")
"""What differs between the messages of alike faults: numbers, paths and what is quoted."""
TOLD = 2
"""Words of a message that say, with the repair, what kind of fault it is; names with spaces may follow."""


class Telling:
    """The lines of faults.

    Args:
        every: each fault has one; otherwise those after the first `SHOWN` of a kind are counted.
    """

    def __init__(self, form: Form, every: bool = False) -> None:
        self.form, self.every = form, every
        self._kinds = Counter[tuple[str, ...]]()
        self._first = dict[tuple[str, ...], Fault]()
        self._elsewhere = set[Path]()

    def lines(self, fault: Fault) -> Iterator[str]:
        """What is said as soon as a fault is found."""
        kind = (VARIES.sub("…", fault.remedy), *VARIES.sub("…", fault.message).split()[:TOLD])
        self._kinds[kind] += 1
        self._first.setdefault(kind, fault)
        if not self.every and self._kinds[kind] > SHOWN:
            return
        name = "" if _says_the_line(fault) else f"{fault.id}: "
        yield f"{fault.file or self.form.path}:{fault.line}: {name}{fault.message}; {fault.remedy}"
        yield from self._found(fault)

    def rest(self) -> Iterator[str]:
        """What is said of the others at the end."""
        for kind, count in self._kinds.items():
            if not self.every and count > SHOWN:
                first = self._first[kind]
                yield f"{count - SHOWN:,} more like that of line {first.line}: {first.message} (--all lists them)"

    def _found(self, fault: Fault) -> Iterator[str]:
        """Where a picture lies that is missing, if it is beside the file or in a folder there; of each folder once."""
        if not fault.missing:
            return
        start = self.form.path if self.form.path.is_dir() else self.form.path.parent
        for folder in (start, *sorted(one for one in start.iterdir() if one.is_dir())):
            there = isfile(folder / fault.missing)  # noqa: PTH113 - Path's own raises where the name is too long
            if there and folder not in self._elsewhere and folder != self.form.folder:
                self._elsewhere.add(folder)
                yield f"{fault.missing} lies in {folder}/: --images {folder}"


class Ids:
    """Ids that samples have had before: predictions are kept by them, and joined by them to what was asked.

    Of a sample 16 bytes are remembered: a hash of its id, and where its record starts.
    """

    def __init__(self) -> None:
        self._hashes, self._places = array("Q"), array("Q")
        self._files: dict[str, int] = {}

    def add(self, record: Record) -> None:
        """Remember a sample."""
        self._hashes.frombytes(blake2b(record.sample.id.encode(errors="replace"), digest_size=8).digest())
        file = self._files.setdefault(record.file, len(self._files))
        self._places.append(file << 40 | record.line)

    def lines(self) -> Iterator[str]:
        """What is said at the end, if an id is there twice: where first, and how many there are in all."""
        hashes = np.array(self._hashes)
        order = np.argsort(hashes, kind="stable")
        again = order[1:][hashes[order][1:] == hashes[order][:-1]]
        if again.size:
            second = again.min()
            first = np.flatnonzero(hashes[: second + 1] == hashes[second])[0]
            count = f"{again.size:,} samples have" if again.size > 1 else "one sample has"
            yield (
                f"warning: {count} an id that was there before, first {self._where(second)}, which has that of "
                f"{self._where(first)}: predictions are told apart by their order alone; give each an id of its own"
            )

    def _where(self, number: int) -> str:
        file, line = divmod(self._places[number], 1 << 40)
        return f"{list(self._files)[file]}:{line}"


def _says_the_line(fault: Fault) -> bool:
    """Whether the id is none of the record's own, but made of its file and line, and says no byte."""
    return not fault.id or re.fullmatch(rf"(.*:)?{fault.line}", fault.id, re.DOTALL) is not None
