"""The chat page and what it asks for beyond OpenAI's routes: facts about the model, and maps of attention."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from importlib.resources import files
from math import isqrt
from typing import Any

from fastapi import APIRouter
from fastapi.responses import Response

from isthmus.evaluation.gap import states
from isthmus.model import VLM
from isthmus.serving.facts import facts
from isthmus.serving.refusals import Refusal, invalid
from isthmus.types import ConfigError, Turn

POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
"""What the page may load and reach: this server alone. Pictures in it are data URLs of the user's own files."""
TYPES = {
    "index.html": "text/html; charset=utf-8",
    "chat.js": "text/javascript; charset=utf-8",
    "markdown.js": "text/javascript; charset=utf-8",
    "pictures.js": "text/javascript; charset=utf-8",
    "style.css": "text/css; charset=utf-8",
    "icon.svg": "image/svg+xml",
}


def routes() -> APIRouter:
    """`/` and the files of the page, which hold nothing secret and need no key."""
    router = APIRouter()
    router.add_api_route("/", lambda: _file("index.html"), methods=["GET"])
    router.add_api_route("/page/{name}", _file, methods=["GET"])
    return router


def _file(name: str) -> Response:
    """One of the page's own files; any other name is not found.

    Raises:
        Refusal: there is no such file.
    """
    if name not in TYPES:
        raise Refusal(404, "there is nothing at this path")
    headers = {"Content-Security-Policy": POLICY, "Cache-Control": "no-cache"}
    return Response(_read(name), media_type=TYPES[name], headers=headers)


@cache
def _read(name: str) -> bytes:
    return (files("isthmus.serving") / "page" / name).read_bytes()


def has_maps(model: VLM) -> bool:
    """Whether attention can be drawn over pictures: their tokens stand in the text, one for one for places."""
    return "image" in model.encoders and model.aligner.splices and states.grid(model) is not None


def check_size(model: VLM, tokens: int, attention: int) -> None:
    """Refuse a prompt over which one layer's attention has more than so many bytes: a map is made of all its weights.

    Raises:
        Refusal: it has too many tokens.
    """
    most = isqrt(attention // (4 * model.config.text_config.num_attention_heads))
    if tokens > most:
        why = f"the conversation has {tokens} tokens; a map of attention is drawn of at most {most}"
        raise invalid(f"{why}: begin a new one, or show fewer pictures", "messages", "context_length_exceeded")


def check_route(route: str | int | None) -> None:
    """Refuse a map of a request that names a route: maps are drawn of what conversations tell themselves.

    Raises:
        Refusal: a route is named.
    """
    if route is not None:
        raise invalid("a map of attention is drawn without a route", "route")


def maps(model: VLM, turns: Sequence[Turn]) -> list[list[list[float]]]:
    """Per picture, rows x columns: what share of its attention the model gives each place as it begins to answer.

    Raises:
        Refusal: no picture was asked about, or the joint has no such map.
    """
    if not any(turn.media for turn in turns):
        raise invalid("there is no picture to look at", "messages")
    try:
        return [map_RC.tolist() for map_RC in states.attention_map(model, turns)]
    except ConfigError as error:
        raise invalid(error.cause) from None


def introduction(model: VLM, name: str, tokens: int) -> dict[str, Any]:
    """What the page shows first; `tokens` is the longest answer that the server gives.

    `aspect` is how the encoder's square is made of a picture (`EncoderConfig.aspect`), over which maps lie.
    """
    aspect = model.config.encoder("image").aspect if "image" in model.encoders else None
    return {
        "model": name,
        "facts": facts(model),
        "attention": has_maps(model),
        "aspect": aspect,
        "max_tokens": tokens,
    }
