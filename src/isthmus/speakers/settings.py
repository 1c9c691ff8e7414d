"""How a remote speaker is reached, what is asked of it, and what it may cost. The key itself is never part of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, Self
from urllib.parse import urlsplit

from pydantic import ConfigDict, Field, field_validator, model_validator

from isthmus.config import Frozen

HERE = frozenset({"localhost", "127.0.0.1", "::1"})
"""Hosts that a key may be sent to without encryption: nothing leaves this machine on the way."""
OURS = frozenset({"model", "messages", "max_tokens", "max_completion_tokens", "temperature", "seed", "stream", "n"})
"""Fields of a request that `options` may not set: they are fields of the config, or would change the protocol."""


class PictureConfig(Frozen):
    """How pictures travel. Providers charge by size, and scale down what is larger than they want."""

    format: Literal["png", "jpeg"] = "png"
    """PNG loses nothing; JPEG is a fraction of the bytes of a photograph."""
    side: int = Field(1024, ge=1)
    """Longest side in pixels; larger pictures are scaled down."""
    quality: int = Field(90, ge=1, le=95)
    """Of JPEG."""


class RemoteConfig(Frozen):
    """A model behind an OpenAI-compatible endpoint."""

    model_config = ConfigDict(hide_input_in_errors=True)  # somebody may have put a key into the wrong field

    endpoint: str
    """The address before `/chat/completions`, such as `http://localhost:8000/v1`."""
    model: str = Field(min_length=1)
    """The model's name at that endpoint."""
    key_env: str | None = None
    """Name of the environment variable that holds the key; None sends no key."""

    max_tokens: int = Field(512, ge=1)
    length_field: Literal["max_tokens", "max_completion_tokens"] = "max_tokens"
    """What the endpoint calls the limit of an answer's length; newer models of OpenAI want the second."""
    temperature: float | None = Field(0.0, ge=0)
    """None leaves it to the endpoint; some models refuse any other value than their own."""
    seed: int | None = None
    options: dict[str, Any] = Field(default_factory=dict)
    """Further fields of the request, such as `top_p` or `reasoning_effort`."""
    picture: PictureConfig = PictureConfig()

    timeout: float = Field(120.0, gt=0)
    """Seconds without a byte after which a request is given up."""
    retries: int = Field(5, ge=0)
    """After a dropped connection, or HTTP 408, 409, 429 and 5xx."""
    backoff: float = Field(1.0, ge=0)
    """Seconds before the first retry; they double each time, less up to half by chance."""
    longest_wait: float = Field(60.0, ge=0)
    """Seconds; a server that asks for a longer pause than this ends the run instead."""
    concurrency: int = Field(8, ge=1)
    """Requests at the same time."""

    input_price: float = Field(0.0, ge=0)
    """Per million tokens, in any currency."""
    output_price: float = Field(0.0, ge=0)
    budget: float | None = Field(None, gt=0)
    """In the same currency, for the life of one `Remote`. No request is sent once so much is spent."""
    cache: Path | None = None
    """Folder of answers by request; the same request is not paid for twice."""

    @field_validator("endpoint")
    @classmethod
    def _address(cls, endpoint: str) -> str:
        parts = urlsplit(endpoint)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError("an endpoint is an address such as http://localhost:8000/v1")
        if parts.username or parts.password or parts.query or parts.fragment:
            raise ValueError("an endpoint holds no user, password or query; name the key's variable in key_env")
        return endpoint.rstrip("/").removesuffix("/chat/completions")

    @field_validator("options")
    @classmethod
    def _further(cls, options: dict[str, Any]) -> dict[str, Any]:
        if taken := sorted(OURS & set(options)):
            raise ValueError(f"{', '.join(taken)} cannot be set here")
        return options

    @model_validator(mode="after")
    def _confidential(self) -> Self:
        parts = urlsplit(self.endpoint)
        if self.key_env is not None and parts.scheme == "http" and parts.hostname not in HERE:
            raise ValueError("a key would travel in clear text over http; use https, or leave key_env out")
        return self

    @model_validator(mode="after")
    def _affordable(self) -> Self:
        if self.budget is not None and not (self.input_price or self.output_price):
            raise ValueError("a budget needs input_price and output_price")
        if self.budget is not None and self.cache is None:
            raise ValueError("a budget needs a cache, so that what is paid for outlives the stop")
        return self

    def request(self) -> dict[str, Any]:
        """The fields of every request but its messages."""
        fields: dict[str, Any] = {"model": self.model, self.length_field: self.max_tokens}
        chosen = {"temperature": self.temperature, "seed": self.seed}
        return fields | {name: value for name, value in chosen.items() if value is not None} | self.options

    def identity(self) -> dict[str, Any]:
        """What answers depend on, for fingerprints of evaluations."""
        return {"endpoint": self.endpoint, "request": self.request(), "picture": self.picture.model_dump()}

    def cost(self, input_tokens: int, output_tokens: int) -> float:
        return (input_tokens * self.input_price + output_tokens * self.output_price) / 1e6
