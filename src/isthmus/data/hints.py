"""How tags that a tagger saw in a picture stand in a conversation: as they are, in a sentence, or not at all."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from isthmus.config import Frozen
from isthmus.types import Tag

SLOT = "{}"
"""Where the tags go in a sentence."""


@dataclass(frozen=True)
class Markup:
    """Text in which control tokens count, as against what users and taggers write."""

    text: str


class Hints(Frozen):
    """A sentence around the tags that follow each other in a turn; without tags there is no sentence.

    The default writes the tags alone, one behind the other. A sentence without a slot leaves them out.
    """

    sentence: str = SLOT
    separator: str = ""

    def write(self, tags: Sequence[Tag]) -> list[str | Markup]:
        """The sentence's own text as markup, and the tags as plain text between."""
        before, slot, after = self.sentence.partition(SLOT)
        if not slot:
            return []
        listed = self.separator.join(tag.text for tag in tags)
        pieces: list[str | Markup] = [Markup(before), listed, Markup(after)]
        return [piece for piece in pieces if not isinstance(piece, Markup) or piece.text]
