"""Many clients at once (S2), and clients that go away or never get to the point (S3)."""

from __future__ import annotations

import argparse
import json
import random
import socket
import statistics
import struct
import time
from collections import Counter
from io import BytesIO
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
from PIL import Image as Pillow

from attacked import KEY, NAME, Target, at_once, data_url, shown, target, user

CLIENTS = 64
TOKENS = 12
MARGIN = 1e-3
"""Between the two likeliest tokens, in nats: sums in another batch shape differ by a thousandth of it."""
LEAVING = 500
SLOW = 200
ROW = ["--max-batch", "16", "--queue", "64"]


def talks(count: int) -> list[list[dict[str, Any]]]:
    """Conversations of texts and pictures, some of several turns."""
    made = []
    for number in range(count):
        parts: list[Any] = [f"Question {number}: what do you see?"]
        parts[:0] = [shown(picture(number * 3 + each)) for each in range(number % 3)]
        talk = user(*parts)
        if number % 4 == 3:
            talk += [{"role": "assistant", "content": "a cat"}, *user("and now?")]
        made.append(talk)
    return made


def picture(seed: int) -> str:
    pixels = np.random.default_rng(seed).integers(0, 256, (40, 32, 3), np.uint8)
    raw = BytesIO()
    Pillow.fromarray(pixels).save(raw, "png")
    return data_url(raw.getvalue())


def clear(server: Target, talk: list[dict[str, Any]]) -> str | None:
    """The answer to a conversation asked alone; None where two tokens are so close that rounding may choose."""
    body = server.ask(talk, max_tokens=TOKENS, logprobs=True, top_logprobs=2).json()["choices"][0]
    tops = [[other["logprob"] for other in token["top_logprobs"]] for token in body["logprobs"]["content"]]
    return body["message"]["content"] if all(first - second > MARGIN for first, second in tops) else None


def crowd(model: Path, options: argparse.Namespace) -> dict[str, Any]:
    """S2: everybody hears the answer that he would hear alone; a queue that is full says so and lives."""
    clients, each = (8, 4) if options.tiny else (CLIENTS, options.steps)
    with target(model, *ROW, "--max-tokens", "256") as server:
        alone = [(talk, clear(server, talk)) for talk in talks(12 if options.tiny else 60)]
        known = [(talk, answer) for talk, answer in alone if answer is not None]
        statuses: Counter[int] = Counter()
        seconds: list[float] = []
        other: list[int] = []

        def client(number: int) -> None:
            dice = random.Random(number)
            for _ in range(each):
                talk, answer = dice.choice(known)
                begun = time.perf_counter()
                text, status = heard(server, talk, stream=dice.random() < 0.5)
                seconds.append(time.perf_counter() - begun)
                statuses[status] += 1
                if text != answer:
                    other.append(number)

        begun = time.perf_counter()
        at_once(clients, client)
        whole = time.perf_counter() - begun
        full = _overflow(server, known, 40 if options.tiny else 400)
        alive = server.alive
    seconds.sort()
    asked = clients * each
    p99 = seconds[int(len(seconds) * 0.99)]
    return {
        "what": f"{clients} clients x {each} requests, {len(known)} different, half of them streamed",
        "found": f"{asked - statuses[200]} errors, {len(other)} answers differ from those alone; "
        f"p50 {statistics.median(seconds):.2f} s, p99 {p99:.2f} s, {asked / whole:.0f} requests/s; "
        f"of {full['asked']} at once {full['refused']} got 429",
        "statuses": statuses,
        "different": len(other),
        "left_out_for_margin": len(alone) - len(known),
        "p50": statistics.median(seconds),
        "p99": p99,
        "requests_per_second": asked / whole,
        "overflow": full,
        "passed": statuses == {200: asked} and not other and full["passed"] and alive,
    }  # fmt: skip


def heard(server: Target, talk: list[dict[str, Any]], stream: bool) -> tuple[str, int]:
    """An answer and the status."""
    if not stream:
        response = server.ask(talk, max_tokens=TOKENS)
        body = response.json()
        return (body["choices"][0]["message"]["content"] if "choices" in body else ""), response.status_code
    body = {"model": NAME, "temperature": 0, "max_tokens": TOKENS, "messages": talk, "stream": True}
    with server.http.stream("POST", "/v1/chat/completions", json=body) as response:
        lines = [line[6:] for line in response.iter_lines() if line.startswith("data: {")]
    deltas = [choice["delta"] for line in lines for choice in json.loads(line).get("choices", ())]
    return "".join(delta.get("content") or "" for delta in deltas), response.status_code


