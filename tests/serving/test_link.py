"""Connections that never come to the point are closed; those that wait for an answer are not."""

from __future__ import annotations

import json
import socket
import time

import httpx2
import pytest
from http_server import KEY, NAME, running, said, user

import composed
from isthmus.serving.engine import Sizes
from isthmus.serving.link import Link

HEAD = f"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {KEY}\r\n".encode()


@pytest.fixture(scope="module")
def served():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Link, "patience", 0.4)
        with running(composed.model("llama"), Sizes(batch=2)) as (server, address):
            yield server, address


def closed_after(address: str, first: bytes, drip: bytes = b"") -> float:
    """Seconds until the server closes a connection that goes on like this; 5 if it does not."""
    begun = time.monotonic()
    with socket.create_connection(address.removeprefix("http://").split(":"), 5) as link:
        link.sendall(first)
        link.settimeout(0.1)
        while time.monotonic() - begun < 5:
            try:
                if not link.recv(4096):
                    break
            except TimeoutError:
                link.sendall(drip)
            except OSError:
                break
    return time.monotonic() - begun


@pytest.mark.parametrize(
    ("first", "drip"),
    [
        (b"", b""),
        (HEAD[:30], b""),
        (HEAD[:30], b"a"),
        (b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\nGET /heal", b"t"),
        (b"GET /health HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9999\r\n\r\n", b"a"),
        (b"POST /v1/models HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9999\r\n\r\n", b"a"),
    ],
    ids=["silent", "half a head", "a head that drips", "a second head", "a body nobody reads", "a refused body"],
)
def test_what_comes_to_no_request_is_closed(served, first, drip):
    assert 0.3 < closed_after(served[1], first, drip) < 4


def test_pieces_of_a_stream_are_sent_at_once(served, monkeypatch):
    told, made = [], Link.connection_made

    def note(link, transport):
        made(link, transport)
        told.append(transport.get_extra_info("socket").getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))

    monkeypatch.setattr(Link, "connection_made", note)
    httpx2.get(f"{served[1]}/health")
    assert told == [1]


def test_an_answer_may_take_longer_and_a_connection_is_used_again(served):
    server, address = served
    right = server.engine.pool.step
    server.engine.pool.step = lambda ids: (time.sleep(0.1), right(ids))[1]
    body = {"model": NAME, "messages": user(said("hi")), "max_tokens": 8, "temperature": 0}
    try:
        with httpx2.Client(base_url=address, headers={"Authorization": f"Bearer {KEY}"}, timeout=20) as client:
            for _ in range(2):
                begun = time.monotonic()
                told = client.post("/v1/chat/completions", json=body)
                assert told.status_code == 200 and time.monotonic() - begun > Link.patience
    finally:
        server.engine.pool.step = right


def test_the_description_says_what_requests_are_made_of(served):
    address = served[1]
    assert httpx2.get(f"{address}/openapi.json").status_code == 401
    found = httpx2.get(f"{address}/openapi.json", headers={"Authorization": f"Bearer {KEY}"}).json()
    fields = found["components"]["schemas"]["ChatRequest"]["properties"]
    assert {"messages", "max_tokens", "response_format", "tools"} <= set(fields) and found["openapi"] == "3.1.0"
    named = set(json.dumps(found).split("#/components/schemas/")[1:])
    assert all(text.partition('"')[0] in found["components"]["schemas"] for text in named)
    assert "500" not in found["paths"]["/v1/chat/completions"]["post"]["responses"]
