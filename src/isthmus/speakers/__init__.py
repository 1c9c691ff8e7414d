"""Things that can be spoken to: a VLM in this process, or a model behind an endpoint."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol

from isthmus.types import Sample, Turn


class Speaker(Protocol):
    """Anything that answers a conversation."""

    def say(self, turns: Sequence[Turn]) -> str:
        """The next assistant turn's text."""

    def say_all(self, samples: Sequence[Sample]) -> list[str]:
        """The same for several conversations, in their order."""

    def stream(self, turns: Sequence[Turn]) -> Iterator[str]:
        """The next assistant turn's text, piece by piece."""
