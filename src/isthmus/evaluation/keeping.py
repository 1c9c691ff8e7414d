"""Where predictions lie: the newest under a plain name, earlier ones aside, and the answers of an unfinished run.

presence.jsonl                          complete; what was asked last
earlier/presence.<fingerprint>.jsonl    complete, of other items, weights or settings
presence.<fingerprint>.part             the answers so far of a run that has not ended, or was interrupted
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from isthmus.evaluation import answers
from isthmus.evaluation.answers import Header, Prediction
from isthmus.types import DataError

EARLIER = "earlier"
_WRITING = threading.Lock()
"""Batches are answered side by side."""


@dataclass(frozen=True)
class Answered:
    """Answers by their item's place, appended batch by batch; with no path they are asked, and not kept."""

    path: Path | None = None
    known: Mapping[int, list[Any]] = field(default_factory=dict)

    @classmethod
    def of(cls, path: Path) -> Answered:
        """What an interrupted run left; a line that was not written to its end counts for nothing."""
        known = {}
        for line in path.read_text(encoding="utf-8", errors="replace").split("\n") if path.is_file() else ():
            try:
                place, *row = json.loads(line)
                known[place] = row
            except (ValueError, TypeError):
                continue
        return cls(path, known)

    def batch(self, places: Sequence[int], ask: Callable[[], Sequence[Sequence[Any]]]) -> Sequence[Sequence[Any]]:
        """A row of plain values for each of these places: as kept if all are, else as they are asked now."""
        if all(place in self.known for place in places):
            return [self.known[place] for place in places]
        rows = ask()
        if self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with _WRITING, self.path.open("a", encoding="utf-8") as file:  # the line before may lack its end
                file.write("".join(f"\n{json.dumps([place, *row])}" for place, row in zip(places, rows)))
        return rows


@dataclass(frozen=True)
class Place:
    """Where the predictions of one task under one condition are kept, and what they depend on."""

    folder: Path
    name: str
    fingerprint: str

    @property
    def path(self) -> Path:
        return self.folder / f"{self.name}.jsonl"

    @property
    def part(self) -> Path:
        return self.folder / f"{self.name}.{self.fingerprint}.part"

    def found(self) -> list[Prediction] | None:
        """Complete predictions with this fingerprint, which take the plain name again if they had been set aside."""
        known, aside = answers.reusable(self.path, self.fingerprint), self._aside(self.fingerprint)
        if known is None and (known := answers.reusable(aside, self.fingerprint)) is not None:
            self._set_aside()
            aside.replace(self.path)
        return known

    def keep(self, header: Header, predictions: Sequence[Prediction]) -> None:
        """Write them under the plain name; a complete file of another fingerprint is set aside."""
        self._set_aside()
        answers.write(self.path, header, predictions)
        self.part.unlink(missing_ok=True)

    def _aside(self, fingerprint: str) -> Path:
        return self.folder / EARLIER / f"{self.name}.{fingerprint}.jsonl"

    def _set_aside(self) -> None:
        try:
            fingerprint = answers.read(self.path)[0].fingerprint
        except DataError:  # none is there, or one that nobody can use
            return
        if fingerprint != self.fingerprint:
            aside = self._aside(fingerprint)
            aside.parent.mkdir(exist_ok=True)
            self.path.replace(aside)
