"""What a file or folder of samples holds, counted in one pass."""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from isthmus.data import formats, video
from isthmus.data.media import upright_size
from isthmus.types import Audio, Box, ConfigError, DataError, Image, Sample, Video


def _numbers() -> array[int]:
    return array("q")


@dataclass
class Survey:
    """Counts, and the numbers behind the quantiles."""

    samples: int = 0
    faults: int = 0
    turns: int = 0
    without_media: int = 0
    boxes: int = 0
    media: Counter[str] = field(default_factory=Counter)
    kinds: Counter[str] = field(default_factory=Counter)
    unreadable: int = 0
    """Pictures and videos whose header cannot be read."""
    question_words: array[int] = field(default_factory=_numbers)
    answer_words: array[int] = field(default_factory=_numbers)
    tokens: array[int] = field(default_factory=_numbers)
    seconds: array[int] = field(default_factory=_numbers)
    """Of videos."""
    widths: array[int] = field(default_factory=_numbers)
    heights: array[int] = field(default_factory=_numbers)

    def add(self, sample: Sample, tokens: Callable[[str], int] | None) -> None:
        """Count a sample; its pictures' headers are read, not their pixels."""
        self.samples += 1
        self.turns += len(sample.turns)
        self.without_media += not sample.media
        self.kinds[str(sample.meta.get("kind", ""))] += 1
        for turn in sample.turns:
            if turn.role != "system":
                (self.answer_words if turn.role == "assistant" else self.question_words).append(len(turn.text.split()))
            self.boxes += sum(isinstance(part, Box) for part in turn.parts)
        if tokens is not None:
            self.tokens.append(sum(tokens(turn.text) for turn in sample.turns))
        for medium in sample.media:
            self.media[type(medium).__name__.lower()] += 1
            if not isinstance(medium, Audio):
                self._measure(medium)

    def _measure(self, medium: Image | Video) -> None:
        try:
            if isinstance(medium, Image):
                width, height = upright_size(medium.source)
            else:
                facts = video.facts(medium.source)
                width, height = facts.width, facts.height
                self.seconds.append(round(facts.seconds))
        except DataError:
            self.unreadable += 1
            return
        except ConfigError:  # without PyAV videos are counted and no more
            return
        self.widths.append(width)
        self.heights.append(height)

    def told(self) -> dict[str, Any]:
        """Everything as plain values; of numbers the least, the median, the 95th percentile and the greatest."""
        counted = {
            "samples": self.samples,
            "faults": self.faults,
            "turns": self.turns,
            "without media": self.without_media,
            "boxes": self.boxes,
            "unreadable media": self.unreadable,
            "media": dict(self.media),
            "kinds": {kind: count for kind, count in self.kinds.most_common() if kind},
        }
        numbers = {
            "words of a question": self.question_words,
            "words of an answer": self.answer_words,
            "tokens of a sample": self.tokens,
            "seconds": self.seconds,
            "width": self.widths,
            "height": self.heights,
        }
        return counted | {name: quantiles(values) for name, values in numbers.items() if values}


def survey(each: Iterable[formats.Record | formats.Fault], tokens: Callable[[str], int] | None = None) -> Survey:
    """Count what was found in a file; `tokens` says how many a text has."""
    found = Survey()
    for one in each:
        if isinstance(one, formats.Fault):
            found.faults += 1
        else:
            found.add(one.sample, tokens)
    return found


def quantiles(values: array[int]) -> dict[str, int]:
    least, median, most, greatest = np.quantile(np.array(values), [0, 0.5, 0.95, 1], method="nearest").tolist()
    return {"least": least, "median": median, "95 %": most, "greatest": greatest}
