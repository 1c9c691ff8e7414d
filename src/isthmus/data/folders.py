"""What lies below a folder of a user's, and how it is called there."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path


def below(folder: Path) -> Iterator[Path]:
    """Every file below a folder, and below the folders that links there lead to.

    A link that leads back to a folder in which it lies is passed over.
    """
    return _below(folder, (Path(os.path.realpath(folder)),))


def _below(folder: Path, above: Sequence[Path]) -> Iterator[Path]:
    """`above` are the real paths of the folder and of those through which it was reached."""
    with os.scandir(folder) as entries:
        found = list(entries)
    for entry in found:
        path = Path(entry.path)
        if not entry.is_dir():
            yield path
            continue
        real = Path(os.path.realpath(path)) if entry.is_symlink() else above[-1] / entry.name
        if not any(one.is_relative_to(real) for one in above):
            yield from _below(path, (*above, real))


def called(file: Path, path: Path) -> str:
    """A file's path below the folder of a data set, whose names may say what it holds; elsewhere its name."""
    return (file.relative_to(path) if file.is_relative_to(path) and file != path else Path(file.name)).as_posix()
