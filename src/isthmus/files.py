"""Files that take their place whole or not at all, what a disk that refuses is told as, and a content's hash."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from isthmus.errors import IsthmusError


@contextlib.contextmanager
def replacing(path: Path, durable: bool = False) -> Iterator[Path]:
    """Where to write a file or a folder that is put in place when the block ends well.

    Whoever reads finds what was there before or the new one, whole, even if the process is killed meanwhile. Several
    may write the same at once, and the last one stays. If the block fails or writes nothing, all is as it was.

    Args:
        path: its place, in a folder that exists; a folder goes where there is none.
        durable: whether a file is on the disk before it is put in place, and its name after that, so that a power cut
            leaves one of both, too. What can be made again need not wait for that.
    """
    part = path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")
    try:
        yield part
        if part.exists():
            if durable:
                sync(part)
            part.replace(path)
            if durable:
                sync(path.parent)
    finally:
        if part.is_dir():
            shutil.rmtree(part, ignore_errors=True)
        else:
            part.unlink(missing_ok=True)


def remove(folder: Path) -> None:
    """Delete a folder so that no half of it is ever taken for the whole, and what an interrupted call left of it."""
    doomed = folder.with_name(f".{folder.name}.old")
    shutil.rmtree(doomed, ignore_errors=True)
    if folder.exists():
        folder.rename(doomed)
        shutil.rmtree(doomed)


def sweep(folder: Path) -> None:
    """Remove what killed processes left half-written in a folder, in which nobody may be writing."""
    for part in folder.glob(".*.part"):
        if part.is_dir():
            shutil.rmtree(part, ignore_errors=True)
        else:
            with contextlib.suppress(OSError):
                part.unlink()


def write_text(path: Path, text: str) -> None:
    """Replace a file's text at once and durably; halves of surrogate pairs, which no file holds, as JSON does."""
    with replacing(path, durable=True) as part:
        part.write_text(text, encoding="utf-8", errors="backslashreplace")


def read_json(file: Path, remedy: str) -> Any:
    """What a JSON file holds that nothing can make again.

    Raises:
        IsthmusError: it is damaged, or not there.
    """
    try:
        return json.loads(file.read_bytes())
    except (OSError, ValueError) as error:
        raise IsthmusError(f"{file} cannot be read ({error})", remedy) from None


def read_note(path: Path) -> dict[str, Any]:
    """What a JSON file holds that can be made again: nothing where it is missing or damaged."""
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turns a disk that refuses into a cause and a remedy."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise IsthmusError(
            f"{path}: cannot be written ({reason})",
            "free some space or make the folder writable, then run again: it goes on from the last checkpoint",
        ) from error


def sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    with contextlib.suppress(PermissionError):  # Windows opens no folders
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def sha256(path: Path) -> str:
    """The sha256 of a file's content, in hex digits."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
