"""Single tokens as they read in a text."""

from __future__ import annotations

import functools

from transformers import PreTrainedTokenizerBase


class Spelling:
    """Spells a token as it reads behind another: SentencePiece drops the space of what begins a text."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self.tokenizer = tokenizer

    def __call__(self, token: int, first: bool) -> tuple[str, bytes | None]:
        """The text of a token, the `first` of an answer or a later one, and its bytes; part of a character has none."""
        behind = [] if first else self._anchor
        text = str(self.tokenizer.decode([*behind, token]))[len(str(self.tokenizer.decode(behind))) :]
        return text, None if "\ufffd" in text else text.encode()

    @functools.cached_property
    def _anchor(self) -> list[int]:
        """A token of plain letters, none that stands for a byte; nothing where there is none."""
        for token in range(len(self.tokenizer)):
            text = str(self.tokenizer.decode([token]))
            if text.isascii() and text.isalpha() and str(self.tokenizer.convert_ids_to_tokens(token)).endswith(text):
                return [token]
        return []
