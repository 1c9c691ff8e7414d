"""What one request may ask for, at most."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Limits:
    """Sizes are in bytes, times in seconds.

    Attributes:
        body: of a whole request, known before anything of it is read as JSON.
        encoded: of one data URL.
        pictures: in all messages together.
        messages: of one conversation.
        parts: of one message, and tool calls in it.
        text: characters of all that is read, tools and schemas among it.
        answers, stops, tools: of one request; stop_length: characters of a stop string.
        schema: of one JSON schema, written down.
        inputs: of one request for embeddings.
        pixels, longest, shortest, aspect: of one picture, told from its header before it is decoded.
        all_pixels: of all pictures together.
        tokens: of one answer; larger wishes are cut to it.
        deadline: from a request's arrival to its last token.
        reading: until a body has arrived.
        decoding: until a request's pictures are decoded and its text is tokenised.
        attention: of one layer's weights over a prompt, heads x tokens x tokens in float32, where a map is asked for.
    """

    body: int = 20 << 20
    encoded: int = 10 << 20
    pictures: int = 8
    pixels: int = 20_000_000
    all_pixels: int = 40_000_000
    longest: int = 10_000
    shortest: int = 2
    aspect: int = 200
    messages: int = 256
    parts: int = 64
    text: int = 1 << 20
    answers: int = 4
    stops: int = 4
    stop_length: int = 64
    tools: int = 32
    schema: int = 64 << 10
    inputs: int = 64
    tokens: int = 1024
    deadline: float = 300.0
    reading: float = 30.0
    decoding: float = 20.0
    attention: int = 512 << 20
