"""What a chat endpoint sends back, read strictly: whole replies, pieces of a stream, and errors of several dialects."""

from __future__ import annotations

import json
from typing import Any, TypeVar

from pydantic import BaseModel, Field, ValidationError

from isthmus.speakers.cache import Answer


class Tokens(BaseModel):
    prompt_tokens: int = Field(ge=0)
    completion_tokens: int = Field(ge=0)


class Said(BaseModel):
    content: str | None = None
    refusal: str | None = None


class Choice(BaseModel):
    message: Said
    finish_reason: str | None = None


class Reply(BaseModel):
    """A whole reply."""

    choices: list[Choice] = Field(min_length=1)
    model: str | None = None
    usage: Tokens | None = None


class Change(BaseModel):
    delta: Said = Said()
    finish_reason: str | None = None


class Piece(BaseModel):
    """One event of a stream; the last one may hold the usage and no choices."""

    choices: list[Change] = []
    model: str | None = None
    usage: Tokens | None = None


Shape = TypeVar("Shape", Reply, Piece)


class Malformed(ValueError):
    """A reply does not follow the protocol; says where."""


def read(shape: type[Shape], text: str) -> Shape:
    """A reply or a piece of one.

    Raises:
        Malformed: it is not JSON, misses a field, or is an error sent with success.
    """
    tree = _tree(text)
    if isinstance(tree, dict) and tree.get("error"):
        raise Malformed(f"an error instead of an answer: {complaint(text)[0]}")
    try:
        return shape.model_validate(tree)
    except ValidationError as error:
        first = error.errors(include_input=False, include_url=False)[0]
        place = ".".join(map(str, first["loc"])) or "reply"
        raise Malformed(f"{place}: {first['msg']}") from None


def answer(reply: Reply) -> Answer:
    """What was said.

    Raises:
        Malformed: there is neither text nor refusal.
    """
    choice = reply.choices[0]
    return _answer(choice.message.content, choice.message.refusal, choice.finish_reason, reply.model, reply.usage)


class Growing:
    """An answer that comes in pieces."""

    def __init__(self) -> None:
        self.text: str | None = None
        self.refusal: str | None = None
        self.finish: str | None = None
        self.model: str | None = None
        self.usage: Tokens | None = None

    def add(self, piece: Piece) -> str:
        """Take in a piece, and say what it adds to the text."""
        self.model, self.usage = piece.model or self.model, piece.usage or self.usage
        added = ""
        for choice in piece.choices[:1]:
            self.finish = choice.finish_reason or self.finish
            if choice.delta.refusal is not None:
                self.refusal = (self.refusal or "") + choice.delta.refusal
            if choice.delta.content is not None:
                added = choice.delta.content
                self.text = (self.text or "") + added
        return added

    def answer(self) -> Answer:
        """The whole.

        Raises:
            Malformed: there was neither text nor refusal.
        """
        return _answer(self.text, self.refusal, self.finish, self.model, self.usage)


def _answer(
    text: str | None, refusal: str | None, finish: str | None, model: str | None, usage: Tokens | None
) -> Answer:
    """An answer from its parts; a provider's filter counts as a refusal."""
    if finish == "content_filter":
        refusal = refusal or "stopped by the provider's content filter"
    if text is None and refusal is None:
        raise Malformed(f"no text, finish_reason {finish!r}")
    return Answer(
        text=text or "",
        refusal=refusal,
        finish=finish,
        model=model or "",
        input_tokens=usage.prompt_tokens if usage else None,
        output_tokens=usage.completion_tokens if usage else None,
    )


def complaint(text: str) -> tuple[str, str]:
    """(message, code) of an error, wherever a server puts them; the bare text where it is no JSON."""
    tree = _tree(text)
    if isinstance(tree, list) and tree:  # Gemini
        tree = tree[0]
    if not isinstance(tree, dict):
        return text, ""
    error = tree.get("error", tree)
    if not isinstance(error, dict):
        return str(error), ""
    message = error.get("message") or error.get("detail") or json.dumps(error)
    return str(message), str(error.get("code") or error.get("type") or "")


def _tree(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return None
