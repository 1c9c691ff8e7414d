"""A small chat endpoint in a thread: it checks what it is sent, and answers or misbehaves as it was told."""

from __future__ import annotations

import base64
import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from io import BytesIO
from typing import Any

from PIL import Image as Pillow

KEY = "sk-a-secret-that-must-not-leak-0123456789"
USAGE = {"prompt_tokens": 1000, "completion_tokens": 10, "total_tokens": 1010}


@dataclass
class Act:
    """What to do with one request instead of answering it."""

    status: int = 200
    body: Any = None
    """JSON, or bytes as they are."""
    headers: dict[str, str] = field(default_factory=dict)
    cut: bool = False
    """Close the connection where the answer, or the rest of the stream, would stand."""
    silent: float = 0.0
    """Seconds before anything is sent."""


def refusal(status: int, message: str, code: str = "", **headers: str) -> Act:
    error = {"message": message, "type": "error", "param": None, "code": code}
    return Act(status, {"error": error}, {name.replace("_", "-"): value for name, value in headers.items()})


class ChatServer(ThreadingHTTPServer):
    """Answers with `reply(body)`; `acts` are used up first, one per request."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.acts: list[Act] = []
        self.reply: Callable[[dict[str, Any]], str] = lambda body: "an apple"
        self.key: str | None = None
        self.usage: dict[str, int] | None = USAGE
        self.pause = self.drip = 0.0
        self.bodies: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.times: list[float] = []
        self.faults: list[str] = []
        self.busy = self.busiest = 0
        self.lock = threading.Lock()

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/v1"


@contextmanager
def running() -> Iterator[ChatServer]:
    with ChatServer() as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: ChatServer

    def log_message(self, *_: Any) -> None:
        pass

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        server = self.server
        with server.lock:
            server.times.append(time.monotonic())
            server.headers.append({name.lower(): value for name, value in self.headers.items()})
            server.bodies.append(body)
            server.faults += faults(self.path, self.headers.get("Content-Type", ""), body)
            server.busy += 1
            server.busiest = max(server.busiest, server.busy)
            act = server.acts.pop(0) if server.acts else Act()
        try:
            time.sleep(server.pause + act.silent)
            self._answer(body, act)
        except (BrokenPipeError, ConnectionResetError):
            pass
        finally:
            with server.lock:
                server.busy -= 1

    def _answer(self, body: dict[str, Any], act: Act) -> None:
        given = self.headers.get("Authorization", "")
        if self.server.key and given != f"Bearer {self.server.key}":
            act = refusal(401, f"Incorrect API key provided: {given.removeprefix('Bearer ')}", "invalid_api_key")
        if act.body is not None:
            self._send(act)
        elif act.cut and not body.get("stream"):
            self.close_connection = True
        elif body.get("stream"):
            self._stream(self.server.reply(body), act.cut)
        else:
            message = {"role": "assistant", "content": self.server.reply(body), "refusal": None}
            whole = self._frame("chat.completion", {"message": message, "finish_reason": "stop", "logprobs": None})
            self._send(Act(body=whole | ({"usage": self.server.usage} if self.server.usage else {})))

    def _frame(self, kind: str, choice: dict[str, Any] | None) -> dict[str, Any]:
        choices = [] if choice is None else [{"index": 0, **choice}]
        return {"id": "chatcmpl-1", "object": kind, "created": 1, "model": "apple-1-0305", "choices": choices}

    def _send(self, act: Act) -> None:
        raw = act.body if isinstance(act.body, bytes) else json.dumps(act.body).encode()
        self.send_response(act.status)
        for name, value in {"Content-Type": "application/json", "Content-Length": str(len(raw)), **act.headers}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(raw)

    def _stream(self, text: str, cut: bool) -> None:
        """Words one by one, each event sent in two parts; no length, so the end of the connection is the end."""
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream; charset=utf-8")
        self.send_header("Connection", "close")
        self.end_headers()
        first, *rest = text.split(" ")
        deltas = [{"role": "assistant", "content": ""}, {"content": first}, *({"content": f" {w}"} for w in rest)]
        events = [self._frame("chat.completion.chunk", {"delta": delta, "finish_reason": None}) for delta in deltas]
        if cut:
            events = events[:2]
        else:
            events.append(self._frame("chat.completion.chunk", {"delta": {}, "finish_reason": "stop"}))
            events.append(self._frame("chat.completion.chunk", None) | {"usage": self.server.usage})
        for event in events:
            time.sleep(self.server.drip)
            raw = f": keep-alive\n\ndata: {json.dumps(event, ensure_ascii=False)}\n\n".encode()
            for part in (raw[: len(raw) // 2], raw[len(raw) // 2 :]):
                self.wfile.write(part)
                self.wfile.flush()
        if not cut:
            self.wfile.write(b"data: [DONE]\n\n")
        self.close_connection = True


def faults(path: str, content_type: str, body: dict[str, Any]) -> list[str]:
    """What a strict server would refuse in a request."""
    found = [] if path == "/v1/chat/completions" else [f"path {path}"]
    found += [] if content_type == "application/json" else [f"content type {content_type}"]
    found += [f"no {name}" for name in ("model", "messages", "max_tokens") if name not in body]
    roles = [message["role"] for message in body["messages"]]
    spoken = roles[1:] if roles[0] == "system" else roles
    if spoken != ["user", "assistant"] * (len(spoken) // 2) + ["user"]:
        found.append(f"roles {roles}")
    for message in body["messages"]:
        content = message["content"]
        if message["role"] != "user" and not isinstance(content, str):
            found.append(f"{message['role']} with parts")
        for part in content if isinstance(content, list) else []:
            if part["type"] == "image_url":
                pictures([part])
            elif set(part) != {"type", "text"}:
                found.append(f"part {sorted(part)}")
    return found


def pictures(parts: list[dict[str, Any]]) -> list[Pillow.Image]:
    """The pictures of a content, decoded from their data URLs."""
    found = []
    for part in parts:
        if part["type"] == "image_url":
            head, encoded = part["image_url"]["url"].split(",", 1)
            picture = Pillow.open(BytesIO(base64.b64decode(encoded, validate=True)))
            assert head == f"data:image/{(picture.format or '').lower()};base64"
            picture.load()
            found.append(picture)
    return found
