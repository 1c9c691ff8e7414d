"""How a layout of single records is told from others and read, and what their readers have in common."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from isthmus.data.attached import Unit
from isthmus.data.faults import Wrong

Raw: TypeAlias = Mapping[str, Any]
Found: TypeAlias = Iterator[dict[str, Any] | Wrong]

PICTURE = ("image", "images", "file_name", "filename")
"""Where a record names its picture; the first that is not empty is read."""


@dataclass(frozen=True)
class Layout:
    """How records of one kind are recognised and read.

    Args:
        fits: whether a record looks like it.
        read: its samples; the second argument is the id of a record that has none.
        unit: what its regions count.
        prepend: its publishers put pictures that no marker places before the first question.
        split: under which key a record says its publisher's split, if not under `split`.
    """

    fits: Callable[[Raw], bool]
    read: Callable[[Raw, str], Found]
    unit: Unit = "shares"
    prepend: bool = False
    split: str = "split"


def has(*keys: str) -> Callable[[Raw], bool]:
    """Recognises records by keys that must be there."""
    return lambda record: all(key in record for key in keys)


def pictures(record: Raw) -> Any:
    """The picture that a record names, or several; None where it has none."""
    return next((record[key] for key in PICTURE if record.get(key)), None)


def unanswered() -> Wrong:
    """What is wrong with a question of which the answer is kept back, or was forgotten."""
    remedy = "take the split that has answers (options: {rows: SPLIT}), or leave such questions out ({faults: skip})"
    return Wrong("the question has no answer", remedy)


def task(kind: str, name: str, answer: Any, **more: Any) -> dict[str, Any]:
    """A task's record: its fields by their names, `image`, `images`, `video` and `meta` beside them."""
    beside: dict[str, Any] = {key: more.pop(key) for key in ("image", "images", "video", "meta") if key in more}
    return {"id": name, "task": kind, "answer": answer, "fields": more, **beside}


def listed(given: Any, name: str) -> Sequence[Any]:
    """It, if it is a list.

    Raises:
        Wrong: it is something else.
    """
    if not isinstance(given, list | tuple):
        if given is None:
            raise Wrong(f"{name} is missing", "write it, or leave the record out")
        raise Wrong(f"{name} is not a list", "write a JSON array")
    return given


def text(record: Raw, *keys: str) -> str:
    """The first of these that is there, which must be a text or a number.

    Raises:
        Wrong: none is.
    """
    for key in keys:
        value = record.get(key)
        if isinstance(value, str | int | float) and not isinstance(value, bool):
            return str(value)
    raise Wrong(f"{' or '.join(keys)} is missing, or not a text", "write it, or remove the record")
