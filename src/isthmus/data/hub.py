"""Data sets of the Hugging Face Hub by their names, as its cache on this machine holds them; nothing is downloaded."""

from __future__ import annotations

import re
from pathlib import Path

from isthmus.types import DataError

NAME = re.compile(r"([\w.-]+/[\w.-]+)(?:/(.+))?")
"""`owner/name`, and perhaps a path in it."""


def located(name: str | Path) -> Path:
    """The path, if there is something; else what the cache holds of a data set so named; else the path again."""
    path, found = Path(name), NAME.fullmatch(str(name))
    if found is None or path.exists():
        return path
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        folder = snapshot_download(found[1], repo_type="dataset", local_files_only=True)
    except (HFValidationError, LocalEntryNotFoundError, OSError):
        return path
    return Path(folder) / (found[2] or "")


def there(name: str | Path) -> Path:
    """As `located`, of what must be there.

    Raises:
        DataError: there is no such file, and nothing of such a data set in the cache.
    """
    path = located(name)
    if not path.exists():
        found = NAME.fullmatch(str(name))
        fetch = f", or fetch it first: hf download --repo-type dataset {found[1]}" if found and not path.suffix else ""
        raise DataError(f"{name}: nothing is there", f"check the path{fetch}")
    return path
