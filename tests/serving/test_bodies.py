"""Bodies are counted as long as anything holds them, whoever still waits for what they say."""

from __future__ import annotations

import asyncio
import sys
import threading

import pytest
from starlette.requests import Request

from isthmus.serving.bodies import INTAKE, Bodies
from isthmus.serving.limits import Limits
from isthmus.serving.refusals import Refusal, refusal

SIZE = 1000


def request(body: bytes) -> Request:
    async def receive() -> dict[str, object]:
        return {"type": "http.request", "body": body, "more_body": False}

    return Request({"type": "http", "headers": [(b"content-type", b"application/json")]}, receive)


async def until(condition) -> None:
    for _ in range(1000):
        if condition():
            return
        await asyncio.sleep(0.005)
    raise AssertionError("it did not come to that")


def test_what_is_refused_late_is_counted_until_it_is_let_go():
    bodies, begun, go_on = Bodies(Limits(decoding=0.2), queue=64), [], threading.Event()

    def understand(raw: bytes) -> int:
        begun.append(raw)
        go_on.wait(30)
        return len(raw)

    async def ask() -> None:
        sent = [bytes([number]) * SIZE for number in range(12)]
        before = [sys.getrefcount(raw) for raw in sent]
        asked = [bodies.take_in(request(raw), understand) for raw in sent]
        refused = await asyncio.gather(*asked, return_exceptions=True)
        assert {(each.status, each.code) for each in refused} == {(503, "timeout")}
        assert all(each.headers == {"x-should-retry": "false"} for each in refused), "nor a client's own decision"
        del refused, asked
        assert (bodies.entering, bodies.held) == (INTAKE, INTAKE * SIZE), "threads cannot be stopped"
        waiting = [number for number, raw in enumerate(sent) if raw not in begun]
        assert len(waiting) == 12 - INTAKE
        assert all(sys.getrefcount(sent[number]) == before[number] for number in waiting), "nothing holds these"
        go_on.set()
        await until(lambda: bodies.entering == bodies.held == 0)
        assert await bodies.take_in(request(b"12"), understand) == 2
        assert len(begun) == INTAKE + 1, "nobody waited for the others"
        assert bodies.entering == bodies.held == 0

    try:
        asyncio.run(ask())
    finally:
        go_on.set()
        bodies.close()


def test_what_finds_no_place_is_given_back():
    bodies, go_on = Bodies(Limits(decoding=0.2), queue=-INTAKE), threading.Event()

    async def ask() -> None:
        with pytest.raises(Refusal) as told:
            await bodies.take_in(request(b"1"), lambda raw: go_on.wait(30))
        assert told.value.status == 429 and bodies.entering == bodies.held == 0

    asyncio.run(ask())
    bodies.close()


@pytest.mark.parametrize("error", [TimeoutError("its own"), ValueError("its own"), Refusal(400, "its own")])
def test_an_error_of_what_looks_at_a_body_stays_that(error):
    bodies = Bodies(Limits(), queue=4)

    def understand(raw: bytes) -> None:
        raise error

    async def ask() -> None:
        with pytest.raises(type(error), match="its own") as told:
            await bodies.take_in(request(b"1"), understand)
        assert refusal(told.value).status == (400 if isinstance(error, Refusal) else 500)
        assert bodies.entering == bodies.held == 0

    asyncio.run(ask())
    bodies.close()
