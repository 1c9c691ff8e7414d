"""Bodies of requests: read within limits on size and time, and understood in a few threads beside the event loop."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

from fastapi import Request
from starlette.requests import ClientDisconnect

from isthmus.serving.limits import Limits
from isthmus.serving.refusals import Refusal, left

Result = TypeVar("Result")
HELD = 512 << 20
"""Bytes of all bodies together that are held at once."""
INTAKE = 4
"""Requests whose contents are looked at side by side."""


class Bodies:
    """What takes in bodies.

    Args:
        limits: on one body.
        queue: requests that may wait to be understood.

    Attributes:
        held: bytes of all bodies that are read or understood now, or wait to be.
        entering: bodies that are being understood, or wait to be.
    """

    def __init__(self, limits: Limits, queue: int) -> None:
        self.limits = limits
        self.queue = queue
        self.held = self.entering = 0
        self._threads = ThreadPoolExecutor(INTAKE, thread_name_prefix="isthmus-intake")

    async def take_in(self, request: Request, understand: Callable[[bytes], Result]) -> Result:
        """A request's body as `understand`, which runs in a thread, makes it out.

        Raises:
            Refusal: it is too large, too slow, or wrong, or the client went before it was whole.
        """
        if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
            raise Refusal(415, "the Content-Type must be application/json", "unsupported_media_type")
        pieces: list[bytes] = []
        held = 0
        try:
            async with asyncio.timeout(self.limits.reading):
                async for piece in request.stream():
                    held += len(piece)
                    self.held += len(piece)
                    self._check(held)
                    pieces.append(piece)
            work, result = self._begin(pieces, understand)
            held = 0  # they are given back once nothing holds them
        except TimeoutError:
            raise Refusal(408, "the body took too long to arrive", "timeout") from None
        except ClientDisconnect:
            raise left() from None
        finally:
            self.held -= held
        try:
            await asyncio.wait({result}, timeout=self.limits.decoding)
        finally:
            work.cancel()  # if it has not begun
        if not result.done():
            message = "the request could not be looked at in time"
            raise Refusal(503, message, "timeout", headers={"x-should-retry": "false"})
        return result.result()

    def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)

    def _check(self, size: int) -> None:
        if size > self.limits.body:
            raise Refusal(413, f"the body has more than {self.limits.body} bytes", "body_too_large")
        if self.held > HELD:
            raise Refusal(429, "too many large requests at once", "queue_full", headers={"Retry-After": "1"})

    def _begin(
        self, pieces: list[bytes], understand: Callable[[bytes], Result]
    ) -> tuple[Future[Result], asyncio.Future[Result]]:
        """Let a thread understand a body: the work, which may be cancelled, and its result in the event loop.

        The body counts until the work is done or cancelled, whoever still waits for it.
        """
        if self.entering >= self.queue + INTAKE:
            raise Refusal(429, "too many requests wait", "queue_full", headers={"Retry-After": "1"})
        size = sum(map(len, pieces))

        def look() -> Result:
            raw = b"".join(pieces)
            pieces.clear()
            return understand(raw)

        def let_go(result: asyncio.Future[Result]) -> None:
            pieces.clear()  # the queue of the threads keeps cancelled work
            self.entering -= 1
            self.held -= size
            if not result.cancelled():
                result.exception()  # seen: who waited for it may have gone

        work = self._threads.submit(look)
        result = asyncio.wrap_future(work)
        self.entering += 1
        result.add_done_callback(let_go)
        return work, result
