"""A tiny model behind HTTP in a thread, and pictures as requests carry them."""

from __future__ import annotations

import base64
from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from typing import Any

from composed import picture
from isthmus.model import VLM
from isthmus.serving.engine import Engine, Sizes
from isthmus.serving.http import Access, Server
from isthmus.serving.run import serving

KEY = "sk-a-secret-that-must-not-leak"
NAME = "tiny"


@contextmanager
def running(model: VLM, sizes: Sizes | None = None, **settings: Any) -> Iterator[tuple[Server, str]]:
    """A server and its address."""
    settings = {"access": Access(KEY)} | settings
    server = Server(Engine(model, sizes or Sizes()), NAME, **settings)
    with serving(server) as address:
        yield server, address


def encoded(seed: int, size: int = 32, form: str = "png") -> str:
    """A picture as a data URL; `picture(seed)` holds the same pixels."""
    raw = BytesIO()
    picture(seed, size).source.save(raw, form)
    return data_url(raw.getvalue(), form)


def data_url(raw: bytes, form: str = "png") -> str:
    return f"data:image/{form};base64,{base64.b64encode(raw).decode()}"


def shown(seed: int, **more: Any) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": encoded(seed, **more)}}


def said(text: str) -> dict[str, Any]:
    return {"type": "text", "text": text}


def user(*parts: Any) -> list[dict[str, Any]]:
    """One question."""
    return [{"role": "user", "content": list(parts)}]
