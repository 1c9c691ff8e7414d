"""Answers that must be JSON of a given shape, by llguidance: before each token, what the shape forbids is ruled out."""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from isthmus.types import ConfigError, DataError

ANY_JSON: dict[str, Any] = {"type": "object"}
"""The schema of `json_object`: any object."""

SPACING: Any = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
"""As Python writes JSON. Free white space would let a model write line breaks until its tokens are used up."""


@dataclass(frozen=True)
class Grammar:
    """A schema in the vocabulary of a tokenizer."""

    vocabulary: Any
    source: str

    def begin(self) -> Matcher:
        """A fresh check of one answer."""
        return Matcher(self)


class Grammars:
    """Makes grammars for one tokenizer; its vocabulary is read at the first one, or found unreadable for good."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast):
        self._tokenizer = tokenizer

    @functools.cached_property
    def _vocabulary(self) -> Any | None:
        """None where llguidance cannot tell the bytes of a token, as of decoders that join words with spaces."""
        try:
            from llguidance.hf import from_tokenizer
        except ImportError:
            raise ConfigError("llguidance is not installed", "pip install 'isthmus[serve]'") from None
        try:
            return from_tokenizer(self._tokenizer)
        except ValueError:
            return None

    def schema(self, schema: dict[str, Any]) -> Grammar:
        """The grammar of a JSON schema.

        Raises:
            ConfigError: llguidance is not installed.
            DataError: llguidance does not know how to keep it, or it is too large; or it cannot read the tokenizer.
        """
        vocabulary = self._vocabulary  # first: it says what to install
        if vocabulary is None:
            raise DataError(
                "this model's tokenizer cannot be held to a schema", "leave response_format and forced tools out"
            )
        from llguidance import LLMatcher

        try:
            source = LLMatcher.grammar_from_json_schema(json.dumps(schema), overrides=SPACING)
            wrong = LLMatcher.validate_grammar(source, vocabulary)
        except Exception:  # whatever a schema makes it stumble over
            wrong = "unreadable"
        if wrong:
            raise DataError("the JSON schema cannot be kept to", "leave out what is unusual in it, or make it smaller")
        return Grammar(vocabulary, source)


class Matcher:
    """What may come next in one answer."""

    def __init__(self, grammar: Grammar):
        from llguidance import LLMatcher
        from llguidance.torch import allocate_token_bitmask

        self._matcher = LLMatcher(grammar.vocabulary, grammar.source)
        self._bits = allocate_token_bitmask(1, grammar.vocabulary.vocab_size)

    @property
    def done(self) -> bool:
        """Whether nothing but the end may follow."""
        return bool(self._matcher.is_stopped())

    def allow(self, logits_V: Tensor, ends: Sequence[int]) -> Tensor:
        """The logits without what the grammar forbids.

        Raises:
            ArithmeticError: nothing is allowed any more.
        """
        from llguidance.torch import fill_next_token_bitmask

        fill_next_token_bitmask(self._matcher, self._bits)
        size = len(logits_V)
        allowed_V = (self._bits[0][:, None] >> torch.arange(32, dtype=torch.int32) & 1).flatten()[:size].bool()
        allowed_V = torch.nn.functional.pad(allowed_V, (0, size - len(allowed_V)))
        if self._matcher.is_accepting():
            allowed_V[list(ends)] = True
        if not bool(allowed_V.any()):
            raise ArithmeticError("the grammar allows no token")
        return logits_V.masked_fill(~allowed_V, -torch.inf)

    def take(self, token: int) -> None:
        """Go on by a token; the end of the answer is no part of it."""
        if not self._matcher.is_stopped():
            self._matcher.consume_token(token)
