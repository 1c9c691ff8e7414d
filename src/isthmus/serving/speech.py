"""Tokens become text piece by piece: no half characters, nothing of a stop string, whatever tokens it is split over."""

from __future__ import annotations

from collections.abc import Sequence

from tokenizers.decoders import DecodeStream
from transformers import PreTrainedTokenizerBase


class Speech:
    """The text of one answer while it grows.

    Args:
        tokenizer: a fast one.
        stops: strings that end the answer and are no part of it.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stops: Sequence[str] = ()):
        self._tokenizer = tokenizer
        self._backend = tokenizer.backend_tokenizer  # type: ignore[attr-defined]
        self._stream = DecodeStream(skip_special_tokens=True)
        self._stops = [stop for stop in stops if stop]
        self._held = ""
        self._ids: list[int] = []
        self._pending: list[int] = []
        self.text = ""
        """What was given out so far."""
        self.stopped = False

    def hear(self, token: int) -> str:
        """What can be said for sure after one more token; empty while it is unclear."""
        self._ids.append(token)
        self._pending.append(token)
        try:
            piece = self._stream.step(self._backend, token) or ""
        except Exception:  # tokenizers': a byte too many behind a character that has been told; go on behind that one
            self._stream = DecodeStream(skip_special_tokens=True)
            piece = "".join(self._stream.step(self._backend, each) or "" for each in self._pending)
        if piece:
            self._pending.clear()
        return self._give(piece)

    def end(self) -> str:
        """What was held back, as the answer ends; an unfinished character becomes a replacement character."""
        if self.stopped:
            return ""
        whole, known = self._decode(self._ids), self.text + self._held
        said = self._give(whole[len(known) :] if whole.startswith(known) else self._decode(self._pending))
        return said if self.stopped else said + self._release(len(self._held))

    def _decode(self, ids: list[int]) -> str:
        return str(self._tokenizer.decode(ids, skip_special_tokens=True))

    def _give(self, piece: str) -> str:
        """Release all but what may be the beginning of a stop string."""
        self._held += piece
        found = [(place + len(stop), place) for stop in self._stops if (place := self._held.find(stop)) >= 0]
        if found:  # the one that is complete first, however the text came in pieces
            self.stopped, self._held = True, self._held[: min(found)[1]]
            return self._release(len(self._held))
        doubtful = max((_overlap(self._held, stop) for stop in self._stops), default=0)
        return self._release(len(self._held) - doubtful)

    def _release(self, length: int) -> str:
        out, self._held = self._held[:length], self._held[length:]
        self.text += out
        return out


def _overlap(text: str, stop: str) -> int:
    """The longest end of a text that a stop string begins with."""
    return next((size for size in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:size])), 0)
