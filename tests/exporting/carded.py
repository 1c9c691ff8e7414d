"""What a card tells its reader to run, run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from composed import picture


def run(folder: Path, beside: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The names that the code at the end of a folder's card leaves, with a picture where it looks for one."""
    picture(1).source.save(beside / "cat.png")
    monkeypatch.chdir(beside)
    _, code = (folder / "README.md").read_text().split("## Use\n\n```python\n")
    names: dict[str, Any] = {}
    exec(code.removesuffix("\n```\n").replace("path/to/this/directory", str(folder)), names)  # noqa: S102 - our own
    return names
