"""Things that can be spoken to: a VLM here, later remote endpoints, judges and tool agents."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol

from isthmus.types import Turn


class Speaker(Protocol):
    """Anything that answers a conversation."""

    def say(self, turns: Sequence[Turn]) -> str:
        """The next assistant turn's text."""

    def stream(self, turns: Sequence[Turn]) -> Iterator[str]:
        """The same, piece by piece."""
