"""What is decided before any route: the Host header, and headers that every response carries."""

from __future__ import annotations

import json
import logging
from collections.abc import Collection

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from isthmus.serving import journal
from isthmus.serving.refusals import invalid

log = logging.getLogger(__name__)
HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
}
UNKNOWN = "unknown_host"


class Door:
    """Refuses requests that call the server by a name that it does not have.

    A page on the web can make a browser resolve a name of its own to this machine; the Host header then still says that
    name. There is no CORS: no header here lets another origin read an answer.

    Args:
        app: the application behind the door.
        hosts: names without a port; an empty collection lets every name in.
    """

    def __init__(self, app: ASGIApp, hosts: Collection[str]):
        self.app, self.hosts = app, {host.lower() for host in hosts}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            if scope["type"] == "lifespan":
                await self.app(scope, receive, send)
            return

        async def dressed(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in HEADERS.items():
                    headers.setdefault(name, value)
            await send(message)

        if self.hosts and not self._known(scope):
            log.info("%s", journal.refused(421, scope["path"], UNKNOWN))
            await self._refuse(dressed)
            return
        await self.app(scope, receive, dressed)

    def _known(self, scope: Scope) -> bool:
        """Whether the one Host header names this server, with any port."""
        given = Headers(scope=scope).getlist("host")
        if len(given) != 1:
            return False
        name, colon, port = given[0].lower().rpartition(":")
        if not colon or given[0].endswith("]"):
            name, port = given[0].lower(), "0"
        return port.isdecimal() and port.isascii() and name in self.hosts

    async def _refuse(self, send: Send) -> None:
        told = invalid("this server does not have the name in the Host header; see --allow-host", code=UNKNOWN)
        body = json.dumps(told.body).encode()
        headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
        await send({"type": "http.response.start", "status": 421, "headers": headers})
        await send({"type": "http.response.body", "body": body})
