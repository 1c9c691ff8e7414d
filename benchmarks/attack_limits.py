"""Every limit at one below, at it and one above (S4), and bodies made from the server's own description (S6)."""

from __future__ import annotations

import argparse
import itertools
import json
import random
import re
import socket
import struct
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from attacked import KEY, NAME, Target, data_url, shown, target, user
from isthmus.serving.limits import Limits

LIMITS = Limits()
DEPTH = 200
"""Of braces in a body, which pydantic's parser sets."""
HEAD = 16_384
"""Bytes of a head, which h11 sets."""
LEAK = re.compile(r"0x[0-9a-f]{6,}|Traceback|File \"|site-packages|/usr/|/home/|/tmp/|PIL\.|torch\.|" + KEY)
Body = dict[str, Any]
Case = tuple[str, int, Callable[[int], Body], str]
"""A limit's name, its value, the request that has so much of it, and the code or words by which the excess is known."""


def asked(*parts: Any, **more: Any) -> Body:
    return {"model": NAME, "max_tokens": 1, "temperature": 0, "messages": user(*parts or ("hi",))} | more


def png(width: int, height: int) -> str:
    """A picture of one colour, a bit per pixel."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    rows = zlib.compressobj(1)
    data = rows.compress(bytes((width + 7) // 8 + 1) * height) + rows.flush()
    return data_url(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b""))


def cases() -> Iterator[Case]:
    """Chat requests that have exactly so much of one thing; what they have of the others is small."""
    tool = {"type": "function", "function": {"name": "t", "parameters": {"type": "object"}}}
    small = png(8, 8)
    yield "answers (n)", LIMITS.answers, lambda n: asked(n=n), "at most"
    yield "stop strings", LIMITS.stops, lambda n: asked(stop=["abc"] * n), "stop strings"
    yield "characters of a stop string", LIMITS.stop_length, lambda n: asked(stop="z" * n), "stop strings"
    yield "top_logprobs", 20, lambda n: asked(logprobs=True, top_logprobs=n), "top_logprobs"
    yield "tools", LIMITS.tools, lambda n: asked(tools=[tool] * n, tool_choice="none"), "tools"
    yield "characters of a tool's name", 64, lambda n: asked(tools=[_named("t" * n)], tool_choice="none"), "pattern"
    yield "characters of a schema", LIMITS.schema, _schema, "JSON schema"
    yield "messages", LIMITS.messages, _messages, "messages"
    yield "parts of a message", LIMITS.parts, lambda n: asked(*["a"] * n), "parts"
    yield "characters of text", LIMITS.text, lambda n: asked("a" * n), "string_above_max_length"
    yield "pictures", LIMITS.pictures, lambda n: asked(*[shown(small)] * n), "too_many_images"
    yield (
        "pixels of a picture, in rows of 4000",
        LIMITS.pixels // 4000,
        lambda n: asked(shown(png(4000, n))),
        "image_too_large",
    )
    yield "pixels of a side", LIMITS.longest, lambda n: asked(shown(png(n, 100))), "image_too_large"
    yield "aspect", LIMITS.aspect, lambda n: asked(shown(png(n * 10, 10))), "too narrow"
    yield "pixels of all pictures, in rows of 4000", LIMITS.all_pixels // 4000, _all_pixels, "together"
    yield (
        "characters of a data URL",
        LIMITS.encoded,
        lambda n: asked(shown(small + "A" * (n - len(small)))),
        "image_too_large",
    )


def _named(name: str) -> Body:
    return {"type": "function", "function": {"name": name}}


def _schema(size: int) -> Body:
    schema = {"type": "object", "description": ""}
    schema["description"] = "d" * (size - len(json.dumps(schema)))
    return asked(response_format={"type": "json_schema", "json_schema": {"name": "x", "schema": schema}})


def _messages(count: int) -> Body:
    talk = [{"role": ("user", "assistant")[(count - number) % 2 == 0], "content": "a"} for number in range(count)]
    talk[0] = {"role": "system", "content": "a"} if count % 2 == 0 else talk[0]
    return asked(messages=talk)


def _all_pixels(rows: int) -> Body:
    return asked(*[shown(png(4000, each)) for each in (rows - 2 * (rows // 3), rows // 3, rows // 3)])


def limits(model: Path, options: argparse.Namespace) -> dict[str, Any]:
    """S4. Within a limit no request may be refused for it; beyond, each must be, in our own words."""
    rows, wrong = [], []
    with target(model, "--max-tokens", "64", "--queue", "4", "--max-batch", "4") as server:
        for name, most, make, words in cases():
            statuses = []
            for value in (most - 1, most, most + 1):
                response = server.send(make(value))
                text = response.text
                statuses.append(response.status_code)
                known = words in text and response.status_code in (400, 413)
                if known is not (value > most) or LEAK.search(text):
                    wrong.append(f"{name} {value}: {response.status_code} {text[:120]}")
            rows.append([name, most, *statuses])
        others = [*_embeddings(server), *_bodies(server), *_smallest(server), *_tokens(server)]
        times = [] if options.tiny else _times(server)
        for name, most, statuses, expected in [*others, *times]:
            rows.append([name, most, *statuses])
            wrong += [] if statuses == expected else [f"{name}: {statuses}, expected {expected}"]
        alive = server.alive
    return {
        "what": f"{len(rows)} limits at one below, at it and one above",
        "found": f"{len(wrong)} wrong, no path, address or trace in an error",
        "limits": rows,
        "wrong": wrong,
        "passed": not wrong and alive,
    }


Row = tuple[str, Any, list[int], list[int]]


def _embeddings(server: Target) -> Iterator[Row]:
    most = LIMITS.inputs
    sent = [{"model": NAME, "input": ["a"] * count} for count in (most - 1, most, most + 1)]
    yield (
        "inputs of an embedding",
        most,
        [server.http.post("/v1/embeddings", json=b).status_code for b in sent],
        [200, 200, 400],
    )


def _bodies(server: Target) -> Iterator[Row]:
    frame = json.dumps(asked() | {"padding": ""})
    statuses = []
    for size in (LIMITS.body - 1, LIMITS.body, LIMITS.body + 1):
        raw = frame[:-2] + "x" * (size - len(frame)) + frame[-2:]
        headers = {"Content-Type": "application/json"}
        statuses.append(server.http.post("/v1/chat/completions", content=raw.encode(), headers=headers).status_code)
    yield "bytes of a body", LIMITS.body, statuses, [200, 200, 413]
    nested = ['{"a":' * (depth - 1) + "1" + "}" * (depth - 1) for depth in (DEPTH - 1, DEPTH, DEPTH + 1, 100_000)]
    bodies = [json.dumps(asked())[:-1] + f', "unknown": {deep}}}' for deep in nested]
    headers = {"Content-Type": "application/json"}
    found = [server.http.post("/v1/chat/completions", content=body, headers=headers).status_code for body in bodies]
    yield "depth of JSON, and 100 000", DEPTH, found, [200, 200, 400, 400]
    sizes = (HEAD - 1, HEAD, HEAD + 1, 1_000_000)
    yield (
        "bytes of a head that is not whole, and a million",
        HEAD,
        [_headed(server, n) for n in sizes],
        [200, 200, 400, 400],
    )


def _headed(server: Target, size: int) -> int:
    """The status of a request whose head stands at so many bytes, and is whole with one more."""
    begins = b"GET /health HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nX: "
    head = begins + b"x" * (size - len(begins) - 3) + b"\r\n\r"
    with socket.create_connection(("127.0.0.1", server.port), 60) as link:
        link.sendall(head)
        link.settimeout(2 if size <= HEAD else 10)  # until it has read all of it, or refused it
        try:
            answer = link.recv(64)
        except TimeoutError:
            link.settimeout(60)
            link.sendall(b"\n")
            answer = link.recv(64)
        except ConnectionError:
            return 400
    return int(answer.split()[1]) if answer else 400


def _smallest(server: Target) -> Iterator[Row]:
    """Limits from below: one more is right, one less is wrong."""
    sides = [server.send(asked(shown(png(9, side)))).status_code for side in (1, 2, 3)]
    yield "pixels of a side, at least", LIMITS.shortest, sides, [400, 200, 200]
    tokens = [server.send(asked(max_tokens=value)).status_code for value in (0, 1, 2)]
    yield "max_tokens, at least", 1, tokens, [400, 200, 200]
    chars = [server.send(asked(stop="z" * value)).status_code for value in (0, 1, 2)]
    yield "characters of a stop string, at least", 1, chars, [400, 200, 200]


def _tokens(server: Target) -> Iterator[Row]:
    """Wishes above are cut and not refused; a prompt that fills the context is refused."""
    wishes = [server.send(asked(max_tokens=value)).json()["usage"]["completion_tokens"] for value in (63, 64, 65)]
    cut = min(wishes[2], 64)
    yield "tokens of an answer, which are told", 64, wishes, [min(63, wishes[0]), cut, cut]
    frame = server.send(asked("0")).json()["usage"]["prompt_tokens"] - 1
    context = server.http.get("/v1/models").json()["data"][0]["context"]
    fills = [server.send(asked("0" * (size - frame))).status_code for size in (context - 2, context - 1, context)]
    yield "tokens of a prompt", context - 1, fills, [200, 200, 400]


def _times(server: Target) -> Iterator[Row]:
    """A body that is whole a second before, and a second after, its time."""
    statuses = []
    for seconds in (LIMITS.reading - 1, LIMITS.reading + 1):
        body = json.dumps(asked()).encode()
        head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {KEY}\r\n"
        with socket.create_connection(("127.0.0.1", server.port), 60) as link:
            link.sendall(
                head.encode() + f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n".encode()
            )
            link.sendall(body[:-1])
            link.settimeout(seconds)
            try:
                first = link.recv(64)
            except TimeoutError:
                link.settimeout(60)
                link.sendall(body[-1:])
                first = link.recv(64)
            statuses.append(int(first.split()[1]))
    yield "seconds of a body, one before and after", LIMITS.reading, statuses, [200, 408]


# ---------------------------------------------------------------------------------------------- any body


def bodies(model: Path, options: argparse.Namespace) -> dict[str, Any]:
    """S6: what schemathesis draws from the server's description, right and wrong, and damaged bytes of it."""
    count = 100 if options.tiny else options.bodies
    statuses: Counter[int] = Counter()
    faults: list[str] = []
    slowest = 0.0
    with target(model, "--max-tokens", "4", "--deadline", "30") as server:
        description = server.http.get("/openapi.json").json()
        for number, (path, raw) in enumerate(_drawn(description, count)):
            begun = time.perf_counter()
            response = server.http.post(path, content=raw, headers={"Content-Type": "application/json"})
            slowest = max(slowest, time.perf_counter() - begun)
            statuses[response.status_code] += 1
            declared = str(response.status_code) in description["paths"][path]["post"]["responses"]
            if (
                not declared
                or response.status_code >= 500
                or (response.status_code != 200 and LEAK.search(response.text))
            ):
                faults.append(f"{number} {path}: {response.status_code} {response.text[:100]} to {raw[:300]!r}")
        alive = server.alive
        answers = server.ask(user("hi")).status_code == 200
        failed = server.metrics()["isthmus_engine_failed_total"]
        rest = server.metrics()["isthmus_running"]
    return {
        "what": f"{sum(statuses.values()):,} bodies from the description: valid, invalid, and damaged bytes",
        "found": f"{len(faults)} undeclared or 5xx; slowest {slowest:.2f} s; it {'lives' if alive else 'died'}",
        "statuses": statuses,
        "faults": faults[:20],
        "engine_failures": failed,
        "passed": not faults and alive and answers and not failed and not rest,
    }


