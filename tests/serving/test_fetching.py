"""Pictures by URL: what may not be fetched makes no connection, what may is fetched within its bounds."""

from __future__ import annotations

import socket
import threading
import time
from contextlib import contextmanager

import pytest

from isthmus.serving.fetching import Fetcher, is_public
from isthmus.serving.refusals import Refusal
from malicious import HOST, PRIVATE, URLS

PUBLIC = "93.184.216.34"


class Net:
    """Names, and what was connected to."""

    def __init__(self, names: dict[str, list[str]], answers: list[bytes] = ()):  # type: ignore[assignment]
        self.names, self.answers = names, list(answers)
        self.resolved: list[str] = []
        self.connected: list[tuple[str, int]] = []
        self.requests: list[bytes] = []
        self.drip = 0.0

    def resolve(self, host, port):
        self.resolved.append(host)
        if host not in self.names:
            raise socket.gaierror
        return self.names[host]

    def connect(self, address, port, timeout):
        self.connected.append((address, port))
        near, far = socket.socketpair()
        answer = self.answers.pop(0)

        def serve():
            request = b""
            while b"\r\n\r\n" not in request and (piece := far.recv(4096)):
                request += piece
            self.requests.append(request)
            step = 10 if self.drip else 1 << 16
            try:
                for start in range(0, len(answer), step):
                    far.sendall(answer[start : start + step])
                    time.sleep(self.drip)
            except OSError:
                pass
            far.close()

        threading.Thread(target=serve, daemon=True).start()
        return near

    def fetcher(self, **settings) -> Fetcher:
        settings = {"hosts": frozenset({HOST, *self.names})} | settings
        return Fetcher(resolve=self.resolve, connect=self.connect, **settings)


def answer(body=b"picture", status="200 OK", **headers) -> bytes:
    headers = {"Content_Type": "image/png", "Content_Length": str(len(body))} | headers
    lines = "".join(f"{name.replace('_', '-')}: {value}\r\n" for name, value in headers.items() if value is not None)
    return f"HTTP/1.1 {status}\r\n{lines}\r\n".encode() + body


@contextmanager
def refused(net: Net):
    before = len(net.connected)
    with pytest.raises(Refusal) as told:
        yield told
    assert told.value.status in (400, 413) and len(net.connected) == before


@pytest.mark.parametrize("url", URLS, ids=[f"{number}" for number in range(len(URLS))])
def test_no_connection_is_made(url):
    net = Net({HOST: [PUBLIC]})
    with refused(net):
        net.fetcher()(url)
    assert not net.resolved  # not even the name was asked for


@pytest.mark.parametrize("address", PRIVATE)
def test_a_name_of_an_address_that_is_not_public(address):
    assert not is_public(address)
    for addresses in ([address], [PUBLIC, address], [address, PUBLIC]):
        net = Net({HOST: addresses})
        with refused(net):
            net.fetcher()(f"http://{HOST}/a.png")


def test_public_addresses_are():
    for address in (PUBLIC, "8.8.8.8", "2606:4700:4700::1111", "::ffff:8.8.8.8", "64:ff9b::8.8.8.8"):
        assert is_public(address), address


def test_nothing_is_fetched_by_default():
    net = Net({HOST: [PUBLIC]})
    with refused(net) as told:
        net.fetcher(hosts=frozenset())(f"https://{HOST}/a.png")
    assert "data: URL" in told.value.message


def test_a_listed_host_is_asked_at_the_address_that_was_checked():
    net = Net({HOST: [PUBLIC, "8.8.8.8"]}, [answer(b"bytes")])
    assert net.fetcher()("HTTP://Pictures.Example:80/a%20b.png?c=d#e") == b"bytes"
    assert net.connected == [(PUBLIC, 80)] and net.resolved == [HOST]
    request = net.requests[0].decode().lower()
    assert request.startswith("get /a%20b.png?c=d http/1.1\r\n") and f"host: {HOST}\r\n" in request
    assert "cookie" not in request and "authorization" not in request


