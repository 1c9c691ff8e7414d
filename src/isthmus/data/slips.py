"""Keys that one slip of a hand keeps from being read, such as `imgae`: a record would be learnt without its picture.

What is said of a record besides may have any name. So a key counts as a slip only if it is one letter, or two letters
that changed places, away from one that is read and is not there, and holds what that one would hold. Two slips are not
looked for: `page`, `age`, `stage` and `usage` are two letters away from `image`.

Nor is one of two names read where the other is there too: a record that has both must say the same with them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from os.path import commonprefix
from typing import Any, TypeAlias

from isthmus.data.faults import Wrong

Watched: TypeAlias = Sequence[tuple[tuple[str, ...], tuple[type, ...]]]
"""Keys of which one is enough, and the types of what they hold."""

MEDIUM = (str, bytes, Mapping, list, tuple)
RECORD: Watched = (
    (("image", "images"), MEDIUM),
    (("video", "videos"), MEDIUM),
    (("conversations", "messages"), (list, tuple)),
    (("rejected",), (list, tuple)),
    (("system",), (str,)),
    (("meta",), (Mapping,)),
)
TURN: Watched = ((("weight", "loss", "train"), (int, float)),)
REGION: Watched = ((("label",), (str,)), (("unit",), (str,)))


def refuse(given: Mapping[str, Any], watched: Watched) -> None:
    """Nothing but a check.

    Raises:
        Wrong: a key is a slip.
    """
    missing = [(names, types) for names, types in watched if not any(name in given for name in names)]
    for key, value in given.items():
        for names, types in missing:
            near = [name for name in names if isinstance(value, types) and _slip(key, name)]
            if near:
                (meant,) = get_close_matches(key.casefold(), near, n=1, cutoff=0)
                raise Wrong(
                    f"the key {key[:40]!r} is not read, and there is no {meant!r}",
                    f"write {meant!r}, or another name if something else is meant",
                )


def refuse_two(record: Mapping[str, Any]) -> None:
    """Nothing but a check.

    Raises:
        Wrong: under two names of one thing stand two things.
    """
    for one, other in (("image", "images"), ("video", "videos"), ("conversations", "messages")):
        if record.get(one) and record.get(other) and _listed(record[one]) != _listed(record[other]):
            raise Wrong(
                f"the record has {one!r} and {other!r}, which differ, and only one of the two would be read",
                "put all into one of them, and remove the other",
            )


def _listed(given: Any) -> list[Any]:
    """One thing as a list of it; of turns, what they say."""
    several = list(given) if isinstance(given, list | tuple) else [given]
    return [one.get("value", one.get("content", one)) if isinstance(one, Mapping) else one for one in several]


def _slip(key: Any, name: str) -> bool:
    """Whether a letter too many, too few or wrong, two that changed places, or capitals make one of the other."""
    if not isinstance(key, str) or abs(len(key) - len(name)) > 1:
        return False
    key = key.casefold()
    same = len(commonprefix([key, name]))
    a, b = key[same:], name[same:]
    return a[1:] == b or a == b[1:] or a[1:] == b[1:] or (a[2:] == b[2:] and a[:2] == b[1::-1])
