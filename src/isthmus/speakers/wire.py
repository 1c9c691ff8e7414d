"""Turns as messages of the chat protocol, pictures as data URLs."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from io import BytesIO
from typing import Any

from PIL import Image as Pillow
from PIL import ImageOps

from isthmus.data.boxes import Regions
from isthmus.data.media import open_image
from isthmus.speakers.settings import PictureConfig
from isthmus.types import KIND, Audio, DataError, Image, Source, Tag, Text, Turn, Video


def messages(turns: Sequence[Turn], picture: PictureConfig) -> list[dict[str, Any]]:
    """A conversation that ends with the user, as the protocol writes it; regions are decimals of the picture's sides.

    Raises:
        DataError: it does not end with the user, a turn is empty, a picture cannot be read or does not stand in a
            user's turn, or a medium is no picture.
    """
    if not turns or turns[-1].role != "user":
        raise DataError("a conversation to be answered ends with the user's turn", "leave out the last answer")
    return [{"role": turn.role, "content": _content(turn, picture)} for turn in Regions().spell(turns)]


def data_url(source: Source, picture: PictureConfig) -> str:
    """A picture as the text that stands for it in a request, scaled down to the longest side that is allowed."""
    image = open_image(source)
    if max(image.size) > picture.side:
        image = ImageOps.contain(image, (picture.side, picture.side), Pillow.Resampling.LANCZOS)
    encoded = BytesIO()
    image.save(encoded, picture.format, **({"quality": picture.quality} if picture.format == "jpeg" else {}))
    return f"data:image/{picture.format};base64,{base64.b64encode(encoded.getvalue()).decode('ascii')}"


def _content(turn: Turn, picture: PictureConfig) -> str | list[dict[str, Any]]:
    """Plain text where there is no picture: many servers take nothing else from system and assistant."""
    pieces: list[dict[str, Any]] = []
    for part in turn.parts:
        if isinstance(part, Image | Video | Audio):
            pieces.append(_medium(part, turn, picture))
        elif isinstance(part, Text | Tag):  # regions are text by now
            if pieces and pieces[-1]["type"] == "text":
                pieces[-1]["text"] += part.text
            else:
                pieces.append({"type": "text", "text": part.text})
    if not pieces:
        raise DataError(f"a turn of the {turn.role} says nothing", "give it a text or a picture")
    if [piece["type"] for piece in pieces] == ["text"]:
        return pieces[0]["text"]
    return pieces


def _medium(part: Image | Video | Audio, turn: Turn, picture: PictureConfig) -> dict[str, Any]:
    if not isinstance(part, Image):
        raise DataError(f"remote speakers are sent no {KIND[type(part)]}", "show frames of it as pictures")
    if turn.role != "user":
        raise DataError(
            f"a picture stands in a turn of the {turn.role}", "the protocol has pictures in user turns only"
        )
    return {"type": "image_url", "image_url": {"url": data_url(part.source, picture)}}
