"""`isthmus chat` and `isthmus eval` with a model behind an endpoint."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image as Pillow

from chat_server import KEY, ChatServer, pictures, running
from isthmus.cli import app


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[ChatServer]:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("TEST_KEY", KEY)
    monkeypatch.chdir(tmp_path)
    with running() as server:
        server.key = KEY
        yield server
        assert server.faults == []


def run(monkeypatch: pytest.MonkeyPatch, *words: str) -> int:
    """The exit code of `isthmus WORDS`."""
    monkeypatch.setattr(sys, "argv", ["isthmus", *words])
    try:
        app.main()
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0


def test_chat_shows_pictures_and_streams(server, monkeypatch, capsys):
    picture = Pillow.new("RGB", (5, 3), "orange")
    picture.save("cat.png")
    where = ["apple-1", "--endpoint", server.endpoint, "--key-env", "TEST_KEY"]
    settings = ["-r", "seed=7", "-r", "input_price=3", "--max-tokens", "5"]
    assert run(monkeypatch, "chat", *where, *settings, "--image", "cat.png", "--prompt", "What is this?") == 0
    printed = capsys.readouterr()
    assert printed.out == "an apple\n" and "1,000 tokens in, 10 out, cost 0.003" in printed.err
    (body,) = server.bodies
    assert (body["seed"], body["max_tokens"], body["stream"]) == (7, 5, True)
    (sent,) = pictures(body["messages"][0]["content"])
    assert np.array_equal(np.asarray(sent), np.asarray(picture))


def test_a_conversation_goes_on(server, monkeypatch, capsys):
    said = iter(["What is this?", "/exit", "Sure?", "/quit"])
    monkeypatch.setattr("rich.console.Console.input", lambda *_: next(said))
    assert run(monkeypatch, "chat", "apple-1", "--endpoint", server.endpoint, "--key-env", "TEST_KEY") == 0
    assert "no such command: /exit" in capsys.readouterr().out
    assert [message["content"] for message in server.bodies[1]["messages"]] == ["What is this?", "an apple", "Sure?"]


@pytest.mark.parametrize(
    ("words", "cause", "remedy"),
    [
        (["--key-env", "NO_SUCH_KEY"], "NO_SUCH_KEY holds no key", "export NO_SUCH_KEY"),
        (["-r", "modle=x"], "unknown key 'modle'; did you mean 'model'?", "docs/speakers.md"),
        (
            ["-r", "endpoint=http://h/v1", "--key-env", "TEST_KEY"],
            "in clear text over http; use https",
            "docs/speakers.md",
        ),
        (["-r", "budget=1"], "a budget needs input_price", "docs/speakers.md"),
        ([], "HTTP 401", "key_env"),
    ],
)
def test_errors_are_a_cause_and_a_remedy(server, monkeypatch, capsys, words, cause, remedy):
    assert run(monkeypatch, "chat", "apple-1", "--endpoint", server.endpoint, "--prompt", "x", *words) == 2
    error, hint = capsys.readouterr().err.strip().splitlines()
    assert cause in error and remedy in hint and KEY not in error


def test_eval_measures_a_baseline_and_pays_once(server, monkeypatch, capsys, embedded):
    words = ["eval", "apple-1", "--endpoint", server.endpoint, "--key-env", "TEST_KEY", "--limit", "4", "--out", "out"]
    asked = [*words, "--tasks", "naming-free", "--controls", "none", "--json"]
    assert run(monkeypatch, *asked) == 0
    printed = capsys.readouterr()
    (row,) = json.loads(printed.out)
    assert row["n"] == 4 and "4 requests" in printed.err and len(server.bodies) == 4
    assert len(list(Path("out/answers").rglob("*.json"))) == 4
    Path("out/after/naming-free.jsonl").unlink()  # as if it had been interrupted
    assert run(monkeypatch, *asked) == 0
    assert json.loads(capsys.readouterr().out)[0]["cells"] == row["cells"] and len(server.bodies) == 4
    assert not [file for file in Path("out").rglob("*") if file.is_file() and KEY in file.read_text()]
    assert run(monkeypatch, *words) == 2
    assert "reads log-probabilities" in capsys.readouterr().err
