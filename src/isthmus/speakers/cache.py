"""Answers of remote speakers, kept by request so that none is paid for twice."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from isthmus.config import Frozen
from isthmus.files import write_text, writing


class Answer(Frozen):
    """What came back, and what it cost in tokens; None where the endpoint does not say."""

    text: str
    refusal: str | None = None
    """Why there is no answer, in the model's or its provider's words."""
    finish: str | None = None
    """`stop`, `length` or `content_filter`, usually."""
    model: str = ""
    """Which model answered, in the endpoint's words."""
    input_tokens: int | None = None
    output_tokens: int | None = None

    @property
    def digest(self) -> str:
        return _sha256(self.model_dump(mode="json"))


class Entry(Frozen):
    """A file of the cache: the request without its pictures, the answer, and the answer's hash."""

    request: dict[str, Any]
    answer: Answer
    sha256: str


class Cache:
    """A folder of answers.

    Args:
        folder: is made when the first answer comes.
        say: is told about damaged entries; they are asked again.
    """

    def __init__(self, folder: Path, say: Callable[[str], None]):
        self.folder, self.say = folder, say

    def get(self, key: str) -> Answer | None:
        file = self._file(key)
        try:
            entry = Entry.model_validate_json(file.read_bytes())
        except (FileNotFoundError, NotADirectoryError):
            return None
        except (OSError, ValidationError):
            self.say(f"{file}: damaged (not an answer); it is asked again")
            return None
        if entry.answer.digest != entry.sha256:
            self.say(f"{file}: damaged (not what was saved); it is asked again")
            return None
        return entry.answer

    def put(self, key: str, request: Mapping[str, Any], answer: Answer) -> None:
        """Keep an answer; the file appears whole.

        Raises:
            IsthmusError: the folder cannot be written.
        """
        file = self._file(key)
        entry = Entry(request=_without_pictures(request), answer=answer, sha256=answer.digest)
        with writing(file):
            file.parent.mkdir(parents=True, exist_ok=True)
            write_text(file, entry.model_dump_json(indent=1))

    def _file(self, key: str) -> Path:
        return self.folder / key[:2] / f"{key}.json"


def key_of(request: Mapping[str, Any]) -> str:
    """The sha256 of a request with all its pictures."""
    return _sha256(request)


def _sha256(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _without_pictures(value: Any) -> Any:
    """The same tree with data URLs replaced by their hashes: a cache of texts stays small and can be read."""
    if isinstance(value, Mapping):
        return {name: _without_pictures(item) for name, item in value.items()}
    if isinstance(value, list):
        return [_without_pictures(item) for item in value]
    if isinstance(value, str) and value.startswith("data:image/"):
        return f"sha256:{hashlib.sha256(value.encode()).hexdigest()}"
    return value
