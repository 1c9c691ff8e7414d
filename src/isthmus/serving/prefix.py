"""Pasts of earlier prompts and answers, so that the next turn of a conversation is not read from its beginning.

A past is found by the symbols it was made of: token ids and, where a medium stands, its content and what its connector
read. Two prompts share the states of their common beginning because no joint lets a token look ahead. A medium is
reused whole or not at all.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

from isthmus.serving.pool import Row

Symbols: TypeAlias = tuple[Hashable, ...]
MOST_ENTRIES = 128


@dataclass
class Prefixes:
    """The most recently used pasts, at most `limit` bytes of them; 0 keeps none."""

    limit: int
    bytes: int = 0
    hits: int = 0
    misses: int = 0
    reused_tokens: int = 0
    rows: OrderedDict[Symbols, Row] = field(default_factory=OrderedDict)

    def find(self, symbols: Symbols, spans: Sequence[tuple[int, int]]) -> Row | None:
        """The longest past of a beginning of this prompt, which leaves at least its last token to be read."""
        best, length = None, 0
        for known in self.rows:
            shared = _whole(min(_common(known, symbols), len(symbols) - 1), spans)
            if shared > length:
                best, length = known, shared
        if best is None:
            self.misses += 1
            return None
        self.hits += 1
        self.reused_tokens += length
        self.rows.move_to_end(best)
        return self.rows[best].first(length)

    def keep(self, symbols: Symbols, row: Row) -> None:
        """Remember a past; what it goes on from is forgotten."""
        if row.bytes > self.limit:
            return
        for known in [known for known in self.rows if symbols[: len(known)] == known]:
            self._drop(known)
        self.rows[symbols] = row
        self.bytes += row.bytes
        while self.bytes > self.limit or len(self.rows) > MOST_ENTRIES:
            self._drop(next(iter(self.rows)))

    def _drop(self, symbols: Symbols) -> None:
        self.bytes -= self.rows.pop(symbols).bytes


def _common(a: Symbols, b: Symbols) -> int:
    """How many symbols from the start are the same."""
    return next((place for place, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))


def _whole(length: int, spans: Sequence[tuple[int, int]]) -> int:
    """The length without a medium that it would cut."""
    return next((start for start, end in spans if start < length < end), length)
