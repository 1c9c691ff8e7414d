"""Text of recipes, data and models as HTML may hold it."""

from __future__ import annotations

import html

_CONTROLS = (*range(0x09), 0x0B, *range(0x0E, 0x20), *range(0x7F, 0xA0))
_NEVER = (
    *range(0xD800, 0xE000),
    *range(0xFDD0, 0xFDF0),
    *(0x10000 * plane + 0xFFFE + x for plane in range(17) for x in (0, 1)),
)
_SHOWN = dict.fromkeys((*_CONTROLS, *_NEVER), "\N{REPLACEMENT CHARACTER}")
"""Code points that the standard allows in no document; a model's tokens may well have some."""


def escape(text: str) -> str:
    """The text with markup taken literally, and a replacement for every character that a page cannot hold."""
    return html.escape(text.translate(_SHOWN))
