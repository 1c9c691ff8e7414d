"""What the log says of requests: sizes, times and codes. Nothing that anybody wrote stands there but paths, escaped."""

from __future__ import annotations

import time

LONGEST = 80
"""Characters of what a stranger has named that are told."""


def answered(prompt: int, told: int, pictures: int, began: float) -> str:
    """The line of an answer: tokens of prompt and answer, pictures, and seconds since `began` (monotonic)."""
    shown = [f"{pictures} picture{'' if pictures == 1 else 's'}"] if pictures else []
    return " · ".join(["200", f"{prompt}+{told} tokens", *shown, f"{time.monotonic() - began:.1f} s"])


def refused(status: int, path: str, code: str | None) -> str:
    """The line of a request that got no answer; the path is without its query."""
    return " · ".join([str(status), _cut(ascii(path)[1:-1]), *([code] if code else [])])


def named(text: str) -> str:
    """A name in quotes as a message may repeat it: short, in one line, with nothing that does not show."""
    return repr(_cut(text))


def _cut(text: str) -> str:
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}…"
