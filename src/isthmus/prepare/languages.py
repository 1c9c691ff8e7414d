"""In which language something is said, by a naive Bayes classifier over byte sequences that brings its model along.

langid, Lui and Baldwin 2012, ACL; official code: github.com/adbar/py3langid (a fork that is kept up).
Differs: nothing is downloaded, and nothing is said of a few letters, which fit too many languages.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from isthmus.types import ConfigError

PREFIX = "language-"
"""An operator is this and a code of ISO 639: `language-en`."""
LEAST = 20
"""Bytes of letters (UTF-8) that tell a language: some four words, or seven Chinese characters."""


def likelihood(code: str) -> Callable[[str], float | None]:
    """How likely a text is in a language, 0 to 1; None of one too short to tell.

    Raises:
        ConfigError: the code is unknown, or the identifier is not installed.
    """
    identifier = known()
    if code not in identifier.labels:
        raise ConfigError(f"no language is called {code!r}", f"codes are {', '.join(sorted(identifier.labels))}")

    def likely(text: str) -> float | None:
        letters = "".join(filter(str.isalpha, text)).encode("utf-8", "replace")
        return float(dict(identifier.rank(text))[code]) if len(letters) >= LEAST else None

    return likely


@functools.cache
def known() -> Any:
    """The identifier with its model, which takes a second to unpack.

    Raises:
        ConfigError: it is not installed.
    """
    try:
        from py3langid import langid
    except ModuleNotFoundError:
        raise ConfigError("languages need the package py3langid", "pip install 'isthmus[language]'") from None
    return langid.LanguageIdentifier.from_model_file(langid.MODEL_FILE, norm_probs=True)
