"""One connection, which does not stay open for a client that says nothing whole.

uvicorn bounds how long a connection is idle after an answer, but neither how long the head of a request takes nor how
long the rest of a body trickles in that nobody reads any more: some hundred such sockets use up the process's files.
"""

from __future__ import annotations

import asyncio
from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol

PATIENCE = 15.0
"""Seconds that a client has, from its first byte, or from connecting, to the end of a request's head."""


class Link(H11Protocol):
    """HTTP/1.1 whose connections are closed where no request is whole in time; answers may take as long as they do."""

    patience = PATIENCE

    def __init__(self, *args: Any, **more: Any):
        super().__init__(*args, **more)
        self._timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._watch()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._stop()

    def _watch(self) -> None:
        """Count the seconds while bytes come that belong to no request in hand."""
        if self._answering:
            self._stop()
        elif self._timer is None:
            self._timer = self.loop.call_later(self.patience, self._give_up)

    @property
    def _answering(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    def _stop(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _give_up(self) -> None:
        self._timer = None
        if not self._answering:
            self.transport.close()
