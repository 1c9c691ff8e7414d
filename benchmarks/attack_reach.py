"""Where the server may be led and who may ask it: URLs that point inward (S1), keys, names and paths (S5)."""

from __future__ import annotations

import argparse
import http.server
import itertools
import re
import selectors
import socket
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from attacked import HOST, KEY, NAME, NAMES, PUBLIC, Target, shown, target, user

PORTS = (80, 443, 8080, 6379, 2375)
"""Where the canary listens, as far as this user may; and at one port that is free."""
REDIRECTS = (
    "http://127.0.0.1/", "http://127.0.0.1:{port}/", "//127.0.0.1/", "http://localhost/", "http://inner.example/",
    "http://[::1]/", "http://0/", "http://2130706433/", "http://169.254.169.254/", "file:///etc/passwd",
    "gopher://127.0.0.1:{port}/_x", f"http://{HOST}@127.0.0.1/", f"http://127.0.0.1\\@{HOST}/", "http://127.0.0.1#@{HOST}/",
)  # fmt: skip


@contextmanager
def canary() -> Iterator[tuple[int, list[str]]]:
    """Sockets that listen on loopback: a free port, and who connected to any of them."""
    visits: list[str] = []
    with ExitStack() as stack, selectors.DefaultSelector() as waiting:
        first = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
        free = first.getsockname()[1]
        waiting.register(first, selectors.EVENT_READ)
        for address, port in itertools.product(("127.0.0.1", "::1"), (*PORTS, free)):
            with suppress(OSError):  # taken, a port that only root has, or no IPv6
                family = socket.AF_INET6 if ":" in address else socket.AF_INET
                waiting.register(
                    stack.enter_context(socket.create_server((address, port), family=family)), selectors.EVENT_READ
                )
        over = threading.Event()

        def watch() -> None:
            while not over.is_set():
                for key, _ in waiting.select(0.1):
                    link, peer = key.fileobj.accept()  # type: ignore[union-attr]
                    visits.append(f"{key.fileobj.getsockname()} from {peer}")  # type: ignore[union-attr]
                    link.close()

        thread = threading.Thread(target=watch)
        thread.start()
        try:
            yield free, visits
        finally:
            over.set()
            thread.join()


@contextmanager
def public(location: list[str]) -> Iterator[tuple[int, list[str]]]:
    """A web server that plays the public address and sends all to `location[0]`: its port, and the paths asked."""
    asked: list[str] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_response(302)
            self.send_header("Location", location[0])
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *unused: Any) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield server.server_port, asked
        finally:
            server.shutdown()
            thread.join()


def inward(port: int) -> list[str]:
    """URLs that must lead to no connection; `port` is where the canary listens besides the usual ones."""
    from malicious import URLS

    forms = ["127.0.0.1", "127.1", "0x7f.1", "2130706433", "017700000001", "0.0.0.0", "[::1]", "[::ffff:127.0.0.1]"]
    own = [f"http://{form}{end}" for form in (*forms, "localhost", socket.gethostname()) for end in ("/", f":{port}/")]
    names = [f"http://{name}/" for name, turns in NAMES.items() if turns[0] != [PUBLIC]]
    return [*URLS, *own, *names, f"http://{HOST}:{port}/", f"https://{HOST}:{port}/"]


def urls(model: Path, options: argparse.Namespace) -> dict[str, Any]:
    """S1. Listed hosts include loopback, so that only the rule on addresses stands between; then none is listed."""
    location = [""]
    statuses: Counter[int] = Counter()
    with canary() as (port, visits), public(location) as (public_port, asked):
        hosts = [
            *NAMES,
            "127.0.0.1",
            "127.1",
            "0",
            "0.0.0.0",
            "2130706433",
            "0x7f.1",
            "017700000001",
            "169.254.169.254",
        ]
        listed = [option for host in hosts for option in ("--media-host", host)]
        sent = inward(port)[:: 8 if options.tiny else 1]
        with target(model, *listed, public=public_port) as server:
            for url in sent:
                statuses[server.ask(user(shown(url), "what?")).status_code] += 1
            early = list(asked)
            for place in REDIRECTS:
                location[0] = place.format(port=port, HOST=HOST)
                statuses[server.ask(user(shown(f"http://{HOST}/go"), "what?")).status_code] += 1
            location[0] = "http://rebinds.example/again"  # now a loopback name, at its second question
            statuses[server.ask(user(shown("http://rebinds.example/go"), "what?")).status_code] += 1
            connected = server.logged("connect")
            alive = server.alive
        with target(model, public=public_port) as server:
            for url in (*sent[:: 4 if options.tiny else 1], f"https://{HOST}/a.png"):
                statuses[server.ask(user(shown(url), "what?")).status_code] += 1
            silent = not server.logged("connect") and not server.logged("name")
    inside = [to for to in connected if to != ["127.0.0.1", str(public_port)]]
    expected = len(REDIRECTS) + 1
    asked_as_meant = not early and len(asked) == expected
    return {
        "what": f"{len(sent)} URLs and {expected} redirects, hosts listed; the URLs again with none listed",
        "found": f"{len(visits)} at the canary, {len(inside)} elsewhere inside; {len(asked)} of {expected} in public",
        "urls": len(sent),
        "statuses": statuses,
        "canary": visits,
        "inside": inside,
        "public_connections": len(connected) - len(inside),
        "silent_without_hosts": silent,
        "passed": not visits and not inside and asked_as_meant and silent and alive and set(statuses) <= {400, 413},
    }


