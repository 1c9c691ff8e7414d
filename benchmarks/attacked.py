"""A server under attack: `isthmus serve` in a process of its own whose network is watched, and how it is asked.

    python benchmarks/attacked.py LOG.jsonl PORT MODEL [OPTION ...]

This starts `isthmus serve` unchanged, in a process that writes to a log every connection it makes, and how many decode
steps passed between the cancelling of a request and the end of its rows. Names that the attacks use are answered from
`NAMES`; the one public address among them is played by PORT on loopback, and no other address outside this machine can
be reached. So what the server would do with an open network is seen without one.
"""

from __future__ import annotations

import base64
import json
import os
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx2

TESTS = Path(__file__).parent.parent / "tests"
KEY = "sk-a-secret-that-must-not-leak"
NAME = "target"
PUBLIC = "93.184.216.34"
HOST = "pictures.example"
NAMES: dict[str, list[list[str]]] = {
    HOST: [[PUBLIC]],
    "rebinds.example": [[PUBLIC], ["127.0.0.1"]],
    "inner.example": [["127.0.0.1"]],
    "mixed.example": [[PUBLIC, "127.0.0.1"]],
    "mixed-first.example": [["127.0.0.1", PUBLIC]],
    "mapped.example": [["::ffff:127.0.0.1"]],
    "six.example": [["::1"]],
    "metadata.example": [["169.254.169.254"]],
    "private.example": [["10.0.0.1"]],
    "zero.example": [["0.0.0.0"]],
    "shared.example": [["100.64.0.1"]],
    "sixtofour.example": [["2002:7f00:1::"]],
    "nat.example": [["64:ff9b::7f00:1"]],
    "localhost": [["127.0.0.1"]],
}
"""What a name resolves to, the first time and after that."""


# ---------------------------------------------------------------------------------------------- in its process


def _watch_network(log: Path, port: int) -> None:
    """Log connections, answer names, and let nothing out."""
    lines = log.open("a", buffering=1)
    asked: dict[str, int] = {}
    right_names, right_connect = socket.getaddrinfo, socket.create_connection

    def seen(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "socket.connect" and isinstance(arguments[1], tuple):
            lines.write(json.dumps({"connect": list(map(str, arguments[1][:2]))}) + "\n")
            if not str(arguments[1][0]).startswith(("127.", "::1")):
                raise OSError("outside this machine")

    def names(host: Any, service: Any, *more: Any, **options: Any) -> list[Any]:
        if host not in NAMES:
            return right_names(host, service, *more, **options)
        lines.write(json.dumps({"name": host}) + "\n")
        turn = asked[host] = asked.get(host, -1) + 1
        found = NAMES[host][min(turn, len(NAMES[host]) - 1)]
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, service)) for address in found]

    def connect(address: tuple[str, int], *more: Any, **options: Any) -> socket.socket:
        return right_connect(("127.0.0.1", port) if address[0] == PUBLIC else address, *more, **options)

    sys.addaudithook(seen)
    socket.getaddrinfo, socket.create_connection = names, connect  # type: ignore[assignment]


def _watch_slots(log: Path) -> None:
    """Log the decode steps between the cancelling of a request and the end of each of its rows."""
    from isthmus.serving.answers import Job
    from isthmus.serving.engine import Engine

    lines = log.open("a", buffering=1)
    at: dict[int, int] = {}
    engines: list[Engine] = []
    right_start, right_cancel, right_leave = Engine.start, Job.cancel, Engine._leave

    def start(self: Engine) -> Engine:
        engines.append(self)
        return right_start(self)

    def cancel(self: Job) -> None:
        if not self.cancelled and not self.over:
            at[id(self)] = engines[0].counts.steps
        right_cancel(self)

    def leave(self: Engine, slot: int, keep: bool = False) -> None:
        job = self._answers[slot].job
        if job.cancelled and id(job) in at:
            lines.write(json.dumps({"steps": self.counts.steps - at[id(job)]}) + "\n")
        right_leave(self, slot, keep)

    Engine.start, Job.cancel, Engine._leave = start, cancel, leave  # type: ignore[method-assign]


# ---------------------------------------------------------------------------------------------- from outside


