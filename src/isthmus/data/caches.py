"""What reading data and encoding pictures leaves on the disk, and how to be rid of what is no longer of use.

Everything here is made again when it is wanted; embedded models and data are not among it.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from isthmus.assets import home
from isthmus.types import IsthmusError

KINDS = {"indexes": "*", "tables": "*/*", "features": "*"}
"""Folders in Isthmus's home, and where in them the things lie that go by themselves: where records stand (and copies of
those that are joined), Parquet that was unpacked, and what encoders see in pictures."""
DAY = 24 * 3600.0


@dataclass(frozen=True)
class Cache:
    """One thing that may go by itself: an index with its copy, a table's folder, the features of one encoder."""

    name: str
    paths: tuple[Path, ...]
    size: int
    """In bytes."""
    used: float
    """When one of its files was last read or written, as the disk tells, in seconds since 1970."""

    def remove(self) -> None:
        """Delete its files and folders.

        Raises:
            IsthmusError: the system refuses.
        """
        try:
            for path in self.paths:
                shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
        except OSError as error:
            cause = f"{error.filename or self.name}: cannot be removed ({error.strerror})"
            raise IsthmusError(cause, "check who owns it, and its permissions") from None


def caches() -> list[Cache]:
    """All of them, the one that was of use longest ago first."""
    return sorted((cache for kind in KINDS for cache in _of(kind)), key=lambda cache: (cache.used, cache.name))


def idle(found: list[Cache], days: float | None = None, keep: int | None = None) -> list[Cache]:
    """Those of no use for so many days; and the oldest, until the others take no more than `keep` bytes."""
    before = time.time() - days * DAY if days is not None else float("-inf")
    old = [cache for cache in found if cache.used < before]
    if keep is None:
        return old
    rest = [cache for cache in found if cache.used >= before]
    while rest and sum(cache.size for cache in rest) > keep:
        old.append(rest.pop(0))
    return old


def _of(kind: str) -> Iterator[Cache]:
    groups: dict[str, list[Path]] = {}
    for path in sorted((home() / kind).glob(KINDS[kind])):
        groups.setdefault(str((path if path.is_dir() else path.with_suffix("")).relative_to(home())), []).append(path)
    for name, paths in groups.items():
        files = [file for path in paths for file in (path.rglob("*") if path.is_dir() else [path])]
        states = [state for file in files if (state := _state(file)) is not None]
        used = max((max(state.st_mtime, state.st_atime) for state in states), default=0.0)
        yield Cache(name, tuple(paths), sum(state.st_size for state in states), used)


def _state(path: Path) -> os.stat_result | None:
    """What the system says of a file; None of a folder, or where it has just gone."""
    try:
        return None if path.is_dir() else path.stat()
    except FileNotFoundError:
        return None