def test_a_name_that_changes_is_resolved_once():
    net = Net({HOST: [PUBLIC]}, [answer()])
    right = net.resolve

    def rebinding(host, port):
        found = right(host, port)
        net.names[HOST] = ["127.0.0.1"]
        return found

    fetcher = Fetcher(frozenset({HOST}), resolve=rebinding, connect=net.connect)
    assert fetcher(f"http://{HOST}/") == b"picture" and net.connected == [(PUBLIC, 80)] and len(net.resolved) == 1
    with refused(net):
        fetcher(f"http://{HOST}/")


def redirect(to: str) -> bytes:
    return answer(b"", "302 Found", Location=to)


@pytest.mark.parametrize(
    "to",
    ["http://127.0.0.1/", "http://169.254.169.254/", "http://inner.example/", "//127.0.0.1/", "file:///etc/passwd",
     "http://other.example/", "", f"http://{HOST}:22/", f"http://u@{HOST}/", "gopher://x/", "http://[::1]/", "http://[",
     "//[::1"],
)  # fmt: skip
def test_redirects_are_checked_like_the_first_url(to):
    net = Net({HOST: [PUBLIC], "inner.example": ["10.0.0.1"]}, [redirect(to), *[redirect(f"http://{HOST}/")] * 5])
    with pytest.raises(Refusal):
        net.fetcher()(f"http://{HOST}/")
    assert {address for address, _ in net.connected} == {PUBLIC}


def test_redirects_to_listed_hosts_are_followed_a_few_times():
    names = {HOST: [PUBLIC], "cdn.example": ["8.8.8.8"]}
    net = Net(names, [redirect("/b"), redirect("http://cdn.example/c"), redirect("d"), answer(b"end")])
    assert net.fetcher()(f"http://{HOST}/a") == b"end"
    assert [request.split(b" ")[1] for request in net.requests] == [
        b"/b" if n == 1 else p for n, p in enumerate([b"/a", b"/b", b"/c", b"/d"])
    ]
    assert net.connected == [(PUBLIC, 80), (PUBLIC, 80), ("8.8.8.8", 80), ("8.8.8.8", 80)]
    net = Net(names, [redirect(f"http://{HOST}/")] * 9)
    with pytest.raises(Refusal, match="too often"):
        net.fetcher()(f"http://{HOST}/a")
    assert len(net.connected) == 4


@pytest.mark.parametrize("claimed", ["10", None, "1000000"])
def test_bytes_are_counted_as_they_come(claimed):
    fits = Net({HOST: [PUBLIC]}, [answer(b"x" * 1000)])
    assert len(fits.fetcher(most=1000)(f"http://{HOST}/")) == 1000
    large = Net({HOST: [PUBLIC]}, [answer(b"x" * 1001, Content_Length=claimed)])
    if claimed == "10":
        assert len(large.fetcher(most=1000)(f"http://{HOST}/")) == 10
        return
    with pytest.raises(Refusal) as told:
        large.fetcher(most=1000)(f"http://{HOST}/")
    assert told.value.status == 413


@pytest.mark.parametrize("where", ["head", "body", "chunk"])
def test_what_drips_is_cut_off(where):
    padding = {"X_Padding": "p" * 4000} if where == "head" else {}
    if where == "chunk":  # of a connection that http.client lets go of once it has read the head
        padding = {"Connection": "close", "Transfer_Encoding": "chunked", "Content_Length": None}
    net = Net({HOST: [PUBLIC]}, [answer(b"0" * 4000 if where == "chunk" else b"x" * 4000, **padding)])
    net.drip = 0.02
    begun = time.monotonic()
    with pytest.raises(Refusal):
        net.fetcher(whole=0.3)(f"http://{HOST}/")
    assert time.monotonic() - begun < 5  # all of it would take eight seconds


def test_only_pictures_and_only_successes():
    short = answer(b"x", Content_Length="9")
    for bad in (
        short,
        answer(Content_Type="text/html"),
        answer(Content_Type=None),
        answer(status="404 Not Found"),
        b"nonsense\r\n\r\n",
        b"",
    ):
        net = Net({HOST: [PUBLIC]}, [bad])
        with pytest.raises(Refusal) as told:
            net.fetcher()(f"http://{HOST}/")
        assert "nonsense" not in told.value.message
