"""Pictures from the web, for hosts that the operator listed and no others.

One parse decides and is used to connect; the name is resolved once, every address it has must be public, and the
connection goes to an address that was checked. A redirect is a new URL with all checks. No proxy, no cookie, no
credential, and at most so many bytes in so many seconds.
"""

from __future__ import annotations

import contextlib
import http.client
import ipaddress
import re
import socket
import ssl
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias
from urllib.parse import urljoin

from isthmus.serving.refusals import Refusal, invalid

Address: TypeAlias = ipaddress.IPv4Address | ipaddress.IPv6Address
Resolve: TypeAlias = Callable[[str, int], list[str]]
Connect: TypeAlias = Callable[[str, int, float], socket.socket]

URL = re.compile(
    r"(https?)://([a-z0-9](?:[a-z0-9.-]*[a-z0-9])?)(?::(\d{1,5}))?(/[^\s\\#]*)?(?:#[^\s\\]*)?", re.IGNORECASE
)
"""No user, no backslash, no brackets: what a second parser could read differently does not match."""
PORTS = {"http": 80, "https": 443}
HOPS = 3
CHUNK = 1 << 16
UNICAST, TRANSLATED = ipaddress.ip_network("2000::/3"), ipaddress.ip_network("64:ff9b::/96")
"""What the internet routes of IPv6, and IPv4 addresses within it that a gateway there translates."""
TYPES = ("image/png", "image/jpeg", "image/webp", "image/gif", "application/octet-stream")


@dataclass(frozen=True)
class Target:
    """A URL taken apart."""

    scheme: str
    host: str
    port: int
    path: str


def resolve(host: str, port: int) -> list[str]:
    """Every address that a name has."""
    return [str(found[4][0]) for found in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)]


def connect(address: str, port: int, timeout: float) -> socket.socket:
    """A connection to an address, never to a name."""
    return socket.create_connection((address, port), timeout)


@dataclass(frozen=True)
class Fetcher:
    """Fetches from listed hosts.

    Attributes:
        hosts: exact names; nothing is fetched if there are none.
        most: bytes of one picture.
        first, whole: seconds until connected, and in all.
    """

    hosts: frozenset[str] = frozenset()
    most: int = 8 << 20
    first: float = 3.0
    whole: float = 10.0
    resolve: Resolve = resolve
    connect: Connect = connect

    def __call__(self, url: str) -> bytes:
        """The bytes behind a URL.

        Raises:
            Refusal: it may not be fetched, or cannot be.
        """
        until = time.monotonic() + self.whole
        for _ in range(HOPS + 1):
            target = self.check(url)
            answer = self._get(target, self._address(target), until)
            if isinstance(answer, bytes):
                return answer
            try:
                url = urljoin(f"{target.scheme}://{target.host}{target.path}", answer)
            except ValueError:
                raise _refused("it redirects to what is no URL") from None
        raise _refused("it redirects too often")

    def check(self, url: str) -> Target:
        """Take a URL apart, if it may be fetched at all; nothing is resolved.

        Raises:
            Refusal: pictures are not fetched, or not from there.
        """
        if not self.hosts:
            raise _refused("this server fetches no pictures; send a data: URL")
        found = URL.fullmatch(url) if url.isascii() and len(url) <= 2048 else None
        if found is None:
            raise _refused("it is not a plain http or https URL")
        scheme, host, port = found[1].lower(), found[2].lower(), found[3]
        if host not in self.hosts:
            raise _refused("its host is not on the server's list")
        if port is not None and int(port) != PORTS[scheme]:
            raise _refused("its port is not the usual one")
        return Target(scheme, host, PORTS[scheme], found[4] or "/")

    def _address(self, target: Target) -> str:
        """An address of the host, if all of them are public."""
        try:
            addresses = self.resolve(target.host, target.port)
        except (OSError, UnicodeError):
            raise _refused("its host has no address") from None
        if not addresses or not all(is_public(address) for address in addresses):
            raise _refused("its host is not a public one")
        return addresses[0]

    def _get(self, target: Target, address: str, until: float) -> bytes | str:
        """The body, or where a redirect leads."""
        link = _Pinned(target, lambda: self._open(target, address, until))
        watch = threading.Timer(_left(until), link.cut)  # a header that trickles in never meets a socket's timeout
        watch.start()
        try:
            link.request("GET", target.path, headers={"Accept": "image/*", "Accept-Encoding": "identity"})
            answer = link.getresponse()
            if answer.status in (301, 302, 303, 307, 308):
                return answer.getheader("Location") or ""
            if answer.status != 200:
                raise _refused(f"it answers with status {answer.status}")
            if (answer.getheader("Content-Type") or "").partition(";")[0].strip().lower() not in TYPES:
                raise _refused("it is not a picture")
            return self._body(answer, link, until)
        except (OSError, http.client.HTTPException):
            raise _refused("it cannot be reached") from None
        finally:
            watch.cancel()
            link.close()

    def _open(self, target: Target, address: str, until: float) -> socket.socket:
        raw = self.connect(address, target.port, min(self.first, _left(until)))
        raw.settimeout(_left(until))
        if target.scheme == "http":
            return raw
        return ssl.create_default_context().wrap_socket(raw, server_hostname=target.host)

    def _body(self, answer: http.client.HTTPResponse, link: _Pinned, until: float) -> bytes:
        pieces, size = [], 0
        while True:
            if not answer.isclosed():
                link.raw.settimeout(_left(until))
            piece = answer.read1(CHUNK)
            if not piece:
                break
            size += len(piece)
            if size > self.most:
                raise Refusal(413, "a picture's URL sends too much", "image_too_large", "messages")
            _left(until)
            pieces.append(piece)
        _left(until)  # a connection that was cut ends like one that is complete
        if answer.length:
            raise _refused("it ends too early")
        return b"".join(pieces)


class _Pinned(http.client.HTTPConnection):
    """A connection whose socket comes from us; the host stands only in the request."""

    def __init__(self, target: Target, made: Callable[[], Any]):
        super().__init__(target.host, target.port)
        self._made = made
        self.raw: Any = None
        """The socket, of which the connection itself lets go once it knows that the other side will close."""

    def connect(self) -> None:
        self.sock = self.raw = self._made()

    def cut(self) -> None:
        """End whatever waits for the other side."""
        with contextlib.suppress(OSError, AttributeError):
            self.raw.shutdown(socket.SHUT_RDWR)


def is_public(address: str) -> bool:
    """Whether an address is one of the public internet, also where it is wrapped in another."""
    try:
        found: Address = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return False
    if isinstance(found, ipaddress.IPv6Address):
        inner = found.ipv4_mapped or found.sixtofour or (found.teredo or (None, None))[1]
        if inner is not None:
            return is_public(str(inner))
        if found in TRANSLATED:
            return is_public(str(ipaddress.IPv4Address(int(found) & 0xFFFFFFFF)))
        if found not in UNICAST:
            return False
    return found.is_global and not found.is_multicast


def _left(until: float) -> float:
    """Seconds that are left."""
    left = until - time.monotonic()
    if left <= 0:
        raise _refused("it takes too long")
    return left


def _refused(why: str) -> Refusal:
    return invalid(f"a picture's URL is refused: {why}", "messages", "invalid_image_url")
