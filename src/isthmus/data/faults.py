"""What is wrong with one record of a user's data: where, which, what, and how to repair it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from isthmus.types import DataError

SHOWN = 3
"""So many faults are spelled out when a file is refused."""


@dataclass(frozen=True)
class Fault:
    """What is wrong with one record, where it starts, and how to repair it. `line` counts from 1.

    In tables without lines it is the row, in tars the number of the sample; `file` says in which of several files, and
    `missing` which picture or video is not there.
    Halves of surrogate pairs, which nothing prints, are spelled out.
    """

    line: int
    id: str
    message: str
    remedy: str
    file: str = ""
    missing: str = ""

    def __post_init__(self) -> None:
        for name in ("id", "message", "file", "missing"):
            object.__setattr__(self, name, getattr(self, name).encode(errors="backslashreplace").decode())

    def __str__(self) -> str:
        name = f" ({self.id})" if self.id else ""
        return f"line {self.line}{name}: {self.message}"


class Wrong(Exception):
    """One fault of the record at hand; `id` and its publisher's `split` where there is no record to tell them, and
    the file that is `missing`.
    """

    def __init__(self, message: str, remedy: str, id: str = "", missing: str = "", split: str | None = None) -> None:
        super().__init__(message)
        self.message, self.remedy, self.id, self.missing, self.split = message, remedy, id, missing, split


@contextlib.contextmanager
def readable(path: Path) -> Iterator[None]:
    """Says in our words what the system says of files.

    Raises:
        DataError: something of this file or folder, or beside it, cannot be read or kept.
    """
    try:
        yield
    except OSError as error:
        cause = error.strerror or "not a valid path"
        remedy = "check that it is there, its permissions, and the space on the disk"
        raise DataError(f"{error.filename or path}: cannot be opened or kept ({cause})", remedy) from None


def refuse(path: Path, faults: Sequence[Fault], samples: int) -> None:
    """Raise what is wrong with a file, if anything.

    Raises:
        DataError: it has faults, or no sample.
    """
    if faults:
        shown = "; ".join(map(str, faults[:SHOWN]))
        more = f" … {len(faults)} faults in all" if len(faults) > SHOWN else ""
        raise DataError(f"{path}: {shown}{more}", f"{faults[0].remedy}; `isthmus data check` lists every fault")
    if not samples:
        raise DataError(f"{path}: holds no conversation", "give it at least one record")