def _overflow(server: Target, known: list[Any], count: int) -> dict[str, Any]:
    """More requests at one moment than the batch and the queue hold, each of its own client."""
    statuses: Counter[int] = Counter()
    wrong: list[int] = []

    def ask(number: int) -> None:
        talk, answer = known[number % len(known)]
        response = server.ask(talk, max_tokens=TOKENS)
        statuses[response.status_code] += 1
        if response.status_code == 200:
            said = response.json()["choices"][0]["message"]["content"]
            wrong.extend([number] if said != answer else [])
        elif response.headers.get("retry-after") != "1":
            wrong.append(number)

    at_once(count, ask)
    refused = statuses[429]
    passed = set(statuses) <= {200, 429} and not wrong and (count < 100 or refused > 0)
    return {"asked": count, "refused": refused, "statuses": statuses, "wrong": len(wrong), "passed": passed}


# ---------------------------------------------------------------------------------------------- leaving

MIDWAY = "midway"
WAYS = ("stream", "stream at once", "whole", "half a body", "half a head")
LONG = 1024
"""Tokens of an answer, so many that nobody leaves behind its end."""
AT_REST = ("files", "threads", "running", "waiting", "prefix_bytes", "picture_bytes")


def leaving(model: Path, options: argparse.Namespace) -> dict[str, Any]:
    """S3: whoever leaves, his slot is free within a step, and nothing is left over; slow sockets are closed."""
    count, slow = (30, 20) if options.tiny else (LEAVING, SLOW)
    with target(model, *ROW, "--max-tokens", str(LONG)) as server:
        talk = _endless(server)
        for _ in range(40):
            server.ask(talk)
        warming = _warmed(server, talk)
        before, done = _state(server), len(server.logged("steps"))
        midway = _midway(server, count, talk)
        for way in WAYS:
            _abandon(server, way, count, talk)
        freed = _settled(server)
        after = _state(server)
        steps = server.logged("steps")[done:]
        late = [number for number in steps if number > 1]
        healthy = server.ask(talk).status_code == 200
        sockets = _slowloris(server, slow)
        alive = server.alive
    grown = {name: round(after[name] - before[name], 2) for name in before}
    leaked = {name: grown[name] for name in AT_REST if grown[name] > 0}
    return {
        "what": f"{count} streams reset midway, {count} disconnects in each of {len(WAYS)} other ways; "
        f"{2 * slow} sockets that send a byte a second",
        "found": f"{midway} rows freed midway, {len(steps)} in all, at most {max(steps, default=0)} step after; "
        f"left over: {leaked or 'nothing'}; a request takes {sockets['median_beside']:.2f} s beside slow sockets, "
        f"{sockets['median_alone']:.2f} s without; {sockets['open']} of them open after {sockets['seconds']:.0f} s",
        "freed_midway": midway,
        "steps_until_free": Counter(map(str, steps)),
        "seconds_until_idle": freed,
        "threads_warming_up": warming,
        "before": before,
        "after": after,
        "slow_sockets": sockets,
        "passed": midway >= count and not late and not leaked and grown["resident MiB"] < 64 and healthy
        and sockets["passed"] and alive,
    }  # fmt: skip


def _endless(server: Target) -> list[dict[str, Any]]:
    """A conversation whose answer does not end by itself."""
    for talk in talks(60):
        if server.ask(talk, max_tokens=LONG).json()["choices"][0]["finish_reason"] == "length":
            return talk
    raise SystemExit("every answer of this model ends by itself")


def _warmed(server: Target, talk: list[dict[str, Any]], rounds: int = 8) -> list[int]:
    """Rounds of everything that follows, until one starts no thread; how many threads there are after each.

    The threads that look at requests begin one by one, when they are first needed, and each brings those of its matrix
    products along when it first has one. What starts a thread for every client that leaves does so in every round.
    """
    counts = [server.threads]
    for _ in range(rounds):
        at_once(50, lambda number: server.ask(talk))
        for way in (MIDWAY, *WAYS):
            _abandon(server, way, 50, talk)
        _settled(server)
        counts.append(server.threads)
        if counts[-1] <= counts[-2]:
            break
    return counts


