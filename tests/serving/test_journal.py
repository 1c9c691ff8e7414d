"""The server's log: a line for each answer and each refusal, in which nothing stands that somebody wrote."""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Callable, Iterator

import httpx2
import pytest
from http_server import KEY, NAME, running, said, shown, user

import composed
from isthmus.serving import journal

HEADERS = {"Authorization": f"Bearer {KEY}"}
Lines = Callable[[int], list[str]]


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    with running(composed.model("llama")) as (_, address):
        yield address


@pytest.fixture
def lines(caplog: pytest.LogCaptureFixture) -> Lines:
    """So many lines of the log, waited for: a stream's is written behind its last byte."""
    caplog.set_level(logging.INFO, "isthmus.serving")

    def found(count: int) -> list[str]:
        end = time.monotonic() + 10
        while len(caplog.records) < count and time.monotonic() < end:
            time.sleep(0.01)
        return [record.getMessage() for record in caplog.records if record.name.startswith("isthmus.serving")]

    return found


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
def test_an_answer_is_a_line_of_its_sizes_and_its_time(address: str, lines: Lines, stream: bool) -> None:
    body = {"model": NAME, "max_tokens": 3, "temperature": 0, "seed": 1, "stream": stream, "n": 2}
    for parts in ([said("a secret")], [shown(1), said("a secret")], [shown(1), shown(2), said("a secret")]):
        asked = body | {"messages": user(*parts)}
        assert httpx2.post(f"{address}/v1/chat/completions", json=asked, headers=HEADERS).status_code == 200
    told = lines(3)
    assert [re.sub(r"\d+\+[1-6] tokens|\d+\.\d s", "#", line) for line in told] == [
        "200 · # · #",
        "200 · # · 1 picture · #",
        "200 · # · 2 pictures · #",
    ]


def test_a_refusal_is_a_line_of_status_path_and_code(address: str, lines: Lines) -> None:
    asked = {"model": "a secret", "messages": user(said("a secret"))}
    sent = [
        httpx2.post(f"{address}/v1/chat/completions", json=asked, headers=HEADERS),
        httpx2.get(f"{address}/v1/models?key=secret", headers={"Authorization": "Bearer secret"}),
        httpx2.get(f"{address}/no%0AERROR%1b[31mthing%00?secret", headers=HEADERS),
        httpx2.get(f"{address}/health", headers={"Host": "secret.example"}),
    ]
    assert [answer.status_code for answer in sent] == [404, 401, 404, 421]
    assert lines(4) == [
        "404 · /v1/chat/completions · model_not_found",
        "401 · /v1/models · invalid_api_key",
        r"404 · /no\nERROR\x1b[31mthing\x00",
        "421 · /health · unknown_host",
    ]


def test_a_stream_that_is_left_is_no_answer(address: str, lines: Lines) -> None:
    asked = {"model": NAME, "max_tokens": 400, "stream": True, "messages": user(said("hi"))}
    with httpx2.stream("POST", f"{address}/v1/chat/completions", json=asked, headers=HEADERS) as answer:
        next(answer.iter_bytes())
    (line,) = lines(1)
    assert line == "499 · /v1/chat/completions · client_closed_request" or line.startswith("200 · ")


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("wrong", "'wrong'"),
        ("modèle", "'modèle'"),
        ("a\nb\x1b[31m\u202e\ud800", r"'a\nb\x1b[31m\u202e\ud800'"),
        ("x" * 1000, f"'{'x' * 80}…'"),
    ],
)
def test_a_name_that_a_stranger_chose_is_told_in_one_short_line(name: str, told: str) -> None:
    assert journal.named(name) == told


def test_a_model_that_is_not_here_is_named_beside_the_one_that_is(address: str) -> None:
    asked = {"model": "wr\nong", "messages": user(said("hi"))}
    answer = httpx2.post(f"{address}/v1/chat/completions", json=asked, headers=HEADERS)
    assert answer.json()["error"]["message"] == rf"no model 'wr\nong' here; this server has '{NAME}'"
    assert httpx2.get(f"{address}/v1/models/wrong", headers=HEADERS).status_code == 404
