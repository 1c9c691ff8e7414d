"""The process around a server: listening, signals, and an end in which what runs is finished."""

from __future__ import annotations

import asyncio
import signal
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Thread

import uvicorn

from isthmus.serving.http import Server
from isthmus.serving.link import Link
from isthmus.types import ConfigError

IDLE = 30
"""Seconds after which a connection without a request is closed."""


def serve_forever(server: Server, listening: socket.socket, grace: int = 30) -> None:
    """Serve until SIGTERM or Ctrl-C; then take in nothing more, and finish what runs within `grace` seconds."""
    for each in (signal.SIGINT, signal.SIGTERM):  # uvicorn hands signals on to these once it has ended in order
        signal.signal(each, lambda *_: None)
    with server.engine:
        try:
            _uvicorn(server, grace).run(sockets=[listening])
        finally:
            server.close()


@contextmanager
def serving(server: Server, host: str = "127.0.0.1", port: int = 0) -> Iterator[str]:
    """The same in a thread, for as long as the block lasts; gives the address."""
    listening = listen(host, port)
    http = _uvicorn(server, grace=1)
    thread = Thread(target=lambda: asyncio.run(http.serve(sockets=[listening])), daemon=True)
    with server.engine:
        thread.start()
        try:
            yield f"http://{host}:{listening.getsockname()[1]}"
        finally:
            http.should_exit = True
            thread.join()
            server.close()


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens; port 0 is any free one.

    It names its protocol: asyncio sends small pieces at once (TCP_NODELAY) over those alone that say TCP, and of the
    others each token of a stream waits for the client's delayed acknowledgement of the last, up to 40 ms.

    Raises:
        ConfigError: the address is not this machine's, or taken.
    """
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, kind, protocol, _, address = found[0]
        listening = socket.socket(family, kind, protocol)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(address)
    except OSError as error:
        raise ConfigError(
            f"cannot listen on {host} port {port}: {error.strerror or 'no such address'}", "choose another --port"
        ) from None
    listening.listen(1024)
    return listening


def _uvicorn(server: Server, grace: int) -> uvicorn.Server:
    config = uvicorn.Config(
        server.app(),
        http=Link,
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        timeout_keep_alive=IDLE,
        timeout_graceful_shutdown=grace,
    )
    return uvicorn.Server(config)
