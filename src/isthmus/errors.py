"""What goes wrong, said in two lines: a cause and a remedy. Light, so that the command line can import it first."""

from __future__ import annotations

import difflib
from collections.abc import Sequence


class IsthmusError(Exception):
    """A cause in one line, and a remedy in one line; `code` is the process's exit code."""

    code = 1

    def __init__(self, cause: str, remedy: str = "") -> None:
        super().__init__(cause if not remedy else f"{cause}\n{remedy}")
        self.cause, self.remedy = cause, remedy


class ConfigError(IsthmusError):
    """A recipe, an override or a part's name is wrong."""

    code = 2


class DataError(IsthmusError):
    """A sample, a picture or a file of data is wrong; the cause names it."""

    code = 3


class NothingToLearn(DataError):
    """No term of a loss is about any of these samples."""


class NotFinite(IsthmusError):
    """A loss, a gradient or a weight became infinite or not a number; the cause names where first."""

    code = 4


def abbreviated(names: Sequence[str]) -> str:
    """The first of some names, and how many more there are."""
    return f"{names[0]} and {len(names) - 1} more" if len(names) > 1 else names[0]


def nearest(name: str, known: Sequence[str]) -> str:
    """`; did you mean 'x'?` or nothing."""
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else ""