@dataclass
class Target:
    """A running server."""

    process: subprocess.Popen[bytes]
    address: str
    log: Path
    http: httpx2.Client = field(repr=False)

    @property
    def port(self) -> int:
        return int(self.address.rpartition(":")[2])

    @property
    def alive(self) -> bool:
        return self.process.poll() is None and self.http.get("/health").status_code == 200

    @property
    def files(self) -> int:
        """Open files and sockets."""
        return len(list(Path(f"/proc/{self.process.pid}/fd").iterdir()))

    @property
    def threads(self) -> int:
        return len(list(Path(f"/proc/{self.process.pid}/task").iterdir()))

    @property
    def resident_mib(self) -> float:
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(next(line for line in status.splitlines() if line.startswith("VmRSS")).split()[1]) / 1024

    def logged(self, what: str) -> list[Any]:
        return [line[what] for line in map(json.loads, self.log.read_text().splitlines()) if what in line]

    def metrics(self) -> dict[str, float]:
        text = self.http.get("/metrics").text
        return {name: float(value) for name, _, value in (line.rpartition(" ") for line in text.splitlines())
                if not name.startswith("#")}  # fmt: skip

    def ask(self, messages: list[dict[str, Any]], **more: Any) -> httpx2.Response:
        return self.send({"model": NAME, "temperature": 0, "max_tokens": 2, "messages": messages} | more)

    def send(self, body: dict[str, Any]) -> httpx2.Response:
        return self.http.post("/v1/chat/completions", json=body)

    def raw(self, request: bytes, seconds: float = 60.0) -> bytes:
        """What it says to bytes as they are, which ask it to close the connection."""
        with socket.create_connection(("127.0.0.1", self.port), seconds) as link:
            pieces = []
            with suppress(ConnectionError):  # it may close before everything is sent
                link.sendall(request)
                while piece := link.recv(65536):
                    pieces.append(piece)
        return b"".join(pieces)


@contextmanager
def target(model: Path, *options: str, public: int = 9) -> Iterator[Target]:
    """`isthmus serve` on a free port of loopback, with a key."""
    with tempfile.TemporaryDirectory(prefix="isthmus-attacked-") as folder:
        log, out = Path(folder) / "log.jsonl", Path(folder) / "out"
        log.touch()
        command = [sys.executable, __file__, str(log), str(public), str(model), "--port", "0", "--name", NAME]
        environment = os.environ | {"ISTHMUS_ATTACKED": KEY, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
        with out.open("wb") as told:
            process = subprocess.Popen(
                [*command, "--api-key-env", "ISTHMUS_ATTACKED", "--device", "cpu", *options],
                stdout=told, stderr=told, env=environment,
            )  # fmt: skip
        try:
            address = _listening(process, out)
            headers = {"Authorization": f"Bearer {KEY}"}
            limits = httpx2.Limits(max_connections=1000)
            with httpx2.Client(base_url=address, headers=headers, timeout=120, limits=limits) as http:
                yield Target(process, address, log, http)
        finally:
            process.terminate()
            process.wait(60)


def _listening(process: subprocess.Popen[bytes], out: Path) -> str:
    """The address that the server says, once it answers there."""
    for _ in range(6000):
        text = out.read_text()
        if "/v1" in text:
            address = text.partition("http://")[2].partition("/v1")[0]
            if _healthy(f"http://{address}"):
                return f"http://{address}"
        if process.poll() is not None:
            raise SystemExit(f"the server ended before it listened:\n{text[-2000:]}")
        time.sleep(0.1)
    raise SystemExit("the server did not listen in time")


def _healthy(address: str) -> bool:
    try:
        return httpx2.get(f"{address}/health", timeout=5).status_code == 200
    except httpx2.HTTPError:
        return False


def build(folder: Path, context: int = 16_384) -> Path:
    """A tiny random model whose answers have a clear margin, with a context in which the limits fit."""
    sys.path.insert(0, str(TESTS))
    import composed
    import isthmus
    import tiny

    llm = tiny.llm_folder(folder / "llm", max_position_embeddings=context)
    recipe = composed.recipe().but(llm={"source": str(llm)})
    composed.stir(isthmus.compose(recipe)).save_pretrained(folder / "model", whole=True)
    return folder / "model"


def data_url(raw: bytes, form: str = "png") -> str:
    return f"data:image/{form};base64,{base64.b64encode(raw).decode()}"


def shown(url: str) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": url}}


def user(*parts: Any) -> list[dict[str, Any]]:
    """One question, of texts and parts."""
    return [{"role": "user", "content": [{"type": "text", "text": p} if isinstance(p, str) else p for p in parts]}]


def at_once(count: int, work: Callable[[int], None]) -> None:
    """Run work(0) ... work(count - 1), each in a thread."""
    threads = [threading.Thread(target=work, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


if __name__ == "__main__":
    _watch_network(Path(sys.argv[1]), int(sys.argv[2]))
    _watch_slots(Path(sys.argv[1]))
    from isthmus.cli.app import main

    sys.argv = ["isthmus", "serve", *sys.argv[3:]]
    main()
