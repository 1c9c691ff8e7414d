"""What containers have in common whose records cannot be read again from where they stand, and so are copied."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from isthmus.data.jsons import Place


def copied(record: Any) -> str:
    """A record as a line of a copy; in ASCII, which holds halves of surrogate pairs too."""
    return json.dumps(record, separators=(",", ":")) + "\n"


class Copied:
    """What containers have in common whose records are copied."""

    copied = True

    def __init__(self, path: Path) -> None:
        self.path = path

    def files(self) -> Sequence[Path]:
        return [self.path]

    def read(self, place: Place) -> Any:
        raise NotImplementedError("its records are read from their copy")

    def name(self, place: Place) -> str:
        return str(self.path)

    def held(self, raw: Any) -> Mapping[str, bytes]:
        return {}


class Several(Copied):
    """Several files whose records are copied."""

    def __init__(self, path: Path, paths: Sequence[Path]) -> None:
        super().__init__(path)
        self.paths = paths

    def files(self) -> Sequence[Path]:
        return self.paths

    def name(self, place: Place) -> str:
        return str(self.paths[place.shard])
