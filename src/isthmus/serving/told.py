"""What an OpenAI-compatible endpoint tells of a question beside its answer, as far as it tells it."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from typing import Any, TypeVar

import httpx2
import torch
from torch import Tensor

from isthmus.speakers.endpoint import Endpoint
from isthmus.speakers.settings import RemoteConfig
from isthmus.speakers.usage import Meter
from isthmus.speakers.wire import messages
from isthmus.types import IsthmusError, Turn

Found = TypeVar("Found")


@dataclass(frozen=True)
class Told:
    """None stands for what is not told.

    Attributes:
        length: how many tokens the prompt has.
        ids: which; with the endpoint's own placeholder where a picture stands.
        tokens: the answer's.
        logprobs: of each of them; the one that ends it may be missing.
        spelled: the same as bytes; None for part of a character.
        vector: of the picture, by itself.
    """

    length: int | None
    ids: tuple[int, ...] | None
    tokens: tuple[int, ...] | None
    logprobs: tuple[float, ...] | None
    spelled: tuple[bytes | None, ...] | None
    vector: Tensor | None


def told(config: RemoteConfig, turn: Turn) -> Told:
    """Ask an endpoint that has just answered the same for whatever else it tells: what it does not take is left out."""
    (message,) = messages([turn], config.picture)
    with closing(Endpoint(config, Meter(config))) as endpoint:
        reply = _reply(endpoint, message)
        vector = _vector(endpoint, message)
    choice: Any = _found(lambda: reply["choices"][0])
    content: Any = _found(lambda: choice["logprobs"]["content"])
    return Told(
        _found(lambda: int(reply["usage"]["prompt_tokens"])),
        _found(lambda: tuple(map(int, reply["prompt_token_ids"]))),
        _found(lambda: tuple(map(int, choice["token_ids"]))),
        _found(lambda: tuple(float(each["logprob"]) for each in content)),
        _found(lambda: tuple(None if each["bytes"] is None else bytes(each["bytes"]) for each in content)),
        vector,
    )


def _reply(endpoint: Endpoint, message: dict[str, Any]) -> Any:
    """The whole reply, with log-probabilities and, where vLLM's wish for them is taken, token ids."""
    body = endpoint.config.request() | {"messages": [message], "logprobs": True}
    for asked in (body | {"return_token_ids": True}, body):
        try:
            return json.loads(endpoint.fetch(asked))
        except (IsthmusError, ValueError):
            continue
    return {}


def _vector(endpoint: Endpoint, message: dict[str, Any]) -> Tensor | None:
    """The picture through `/v1/embeddings`, which takes pictures where it is ours."""
    content, config = message["content"], endpoint.config
    shown = [part for part in content if part["type"] == "image_url"] if isinstance(content, list) else []
    if not shown:
        return None
    body = {"model": config.model, "input": shown, "encoding_format": "float"}
    key = os.environ.get(config.key_env or "", "").strip()
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    try:
        reply = endpoint.client.post(f"{config.endpoint}/embeddings", json=body, headers=headers).raise_for_status()
    except httpx2.HTTPError:
        return None
    return _found(lambda: torch.tensor(reply.json()["data"][0]["embedding"]))


def _found(read: Callable[[], Found]) -> Found | None:
    """A value of a reply, or None where the reply has another shape."""
    try:
        return read()
    except (KeyError, IndexError, TypeError, ValueError):
        return None
