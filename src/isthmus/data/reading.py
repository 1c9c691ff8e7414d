"""Text that a connector reads in a vocabulary of its own: each picture's question, or what is said of it."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Literal

import torch
from tokenizers import Tokenizer
from torch import Tensor

from isthmus.types import KIND, DataError, Medium, Reading, Sample, Turn

EMPTY = [0]
"""No text at all, so that what reads it always has something to read."""


class Reader:
    """Tokenizes what `reading` asks for, one row per medium.

    Args:
        reading: which text, how much of it, and in which vocabulary.
        plain: encodes a text in the LLM's own vocabulary, for a reading that names no other.
        ends: the ids that then stand before and behind an answer, as a BERT tokenizer puts them by itself.
        spell: writes a conversation's regions as text, as the joint does.
    """

    def __init__(
        self,
        reading: Reading,
        plain: Callable[[str], list[int]],
        ends: tuple[int, int],
        spell: Callable[[Sequence[Turn]], tuple[Turn, ...]],
    ) -> None:
        self.reading, self.plain, self.ends, self.spell = reading, plain, ends, spell

    def __call__(self, samples: Iterable[tuple[Sample, Sequence[Medium]]]) -> dict[str, Tensor]:
        """Ids [N, L] by kind of the media that were kept of each sample, -1 at padding.

        Answers are read without a medium too: `text` has a row for every sample that holds none.

        Raises:
            DataError: questions about one picture that share its tokens, though its tokens depend on the question.
        """
        rows: dict[str, list[list[int]]] = {}
        for sample, media in samples:
            turns = self.spell(sample.turns)
            shown = [(medium, index) for index, turn in enumerate(turns) for medium in turn.media]
            if not media and self.reading.of == "answer":
                rows.setdefault("text", []).append(self.encode(_answer(turns).text.strip()))
            start = _start([medium for medium, _ in shown], media)
            for medium, index in shown[start : start + len(media)]:
                self._check(sample, turns, index)
                said = turns[index] if self.reading.of == "question" else _answer(turns[index:])
                rows.setdefault(KIND[type(medium)], []).append(self.encode(said.text.strip()))
        return {kind: padded(ids) for kind, ids in rows.items()}

    def encode(self, text: str) -> list[int]:
        """At most `reading.length` ids: the end of a question, the beginning of an answer."""
        side: Literal["left", "right"] = "left" if self.reading.of == "question" else "right"
        if self.reading.tokenizer is None:
            ids = self.plain(text)
            if side == "left":
                return ids[-self.reading.length :] or EMPTY
            return [self.ends[0], *ids[: self.reading.length - 2], self.ends[1]]
        own = tokenizer(self.reading.tokenizer)  # asked for here: a copy for another process forgets its settings
        encoding = own.encode(text, add_special_tokens=False)
        encoding.truncate(self.reading.length - own.num_special_tokens_to_add(False), direction=side)
        return own.post_process(encoding).ids or EMPTY

    def _check(self, sample: Sample, turns: Sequence[Turn], index: int) -> None:
        for branch in sample.branches if self.reading.of == "question" else ():
            if self.spell(branch)[index].text != turns[index].text:
                raise DataError(
                    f"sample {sample.id}: its questions share the picture's tokens, which depend on the question here",
                    "give each question a sample of its own (options: {together: false})",
                )


def _start(shown: Sequence[Medium], kept: Sequence[Medium]) -> int:
    """Where the media that were kept begin among those of the turns: a caption keeps the first, a cut the last."""
    last = len(shown) - len(kept)
    fits = (at for at in range(last, -1, -1) if all(one is other for one, other in zip(shown[at:], kept)))
    return next(fits, last)


def padded(rows: Sequence[list[int]]) -> Tensor:
    """Rows of ids filled up with -1, [N, L]."""
    width = max(map(len, rows))
    return torch.tensor([row + [-1] * (width - len(row)) for row in rows])


@functools.lru_cache(maxsize=4)
def tokenizer(serialised: str) -> Tokenizer:
    """A tokenizer from its JSON; control tokens that somebody types are read as plain text."""
    made = Tokenizer.from_str(serialised)
    made.no_padding()
    made.no_truncation()
    made.encode_special_tokens = True
    return made


def _answer(turns: Sequence[Turn]) -> Turn:
    """What the assistant says first; nothing in an open prompt."""
    return next((turn for turn in turns if turn.role == "assistant"), Turn("assistant", ()))