# ---------------------------------------------------------------------------------------------- who may ask

PATHS = (
    "/v1/models", "//v1/models", "/v1//models", "/V1/models", "/v1%2fmodels", "/v1%2Fmodels", "/v1/models/",
    "/v1/models/x", "/v1/./models", "/health/../v1/models", "/page/../v1/models", "/v1/models%00", "/v1/models;x=1",
    "/v1/models?key=1", "/v1/models/../models", "/%76%31/models", "/metrics", "/metrics/", "//metrics", "/METRICS",
    "/openapi.json", "/docs", "/redoc", "/v1/chat/completions", "/v1/embeddings", "/page/facts", "/page/attention",
    "/page/../facts", "/.", "/..", "http://localhost/v1/models", "http://evil.example/v1/models", "*", "/v1\\models",
    "/health/v1/models", "/health%2f..%2fmetrics",
)  # fmt: skip
HOSTS = (
    "localhost", "127.0.0.1", "[::1]:8000", "LOCALHOST:80", "localhost:1", "evil.example", "localhost.evil.example",
    "", "localhost@evil", "127.0.0.1.evil", "localhost:80:80", "localhost:x", "health", "/health", "localhost/health",
    "[::1",
)  # fmt: skip
KEYS = (
    None, "", "Bearer", "Bearer ", f"Bearer {KEY}x", f"Bearer {KEY[:-1]}", f"Basic {KEY}", KEY, f"bearer  {KEY}",
    f"Bearer {KEY.upper()}", f"Bearer {KEY}, Bearer x", "Bearer null", "Bearer \xff\xfe",
)  # fmt: skip
GUARDED = ("owned_by", "isthmus_engine", "choices", "embedding", '"facts"', '"paths"')
"""Words that only an answer to somebody with the key has."""


def doors(model: Path, options: argparse.Namespace) -> dict[str, Any]:
    """S5."""
    statuses: Counter[int] = Counter()
    leaks: list[str] = []
    cases = list(itertools.product(("GET",), PATHS, HOSTS, KEYS)) + list(
        itertools.product(("POST",), PATHS, HOSTS[:2], KEYS)
    )
    cases = cases[:: 101 if options.tiny else 1]
    with target(model) as server:
        for method, path, host, key in cases:
            answer = server.raw(_request(method, path, host, key))
            status = int(answer.split(b" ")[1]) if answer.startswith(b"HTTP/1.1 ") else 0
            statuses[status] += 1
            if status not in (307, 400, 401, 404, 405, 421) or any(word.encode() in answer for word in GUARDED):
                leaks.append(f"{method} {path} {host} {key}: {answer[:60]!r}")
        right = server.raw(_request("GET", "/v1/models", "localhost", f"Bearer {KEY}"))
        told = right.lower()
        dressed = b"nosniff" in told and b"access-control" not in told and b"\r\nserver:" not in told
        local = _listening(server)
        alive = server.alive
    exposed = _without_a_key(model)
    return {
        "what": f"{len(cases):,} requests: {len(PATHS)} paths, {len(HOSTS)} hosts, {len(KEYS)} keys, two methods",
        "found": f"{len(leaks)} let in; listens at {', '.join(local)}; 0.0.0.0 without a key ends with {exposed}",
        "statuses": {str(status): number for status, number in sorted(statuses.items())},
        "leaks": leaks[:20],
        "passed": not leaks
        and NAME.encode() in right
        and dressed
        and local == ["127.0.0.1"]
        and exposed == 2
        and alive,
    }


def _request(method: str, path: str, host: str, key: str | None) -> bytes:
    lines = [f"{method} {path} HTTP/1.1", f"Host: {host}", "Connection: close", "Content-Length: 2"]
    lines += ["Content-Type: application/json"] + ([] if key is None else [f"Authorization: {key}"])
    return "\r\n".join([*lines, "", "{}"]).encode("latin-1")


def _listening(server: Target) -> list[str]:
    """The addresses at which its process listens, as the system says."""
    inodes = set()
    for link in Path(f"/proc/{server.process.pid}/fd").iterdir():
        with suppress(OSError):
            inodes |= set(re.findall(r"socket:\[(\d+)\]", str(link.readlink())))
    found = set()
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and fields[9] in inodes:
                found.add(_spelled(fields[1].partition(":")[0]))
    return sorted(found)


def _spelled(digits: str) -> str:
    return socket.inet_ntoa(bytes.fromhex(digits)[::-1]) if len(digits) == 8 else f"IPv6 {digits}"


def _without_a_key(model: Path) -> int:
    """The exit code of a server that should listen to everybody and has no key."""
    script = Path(sys.executable).with_name("isthmus")
    return subprocess.run([script, "serve", str(model), "--host", "0.0.0.0", "--port", "0"], capture_output=True,
                          timeout=120).returncode  # fmt: skip