def _midway(server: Target, count: int, talk: list[dict[str, Any]]) -> int:
    """Reset streams that have begun until so many rows were freed on their way; how many it were."""
    begun = len(server.logged("steps"))
    freed = 0
    for _ in range(2 * count):  # on a busy machine an answer may be whole before its client is heard
        if freed >= count:
            break
        _abandon(server, MIDWAY, min(50, count - freed), talk)
        _settled(server)
        freed = len(server.logged("steps")) - begun
    return freed


def _abandon(server: Target, way: str, count: int, talk: list[dict[str, Any]]) -> None:
    """So many clients that leave in one way, at most 50 at once: the queue has room for all of them."""
    for begun in range(0, count, 50):
        at_once(min(50, count - begun), lambda number: _leave(server.port, way, talk))


def _leave(port: int, way: str, talk: list[dict[str, Any]]) -> None:
    """Ask for a long answer and go, in one way."""
    asked = {
        "model": NAME,
        "messages": talk,
        "max_tokens": LONG,
        "temperature": 0,
        "stream": way in (MIDWAY, "stream", "stream at once"),
    }
    body = json.dumps(asked).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {KEY}\r\n".encode()
    head += b"Content-Type: application/json\r\nContent-Length: " + str(len(body)).encode() + b"\r\n\r\n"
    with socket.create_connection(("127.0.0.1", port), 60) as link:
        if way == "half a head":
            link.sendall(head[:60])
        elif way == "half a body":
            link.sendall(head + body[: len(body) // 2])
        else:
            link.sendall(head + body)
        if way == "stream":
            link.recv(4096)
        if way == "whole":
            time.sleep(0.05)
        if way == MIDWAY:
            heard = b""
            while heard.count(b"data: ") < 3 and (piece := link.recv(4096)):  # the first says who speaks
                heard += piece
            link.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # reset, not closed


def _settled(server: Target) -> float:
    """Seconds until nothing runs or waits."""
    begun = time.monotonic()
    while time.monotonic() - begun < 60:
        found = server.metrics()
        if not found["isthmus_running"] and not found["isthmus_waiting"]:
            break
        time.sleep(0.02)
    time.sleep(0.5)  # sockets of the last ones
    return round(time.monotonic() - begun - 0.5, 2)


def _state(server: Target) -> dict[str, float]:
    found = server.metrics()
    kept = {name: found[f"isthmus_{name}"] for name in ("running", "waiting", "prefix_bytes", "picture_bytes")}
    own = {"files": server.files, "threads": server.threads, "resident MiB": round(server.resident_mib, 1)}
    return kept | own


def _slowloris(server: Target, count: int) -> dict[str, Any]:
    """Sockets that send heads, and bodies, a byte a second, while others ask; until the server has closed them."""
    before = server.files
    alone = statistics.median(_fresh(server)[0] for _ in range(20))
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {KEY}\r\n".encode()
    whole = head + b"Content-Type: application/json\r\nContent-Length: 9999\r\n\r\n"
    links = []
    for number in range(2 * count):
        link = socket.create_connection(("127.0.0.1", server.port), 10)
        link.sendall(head[:20] if number % 2 else whole)
        links.append(link)
    seconds, statuses, begun = [], Counter[int](), time.monotonic()
    while links and time.monotonic() - begun < 90:
        links = [link for link in links if _dripped(link)]
        took, status = _fresh(server)
        seconds.append(took)
        statuses[status] += 1
        time.sleep(max(0.0, 1 - seconds[-1]))
    time.sleep(0.5)
    beside = statistics.median(seconds)
    return {
        "sockets": 2 * count,
        "open": len(links),
        "seconds": time.monotonic() - begun,
        "statuses": statuses,
        "median_alone": alone,
        "median_beside": beside,
        "files_left": server.files - before,
        "passed": not links and set(statuses) == {200} and beside < 3 * alone + 0.5 and server.files <= before,
    }


def _fresh(server: Target) -> tuple[float, int]:
    """Seconds of a short request over a connection of its own, and its status."""
    begun = time.perf_counter()
    body = {"model": NAME, "messages": user("hi"), "max_tokens": 2}
    with httpx2.Client(base_url=server.address, headers=dict(server.http.headers), timeout=60) as fresh:
        status = fresh.post("/v1/chat/completions", json=body).status_code
    return time.perf_counter() - begun, status


def _dripped(link: socket.socket) -> bool:
    """Send one more byte; whether the server still listens to it."""
    link.setblocking(False)
    try:
        if link.recv(4096) == b"":
            raise OSError
    except BlockingIOError:
        pass
    except OSError:
        link.close()
        return False
    try:
        link.send(b"a")
    except OSError:
        link.close()
        return False
    return True