def _drawn(description: dict[str, Any], count: int) -> list[tuple[str, bytes]]:
    """Paths and bodies: a third each fit the schema, do not fit it, and are bytes of the others with some changed."""
    import schemathesis
    from schemathesis import GenerationMode

    schema = schemathesis.openapi.from_dict(description)
    found: list[tuple[str, bytes]] = []
    shares = {"/v1/chat/completions": 5 / 18, "/v1/embeddings": 1 / 18}
    for (path, share), mode in itertools.product(shares.items(), GenerationMode):
        cases = schema[path]["POST"].as_strategy(generation_mode=mode)
        found += [
            (path, _raw(case.body, number)) for number, case in enumerate(_examples(cases, max(1, int(count * share))))
        ]
    dice = random.Random(0)
    for _ in range(count - len(found)):
        path, raw = dice.choice(found)
        found.append((path, _damaged(raw, dice)))
    return found


def _examples(strategy: Any, count: int) -> list[Any]:
    """What Hypothesis draws, the same in every run."""
    from hypothesis import HealthCheck, Phase, given, seed, settings

    found: list[Any] = []

    @seed(1)
    @settings(
        max_examples=count,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(strategy)
    def collect(case: Any) -> None:
        found.append(case)

    collect()
    return found[:count]


def _raw(body: Any, number: int) -> bytes:
    """The body as bytes; most are about the model that is served, and every second asks it something, so that what
    comes after the first check is reached."""
    if isinstance(body, bytes):
        return body
    if isinstance(body, dict) and isinstance(body.get("model"), str):
        body = body | {"model": NAME} | ({"messages": user("hi")} if "messages" in body and number % 2 else {})
    try:
        return json.dumps(body).encode()
    except (TypeError, ValueError):
        return str(body).encode(errors="replace")


def _damaged(raw: bytes, dice: random.Random) -> bytes:
    data = bytearray(raw)
    for _ in range(dice.choice((1, 1, 2, 8))):
        place = dice.randrange(len(data) + 1)
        kind = dice.randrange(3)
        if kind == 0:
            data[place : place + dice.randrange(1, 9)] = b""
        elif kind == 1:
            data[place:place] = dice.choice(
                (b"\x00", b'"', b"{", b"]", b"\\ud800", b"1e999", b"-", b"null", b"\xff", b"," * 9)
            )
        else:
            data[place : place + 1] = bytes([dice.randrange(256)])
    return bytes(data)
